"""Random boxes by the official law, and bicubic resizing of what is inside."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.augment import pixels
from simclr_jax.config import UserError

AREA_RANGE = (0.08, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)
TRIES = 16
# The official sampler is called with min_object_covered=0.1 and the whole
# image as the object, so that no box covers less than a tenth.
MIN_COVERED = 0.1
EVAL_CROP = 0.875


def check_ranges(area_range, aspect_range):
  """Both as options of the sampler; UserError unless a box can meet them."""
  area_range = pixels.low_high(area_range, "area_range")
  aspect_range = pixels.low_high(aspect_range, "aspect_range")
  low, high = area_range
  if not (0 < low <= high <= 1 and high >= MIN_COVERED):
    raise UserError(
      f"augment.area_range is {area_range}; expected 0 < low <= high "
      f"<= 1 with high at least {MIN_COVERED} (no crop covers less), such as "
      f"{AREA_RANGE}"
    )
  low, high = aspect_range
  if not 0 < low <= high < np.inf:
    raise UserError(
      f"augment.aspect_range is {aspect_range}; expected 0 < low <= "
      "high, width over height, such as (0.75, 1.333)"
    )
  return {"area_range": area_range, "aspect_range": aspect_range}


@functools.partial(
  jax.jit, static_argnames=("area_range", "aspect_range"), inline=True
)
def boxes_from_uniforms(u, shape, *, area_range, aspect_range):
  """The official law applied to given draws.

  u float32 [..., 2 * TRIES + 2] in [0, 1), shape int [..., 2] = (height,
  width); returns int32 [..., 4]. The law is TensorFlow's
  sample_distorted_bounding_box: not the area but the height is uniform, among
  the integers between those that give the smallest and the largest area at
  this aspect; the last position on each side is never used.
  """
  u = u.astype(jnp.float32)  # as official: float64 views see the same boxes
  aspects, heights = u[..., :TRIES], u[..., TRIES : 2 * TRIES]
  shape = jnp.maximum(shape.astype(jnp.int32), 1)
  rows, columns = shape[..., :1], shape[..., 1:]
  whole = (rows * columns).astype(jnp.float32)
  low, high = (np.float32(a) for a in area_range)
  min_area, max_area = low * whole, high * whole

  first, last = (np.float32(a) for a in aspect_range)
  aspect = aspects * (last - first) + first

  def rint(x):
    return jnp.rint(x).astype(jnp.int32)

  def width_of(height):
    return rint(height * aspect)

  tallest = rint(jnp.sqrt(max_area / aspect))
  fitting = ((columns + np.float32(0.5)) / aspect).astype(jnp.int32)
  tallest = jnp.where(width_of(tallest) > columns, fitting, tallest)
  tallest = jnp.minimum(tallest, rows)
  shortest = jnp.minimum(rint(jnp.sqrt(min_area / aspect)), tallest)
  span = tallest - shortest + 1
  height = shortest + (heights * span).astype(jnp.int32)
  # Where rounding has left the allowed areas, one pixel leads back.
  height += height * width_of(height) < min_area
  height -= height * width_of(height) > max_area
  width = width_of(height)
  area = (height * width).astype(jnp.float32)
  good = (area >= min_area) & (area <= max_area) & (height > 0) & (width > 0)
  good &= (height <= rows) & (width <= columns)
  good &= area / whole >= np.float32(MIN_COVERED)

  chosen = jnp.argmax(good, axis=-1, keepdims=True)  # the first good one
  size = jnp.concatenate(
    [jnp.take_along_axis(x, chosen, axis=-1) for x in (height, width)], -1
  )
  size = jnp.where(good.any(-1, keepdims=True), size, shape)
  offset = (u[..., 2 * TRIES :] * (shape - size)).astype(jnp.int32)
  return jnp.concatenate([offset, size], axis=-1)


def sample_crop_boxes(
  key, shape, *, num, area_range=AREA_RANGE, aspect_range=ASPECT_RANGE
):
  """Draws crop boxes by the law of the official SimCLR code.

  Args:
    key: a typed key.
    shape: (height, width) of all images, or int [num, 2], one a row; pixels.
    num: the number of boxes.
    area_range: smallest and largest area as a fraction of the image.
    aspect_range: smallest and largest width over height, in pixels. (The
      official code multiplies it by width over height of a non-square output.)

  Returns:
    int32 [num, 4]: top, left, height, width in pixels, inside the image.

  Raises:
    UserError: for ranges that no box can meet, or a negative num.

  After 16 tries (official: 100; on ordinary shapes the difference is 1e-10)
  the whole image is taken. Source: data_util.py, distorted_bounding_box_crop.

  >>> boxes = sample_crop_boxes(jax.random.key(0), (48, 64), num=5)
  >>> boxes.shape
  (5, 4)
  """
  ranges = check_ranges(area_range, aspect_range)
  if not hasattr(num, "__index__") or num < 0:
    raise UserError(f"num is {num}; expected an int >= 0")
  u = jax.random.uniform(key, (num, 2 * TRIES + 2), jnp.float32)
  shape = jnp.broadcast_to(jnp.asarray(shape), (num, 2))
  return boxes_from_uniforms(u, shape, **ranges)


def _sources(start, length, flip, num_out, dtype):
  """Where each output of one side lies in the input: [..., num_out]."""
  start, length, flip = (x[..., None] for x in (start, length, flip))
  out = jnp.arange(num_out, dtype=dtype)
  out = jnp.where(flip, num_out - 1 - out, out)
  return start + (out + 0.5) * (length / num_out) - 0.5


def _weights(source, pixel, start, length):
  """Weights [..., num_out, k] of the pixels for the outputs.

  Bicubic with A = -0.5, half-pixel centres, no antialiasing. Weights of pixels
  outside [start, start + length) are zero and the others renormalised, which
  is what cropping first and resizing then gives.
  """
  x = jnp.abs(source[..., None] - pixel)
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  weight = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
  start, length = start[..., None, None], length[..., None, None]
  inside = (pixel >= start) & (pixel < start + length)
  weight = jnp.where(inside, weight, 0)
  return weight / weight.sum(axis=-1, keepdims=True)


def resampling_matrix(start, length, flip, *, num_in, num_out, dtype):
  """The matrix [..., num_out, num_in] that resizes one side of a box.

  See `_weights`; a flip reverses the rows.
  """
  source = _sources(start, length, flip, num_out, dtype)
  return _weights(source, jnp.arange(num_in, dtype=dtype), start, length)


def rows_are_faster(images, size) -> bool:
  """Whether a CPU crops images [n, S, T, C] faster by `rows_of`: large ones."""
  return images.shape[1] * size[1] >= 64 * 64


@functools.partial(jax.jit, static_argnames="size", inline=True)
def crop_planes(images, boxes, flips, *, size):
  """Floats [n, S, T, C], boxes [n, v, 4], flips [n, v] -> [n, v, H, C, W].

  Channels come second to last, so that every later pass runs over contiguous
  rows.
  """

  def by_rows(*args):
    planes = jnp.swapaxes(args[0], 2, 3), *args[1:]
    return jax.lax.map(lambda each: rows_of(*each, size=size), planes)

  products = functools.partial(by_products, size=size)
  return jax.lax.platform_dependent(
    images,
    boxes.astype(images.dtype),
    flips,
    cpu=by_rows if rows_are_faster(images, size) else products,
    default=products,
  )


def by_products(images, boxes, flips, *, size, precision="highest"):
  """`crop_planes` by two batched products, a side each.

  The views of an image share its pixels in the first. The products' precision
  is full by default: JAX's own keeps 8 to 10 bits on accelerators.
  """
  n, rows, columns, channels = images.shape
  views, dtype = boxes.shape[1], images.dtype
  height, width = size
  top, left, box_height, box_width = jnp.moveaxis(boxes, -1, 0)
  down = resampling_matrix(
    top,
    box_height,
    jnp.zeros_like(flips),
    num_in=rows,
    num_out=height,
    dtype=dtype,
  )
  across = resampling_matrix(
    left, box_width, flips, num_in=columns, num_out=width, dtype=dtype
  )
  x = jnp.einsum(
    "nhs,nsk->nhk",
    down.reshape(n, views * height, rows),
    jnp.swapaxes(images, 2, 3).reshape(n, rows, channels * columns),
    precision=precision,
  ).reshape(n, views, height * channels, columns)
  x = jnp.einsum("nvks,nvws->nvkw", x, across, precision=precision)
  return x.reshape(n, views, height, channels, width)


def rows_of(planes, boxes, flips, *, size):
  """`by_products` of one image: rows by their four taps, then a product.

  planes [S, C, T], boxes [v, 4], flips [v] -> [v, H, C, W]. The first of two
  products would mostly multiply zeros, which costs a CPU more than these rows.
  """
  num_rows, channels, columns = planes.shape
  views, dtype = len(boxes), planes.dtype
  height, width = size
  top, left, box_height, box_width = jnp.moveaxis(boxes, -1, 0)
  source = _sources(top, box_height, jnp.zeros_like(flips), height, dtype)
  taps = jnp.floor(source)[..., None] + jnp.arange(-1, 3, dtype=dtype)
  weight = _weights(source, taps, top, box_height)[..., None]
  taps = jnp.clip(taps, 0, num_rows - 1).astype(jnp.int32)
  rows = planes.reshape(num_rows, -1)
  x = functools.reduce(
    operator.add, [weight[:, :, k] * rows[taps[..., k]] for k in range(4)]
  ).reshape(views, height * channels, columns)
  across = resampling_matrix(
    left, box_width, flips, num_in=columns, num_out=width, dtype=dtype
  )
  x = jnp.einsum("vks,vws->vkw", x, across, precision="highest")
  return x.reshape(views, height, channels, width)


def crop_and_resize(images, boxes, *, size):
  """Cuts a box out of each image and resizes it, bicubic.

  Args:
    images: [..., H, W, C] uint8, or floats in [0, 1].
    boxes: [..., 4] or [4]: top, left, height, width in whole pixels, inside
      the image, of one pixel or more.
    size: int or (height, width) of the result.

  Returns:
    [..., height, width, C], floats. Bicubic overshoots: values can leave
    [0, 1] and are not clipped.

  Raises:
    UserError: for images or a size of another kind.

  As tf.image.resize (TF2) on the cropped image: A = -0.5, half-pixel centres,
  no antialiasing, taps outside the box dropped. TensorFlow rounds its weights
  to 1/1024, this does not.

  >>> image = jnp.ones((8, 8, 3))
  >>> crop_and_resize(image, jnp.array([2, 2, 4, 4]), size=6).shape
  (6, 6, 3)
  """
  size = pixels.height_width(size)
  images = pixels.to_float(images)
  dtype, lead = images.dtype, images.shape[:-3]
  # bfloat16 cannot represent every pixel position above 256.
  images = images.astype(jnp.promote_types(dtype, jnp.float32))
  boxes = jnp.broadcast_to(jnp.asarray(boxes), (*lead, 4)).reshape(-1, 1, 4)
  views = crop_planes(
    images.reshape(-1, *images.shape[-3:]),
    boxes,
    jnp.zeros(boxes.shape[:2], bool),
    size=size,
  )
  views = jnp.swapaxes(views, -1, -2).astype(dtype)
  return views.reshape(*lead, *size, images.shape[-1])


@functools.partial(jax.jit, static_argnames=("size", "crop"), inline=True)
def _central_boxes(sizes, *, size, crop):
  """int [..., 2] -> float32 [..., 4], rounded as the official center_crop."""
  whole = jnp.maximum(sizes, 1).astype(jnp.float32)
  rows, columns = whole[..., 0], whole[..., 1]
  aspect, crop = np.float32(size[1] / size[0]), np.float32(crop)
  wider = aspect > columns / rows  # than the image: its width is the limit
  box = jnp.stack(
    [
      jnp.where(wider, crop / aspect * columns, crop * rows),
      jnp.where(wider, crop * columns, crop * aspect * rows),
    ],
    axis=-1,
  )
  box = jnp.maximum(jnp.rint(box), 1)
  return jnp.concatenate([jnp.floor((whole - box + 1) / 2), box], axis=-1)


def eval_view(images, *, size, sizes=None, crop=None, dtype=None):
  """The view that evaluation sees: a central crop, resized.

  Args:
    images: [..., H, W, C] uint8, or floats in [0, 1].
    size: int or (height, width) of the result.
    sizes: int [..., 2], the true height and width inside a larger canvas, top
      left; None: all of it.
    crop: the part of the largest box of the result's aspect that is kept,
      in (0, 1]; None: 0.875, or 1.0 where max(size) <= 32 (official).
    dtype: of the result; None: float32 for uint8, else the images' own.

  Returns:
    [..., height, width, C] in [0, 1].

  Raises:
    UserError: for a crop outside (0, 1], images or a size of another kind.

  Always resized (also at crop 1.0). Source: data_util.py, center_crop.

  >>> eval_view(jnp.zeros((2, 40, 40, 3), jnp.uint8), size=32).shape
  (2, 32, 32, 3)
  """
  height, width = pixels.height_width(size)
  images = jnp.asarray(images)
  if dtype is None:
    is_float = jnp.issubdtype(images.dtype, jnp.floating)
    dtype = images.dtype if is_float else jnp.float32
  images = pixels.to_float(images, jnp.promote_types(dtype, jnp.float32))
  if crop is None:
    crop = EVAL_CROP if max(height, width) > 32 else 1.0
  if not 0 < crop <= 1:
    raise UserError(f"crop is {crop}; expected a part in (0, 1], such as 0.875")
  pixels.need_floating(dtype)
  canvas = jnp.asarray(images.shape[-3:-1])
  sizes = canvas if sizes is None else jnp.minimum(jnp.asarray(sizes), canvas)
  boxes = _central_boxes(sizes, size=(height, width), crop=float(crop))
  images = crop_and_resize(images, boxes, size=(height, width))
  return jnp.clip(images, 0, 1).astype(dtype)
