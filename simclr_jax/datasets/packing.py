"""Decoding a dataset once, into a folder that TFDS reads too."""

import io
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import auto

from simclr_jax import sources
from simclr_jax.config import UserError
from simclr_jax.data import fetch
from simclr_jax.datasets.checking import CHUNK, header
from simclr_jax.sources.decode import has_exif

# Images a file of a packed dataset; a stopped `pack` repeats at most one.
_SHARD_SIZE = 4096
_JPEG_QUALITY = 92


def pack(
  splits: dict[str, sources.Source],
  *,
  output: str | os.PathLike,
  canvas_size: int,
  name: str = "packed",
  lossless: bool = False,
  on_skip=None,
) -> Path:
  """Writes sources as a TFDS dataset of images no larger than a canvas.

  The images of a split are shuffled (a fixed order), so that a slice such as
  train[:10%] is a sample. JPEGs that need no change are copied. A pack that was
  stopped is continued: complete files are kept.

  Args:
    splits: split -> source, all with the same classes and channels.
    output: the data_dir; the dataset is in output/name/1.0.0.
    canvas_size: longest side in pixels; larger images are shrunk to it.
    name: of the dataset: lower-case letters, digits and _.
    lossless: PNG in place of JPEG.
    on_skip: called with a line about each damaged image, which is left out;
      None raises UserError at the first.

  Returns:
    The folder that was written.

  Raises:
    UserError: a damaged image, or a folder that holds something else.

  >>> source = sources.make_source("digits", split="test")
  >>> pack({"test": source}, output="packed", canvas_size=8).as_posix()
  'packed/packed/1.0.0'
  """
  from array_record.python import array_record_module

  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f'--as is "{name}"; use lower-case letters, digits and _, and begin '
      "with a letter."
    )
  folder = Path(output).expanduser() / name / "1.0.0"
  folder.mkdir(parents=True, exist_ok=True)
  prints = [source.fingerprint for source in splits.values()]
  key = f"{canvas_size} {lossless} {_SHARD_SIZE} {_JPEG_QUALITY} {prints}\n"
  marker = folder / "source.txt"
  if marker.exists() and marker.read_text() != key:
    raise UserError(
      f"{folder} holds a pack of other images or of another size; give another "
      "--output or --as, or delete it."
    )
  marker.write_text(key)
  lengths: dict[str, list[int]] = {}
  total = sum(len(source) for source in splits.values())
  with auto.tqdm(total=total, unit="image", disable=None) as bar:
    for split, source in splits.items():
      order = np.random.default_rng(0).permutation(len(source))
      num_shards = -(-len(source) // _SHARD_SIZE)
      lengths[split] = []
      for shard in range(num_shards):
        indices = order[shard * _SHARD_SIZE : (shard + 1) * _SHARD_SIZE]
        file = folder / (
          f"{name}-{split}.array_record-{shard:05}-of-{num_shards:05}"
        )
        if not file.exists():
          partial = file.with_name(f"partial-{file.name}")
          writer = array_record_module.ArrayRecordWriter(
            str(partial), "group_size:1"
          )
          for record in _packed(
            source, indices, canvas_size, lossless=lossless, on_skip=on_skip
          ):
            writer.write(record)
            bar.update()
          writer.close()
          partial.rename(file)
        else:
          bar.update(len(indices))
        reader = array_record_module.ArrayRecordReader(str(file))
        lengths[split].append(reader.num_records())
        reader.close()
  _write_info(folder, name, splits, lengths)
  return folder


def _packed(source, indices, canvas_size, *, lossless, on_skip):
  """The records of these images, without the damaged ones."""
  from tensorflow_datasets.proto import tf_example_pb2

  def encode(start):
    records = []
    for i in indices[start : start + CHUNK].tolist():
      (found,) = fetch.fetch_each(source, [i], max_size=canvas_size)
      if isinstance(found, UserError):
        if on_skip is None:
          raise UserError(
            f"{found}; mend or remove it, or leave such images out with --skip."
          )
        on_skip(str(found))
        continue
      image, label = found
      ((original, _),) = source.read([i])
      if lossless:
        original = encoded(image, "PNG")
      elif not _fits(original, image):
        original = encoded(image, "JPEG", quality=_JPEG_QUALITY)
      example = tf_example_pb2.Example()
      features = example.features.feature
      features["image"].bytes_list.value.append(original)
      if source.read_ids:
        ((file, _),) = source.read_ids([i])
      else:
        file = source.describe(i)
      file = file.encode("utf-8", "backslashreplace")
      features["file_name"].bytes_list.value.append(file)
      if source.num_classes:
        features["label"].int64_list.value.append(label)
      records.append(example.SerializeToString())
    return records

  starts = range(0, len(indices), CHUNK)
  for records in fetch.threads().map(encode, starts):
    yield from records


def _fits(record, image):
  """Whether a record is a JPEG that stays as it is: `image`, in RGB or gray."""
  if isinstance(record, np.ndarray) or record[:2] != b"\xff\xd8":
    return False
  mode, size = header(record)
  as_wanted = mode == ("L" if image.shape[-1] == 1 else "RGB")
  same_size = tuple(size) == image.shape[:2]
  return as_wanted and same_size and not has_exif(record)


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
  """uint8 [h, w, 1 or 3] as the bytes of a file, "JPEG" or "PNG"."""
  file = io.BytesIO()
  pixels = image[..., 0] if image.shape[-1] == 1 else image
  PIL.Image.fromarray(pixels).save(file, kind, **options)
  return file.getvalue()


def _write_info(folder, name, splits, lengths):
  """What makes a folder of array_records a dataset to TFDS."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info

  source = next(iter(splits.values()))
  features = {
    "image": tfds.features.Image(shape=(None, None, source.channels)),
    "file_name": tfds.features.Text(),
  }
  if source.num_classes:
    features["label"] = tfds.features.ClassLabel(names=source.label_names)
  identity = dataset_info.DatasetIdentity(
    name=name,
    version=tfds.core.Version("1.0.0"),
    data_dir=str(folder),
    module_name="",
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=f"Packed from {source.name} by simclr_jax.datasets.",
    features=tfds.features.FeaturesDict(features),
    supervised_keys=("image", "label") if source.num_classes else None,
  )
  info.set_file_format("array_record")
  info.set_splits(
    tfds.core.splits.SplitDict(
      [
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=lengths[split],
          num_bytes=sum(
            f.stat().st_size
            for f in folder.glob(f"{name}-{split}.array_record-*")
          ),
          filename_template=tfds.core.ShardedFileTemplate(
            dataset_name=name,
            data_dir=folder,
            split=split,
            filetype_suffix="array_record",
          ),
        )
        for split in splits
      ]
    )
  )
  info.write_to_directory(folder)
