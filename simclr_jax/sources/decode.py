"""From the bytes of an image file to uint8 pixels of 1 or 3 channels."""

import io
import math
from collections.abc import Iterable

import numpy as np
import PIL.Image
import PIL.ImageOps

try:
  import simplejpeg  # An optional extra: faster, with the same pixels.
except ImportError:
  simplejpeg = None

# Of the files of a folder that are taken for images.
EXTENSIONS = (
  ".bmp",
  ".gif",
  ".jfif",
  ".jpe",
  ".jpeg",
  ".jpg",
  ".png",
  ".tif",
  ".tiff",
  ".webp",
)
# Where EXIF data can be in a JPEG: before the pixels, in its first segments.
_EXIF_SEARCH_BYTES = 1 << 16
# Images of 16 bits that are read to tell whether all their bits are in use.
_NUM_DEEP = 4


def decode(
  record: bytes | np.ndarray, *, channels: int, max_size: int = 0
) -> np.ndarray:
  """Turns an encoded image, or pixels, into uint8 [h, w, channels].

  JPEG, PNG, WebP, BMP, TIFF and GIF (its first frame); gray, palette, CMYK
  and 16-bit images are converted, transparency is dropped, and the image is
  turned upright where EXIF says how. Large JPEGs are decoded at a half, a
  quarter or an eighth of their size where `max_size` allows it.

  Args:
    record: bytes of an image file, or uint8 [h, w, C].
    channels: 1 (gray) or 3 (RGB).
    max_size: the longest side allowed in pixels, 0 for any; larger images
      are shrunk (antialiased), keeping their aspect.

  Raises:
    ValueError: what is wrong with the image, without its name.
  """
  if isinstance(record, np.ndarray):
    if record.shape[2] != channels:
      gray = record.shape[2] == 1
      image = PIL.Image.fromarray(record[..., 0] if gray else record)
      return _decode_pillow(image, channels=channels, max_size=max_size)
    return _shrink_pixels(record, max_size)
  if not record:
    raise ValueError("the image is empty (0 bytes)")
  pixels = _decode_jpeg(record, channels=channels, max_size=max_size)
  if pixels is not None:
    return _shrink_pixels(pixels, max_size)
  try:
    with PIL.Image.open(io.BytesIO(record)) as image:
      return _decode_pillow(image, channels=channels, max_size=max_size)
  except PIL.UnidentifiedImageError as error:  # Its text has an address.
    raise ValueError("not a readable image (of no known format)") from error
  except Exception as error:  # Pillow's plugins raise many types.
    raise ValueError(f"not a readable image ({one_line(error)})") from error


def _decode_pillow(image, *, channels, max_size):
  # A JPEG's luminance is stored: gray is not computed from its RGB.
  large = max_size and max(image.size) > max_size
  image.draft(
    "L" if channels == 1 else None,
    _fit(image.size, max_size) if large else None,
  )
  image.load()
  PIL.ImageOps.exif_transpose(image, in_place=True)
  if image.mode == "F":
    raise ValueError("float pixels have no known range")
  if image.mode.startswith("I"):  # 16 bits, held in 16 or 32.
    pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
    image = PIL.Image.fromarray(pixels.astype(np.uint8))
  elif "transparency" in image.info:  # Pillow warns where a palette has it.
    image = image.convert("RGBA")
  mode = "L" if channels == 1 else "RGB"
  if image.mode != mode:
    image = image.convert(mode)
  if max_size:
    image = _shrink(image, max_size)
  return np.array(image).reshape(image.height, image.width, channels)


def _decode_jpeg(record, *, channels, max_size):
  """simplejpeg's pixels where it is installed and fit for it, else None."""
  if simplejpeg is None or record[:2] != b"\xff\xd8":
    return None
  if has_exif(record):
    return None  # It may have to be turned, which Pillow does.
  try:
    height, width = simplejpeg.decode_jpeg_header(record)[:2]
    if height * width > (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
      return None  # Pillow knows what is too much.
    size = {}
    if (scale := _scale((width, height), max_size)) > 1:
      size = {
        "min_height": -(-height // scale),
        "min_width": -(-width // scale),
        "min_factor": scale,
      }
    return simplejpeg.decode_jpeg(
      record, colorspace="GRAY" if channels == 1 else "RGB", **size
    )
  except Exception:  # CMYK, damage: Pillow decodes it or says what is wrong.
    return None


def has_exif(record: bytes) -> bool:
  """Whether a JPEG has EXIF data, so that it may have to be turned.

  >>> has_exif(b"\\xff\\xd8\\xff\\xe1 Exif\\0\\0")
  True
  """
  return b"Exif\0" in record[:_EXIF_SEARCH_BYTES]


def seen_in(paths: Iterable[str]) -> tuple[int, str]:
  """Looks at the headers of some images, and at the pixels of a few.

  Args:
    paths: of image files; damaged ones are passed over.

  Returns:
    (1 where all are gray, else 3; a sentence about what is wrong with the
    values of 16 bits, or "").
  """
  modes: set[str] = set()
  largest: list[int] = []
  for path in paths:
    try:
      with PIL.Image.open(path) as image:
        modes.add(image.mode.split(";")[0])
        if image.mode.startswith("I") and len(largest) < _NUM_DEEP:
          largest.append(int(np.asarray(image).max()))
    except Exception:  # Damaged: whoever reads it says so.
      continue
  dark = ""
  if largest and max(largest) < 4096:
    dark = (
      f"Images of 16 bits have no value above {max(largest)} of 65535, so they "
      "are nearly black; store them scaled to all 16 bits."
    )
  return 1 if modes and modes <= {"1", "L", "LA", "I", "F"} else 3, dark


def _scale(size, max_size):
  """What Pillow's draft divides a JPEG's sides by: 1, 2, 4 or 8.

  simplejpeg alone would go further: a half of 511 pixels, rounded up, is 256.
  """
  if not max_size:
    return 1
  least = min(
    side // fitted
    for side, fitted in zip(size, _fit(size, max_size), strict=True)
  )
  return next(scale for scale in (8, 4, 2, 1) if scale <= least)


def _fit(size, max_size):
  """(width, height) shrunk until no side is longer than max_size."""
  longest = max(size)
  if longest <= max_size:
    return size
  return tuple(max(1, round(side * max_size / longest)) for side in size)


def _shrink(image, max_size):
  size = _fit(image.size, max_size)
  if size == image.size:
    return image
  return image.resize(size, PIL.Image.Resampling.BILINEAR)


def _shrink_pixels(pixels, max_size):
  if not max_size or max(pixels.shape[:2]) <= max_size:
    return pixels
  squeezed = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
  image = _shrink(PIL.Image.fromarray(squeezed), max_size)
  return np.array(image).reshape(image.height, image.width, -1)


def one_line(error: BaseException) -> str:
  """The message of an exception in one line of at most 160 characters."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 160 else text[:157] + "..."
