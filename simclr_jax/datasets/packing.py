"""Decoding a dataset once, into a folder that TFDS reads too."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import auto

from simclr_jax import sources, storage
from simclr_jax.config import UserError
from simclr_jax.data import fetch
from simclr_jax.datasets.checking import CHUNK, header
from simclr_jax.sources import workers
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
    splits: split -> source, all with the same classes and channels. A name is
      of letters, digits, _ and -, and not "all".
    output: the data_dir; the dataset is in output/name/1.0.0.
    canvas_size: longest side in pixels; larger images are shrunk to it.
    name: of the dataset: lower-case letters, digits and _.
    lossless: PNG in place of JPEG.
    on_skip: called with a line about each damaged image, which is left out;
      None raises UserError at the first.

  Returns:
    The folder that was written.

  Raises:
    UserError: a damaged image, a split without a good one, a folder that
      holds something else or cannot be written. Complete files are kept for
      the next time; where there are none, no folder is left.

  >>> source = sources.make_source("digits", split="test")
  >>> pack({"test": source}, output="packed", canvas_size=8).as_posix()
  'packed/packed/1.0.0'
  """
  _check(name, splits, canvas_size)
  folder = storage.local_folder(output, "--output") / name / "1.0.0"
  prints = [source.fingerprint for source in splits.values()]
  key = f"{canvas_size} {lossless} {_SHARD_SIZE} {_JPEG_QUALITY} {prints}\n"
  options = {"lossless": lossless, "on_skip": on_skip}
  with storage.writable(output, "--output"), _claimed(folder, key):
    lengths = _write_splits(folder, name, splits, canvas_size, **options)
    _write_info(folder, name, splits, lengths)
  return folder


def _check(name, splits, canvas_size):
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f'--as is "{name}"; use lower-case letters, digits and _, and begin '
      "with a letter."
    )
  if canvas_size < 1:
    raise UserError(
      f"--canvas_size must be 1 pixel or more, got {canvas_size}."
    )
  for split in splits:
    if split == "all":
      raise UserError(
        '--splits: "all" is TFDS\'s name for all splits together; pack them by '
        "their names, such as --splits=train,test."
      )
    if not re.fullmatch(r"[\w-]+", split):
      raise UserError(
        f'--splits: "{split}" is no name of a split (letters, digits, _ and '
        "-); pack the whole split and take a slice of the pack."
      )


@contextlib.contextmanager
def _claimed(folder, key):
  """Makes the folder of a pack, or takes that of the same pack once more.

  After an error nothing is left of one that has no complete file.
  """
  created = [d for d in folder.parents if not d.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  marker = folder / "source.txt"
  ours = marker.exists() and marker.read_text() == key
  if not ours and any(folder.iterdir()):
    raise UserError(
      f"{folder} holds a pack of other images or of another size; give another "
      "--output or --as, or delete it."
    )
  try:
    marker.write_text(key)
    yield
  except Exception:
    # Whatever is mended, the pack is one of other images then.
    if not any(folder.glob(f"{folder.parent.name}-*.array_record-*")):
      shutil.rmtree(folder)
      with contextlib.suppress(OSError):  # Others may have written there.
        for parent in created:
          parent.rmdir()
    raise


def _write_splits(folder, name, splits, canvas_size, **options):
  """Writes the files that are not there; split -> records of each file."""
  from array_record.python import array_record_module

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
          _write_file(
            file, _packed(source, indices, canvas_size, **options), bar
          )
        else:
          bar.update(len(indices))
        reader = array_record_module.ArrayRecordReader(str(file))
        lengths[split].append(reader.num_records())
        reader.close()
      if not sum(lengths[split]):  # TFDS would not open it.
        for file in folder.glob(f"{name}-*.array_record-*"):
          file.unlink()
        raise UserError(
          f"none of the {len(source)} images of {source.name} {source.split} "
          "can be read; nothing is packed."
        )
  return lengths


def _write_file(file, records, bar):
  """Writes records under the name of `file` once all are there."""
  from array_record.python import array_record_module

  partial = file.with_name(f"partial-{file.name}")
  try:
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    try:
      for record in records:
        writer.write(record)
        bar.update()
    finally:
      writer.close()
    partial.rename(file)
  except RuntimeError as error:  # What array_record makes of the system's.
    raise OSError(str(error).partition(";")[0]) from error
  finally:
    partial.unlink(missing_ok=True)


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
  for records in workers.threads().map(encode, starts):
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
    # In a file of UTF-8, one a line; names of folders have any bytes.
    names = [
      name.encode("utf-8", "backslashreplace").decode()
      for name in source.label_names
    ]
    names = [name.translate({10: r"\n", 13: r"\r"}) for name in names]
    features["label"] = tfds.features.ClassLabel(names=names)
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
