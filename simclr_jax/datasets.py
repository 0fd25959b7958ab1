"""Looking at a dataset before training, packing it, preparing CIFAR-10.

  python -m simclr_jax.datasets check folder:PATH --image_size=160
  python -m simclr_jax.datasets pack folder:PATH --output=DIR --canvas_size=240
  python -m simclr_jax.datasets prepare cifar10 --data_dir=DIR

`check` names damaged files and duplicates, measures how fast images are decoded
and says what canvas to take. `pack` decodes everything once into a folder that
TFDS reads too (`tfds:packed` in it), which streams about five times as fast.
`prepare` downloads the official archive, or takes it where --archive says.
"""

import argparse
import collections
import hashlib
import io
import os
import re
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm import auto

from simclr_jax import sources
from simclr_jax.config import UserError
from simclr_jax.data import fetch
from simclr_jax.data.memory import memory_bytes

# Images a file of a packed dataset; a stopped `pack` repeats at most one.
_SHARD_SIZE = 4096
_CHUNK = 64
_JPEG_QUALITY = 92
_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SHA256 = (
  "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
)


def check(
  source: sources.Source, *, image_size: int = 0, images_per_second: float = 0.0
) -> dict:
  """Reads and decodes every image of a source.

  Args:
    source: from `sources.make_source`.
    image_size: side that the network will see in pixels, for the canvas; 0
      leaves this out.
    images_per_second: of the training step, to say whether decoding keeps up.

  Returns:
    "num_examples", "damaged" (list of messages), "duplicates" (list of lists of
    names with the same content), "classes" (name -> count, "" for unlabelled),
    "heights" and "widths" (least, median, largest), "modes" (Pillow's modes of
    the stored images -> count), "images_per_second" (decoded, all cores),
    "canvas_size" and "canvas_gib" (with image_size), "feeds" (whether decoding
    keeps up with `images_per_second`, else None).
  """
  begin = time.perf_counter()
  max_size = image_size * 3 // 2 if image_size > 64 else image_size

  def look(start):
    found = []
    for i in range(start, min(start + _CHUNK, len(source))):
      try:
        ((record, _),) = source.read([i])
        mode, size = _header(record)
        # Damage inside is found by decoding as training does.
        ((_, label),) = source.fetch([i], max_size=max_size)
        digest = hashlib.sha256(_bytes(record)).digest()
        found.append((i, label, mode, size, digest))
      except UserError as error:
        found.append((i, error))
      except Exception:  # Pillow's header reader; decoding says what it is.
        (error,) = fetch.fetch_each(source, [i], max_size=max_size)
        found.append((i, error))
    return found

  looked = []
  starts = range(0, len(source), _CHUNK)
  with auto.tqdm(total=len(source), unit="image", disable=None) as bar:
    for found in fetch.threads().map(look, starts):
      looked += found
      bar.update(len(found))
  rate = len(looked) / max(time.perf_counter() - begin, 1e-9)
  good = [item for item in looked if len(item) == 5]
  same = collections.defaultdict(list)
  for i, _, _, _, digest in good:
    same[digest].append(source.describe(i))
  counts = collections.Counter(label for _, label, *_ in good)
  names = {-1: "", **dict(enumerate(source.label_names))}
  sizes = np.array([size for *_, size, _ in good] or [(0, 0)])
  report = {
    "num_examples": len(source),
    "damaged": [str(item[1]) for item in looked if len(item) == 2],
    "duplicates": [group for group in same.values() if len(group) > 1],
    "classes": {
      name: counts[k] for k, name in names.items() if k >= 0 or counts[k]
    },
    "heights": _spread(sizes[:, 0]),
    "widths": _spread(sizes[:, 1]),
    "modes": dict(collections.Counter(mode for _, _, mode, *_ in good)),
    "images_per_second": round(rate, 1),
    "feeds": rate >= images_per_second if images_per_second else None,
  }
  if image_size:
    # No more than the images have; 3/2 of the view, so that crops are sharp.
    canvas = int(min(max_size, max(sizes.max(), 1)))
    report["canvas_size"] = canvas
    report["canvas_gib"] = len(source) * canvas**2 * source.channels / 2**30
  return report


def _spread(values):
  return int(values.min()), int(np.median(values)), int(values.max())


def _bytes(record):
  return record.tobytes() if isinstance(record, np.ndarray) else record


def _header(record):
  """(Pillow's mode, (height, width)) of a record."""
  if isinstance(record, np.ndarray):
    return "L" if record.shape[-1] == 1 else "RGB", record.shape[:2]
  with PIL.Image.open(io.BytesIO(record)) as image:
    return image.mode, (image.height, image.width)


def _print_report(report, source, images_per_second) -> None:
  lines = [f"{source.name} {source.split}: {report['num_examples']} images"]
  for name in ("heights", "widths"):
    low, middle, high = report[name]
    lines.append(f"{name}: {low} to {high} pixels, median {middle}")
  modes = ", ".join(f"{m} {n}" for m, n in sorted(report["modes"].items()))
  lines.append(f"stored as {modes}; read as {source.channels} channel(s)")
  if source.num_classes:
    classes = ", ".join(
      f"{name or '(unlabelled)'} {n}" for name, n in report["classes"].items()
    )
    lines.append(f"classes: {classes}")
  else:
    lines.append("no labels")
  lines.append(f"damaged: {len(report['damaged'])}")
  lines += [f"  {message}" for message in report["damaged"]]
  groups = report["duplicates"]
  lines.append(f"contents that are there more than once: {len(groups)}")
  lines += [f"  {' = '.join(group)}" for group in groups]
  rate, cores = report["images_per_second"], fetch.num_cores()
  lines.append(f"read and decoded: {rate:.0f} images/s on {cores} core(s)")
  in_memory = False
  if "canvas_size" in report:
    budget = memory_bytes() / 2**31
    in_memory = report["canvas_gib"] <= budget
    lines.append(
      f"take config.data.canvas_size={report['canvas_size']}: "
      f"{report['canvas_gib']:.2f} GiB, "
      + (
        "kept in memory" if in_memory else f"streamed (above {budget:.1f} GiB)"
      )
    )
  if report["feeds"] is not None:
    if report["feeds"] or in_memory:
      how = "from memory" if in_memory else "streamed"
      lines.append(f"feeds a step of {images_per_second:g} images/s, {how}")
    else:
      lines.append(
        f"does not feed a step of {images_per_second:g} images/s if streamed: "
        f"about {images_per_second / rate * cores:.0f} cores would; or pack it"
      )
  print("\n".join(lines), flush=True)


# -- pack ---------------------------------------------------------------------


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
    for i in indices[start : start + _CHUNK].tolist():
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
        original = _encoded(image, "PNG")
      elif not _fits(original, image):
        original = _encoded(image, "JPEG", quality=_JPEG_QUALITY)
      example = tf_example_pb2.Example()
      features = example.features.feature
      features["image"].bytes_list.value.append(original)
      file = source.describe(i).encode("utf-8", "backslashreplace")
      features["file_name"].bytes_list.value.append(file)
      if source.num_classes:
        features["label"].int64_list.value.append(label)
      records.append(example.SerializeToString())
    return records

  starts = range(0, len(indices), _CHUNK)
  for records in fetch.threads().map(encode, starts):
    yield from records


def _fits(record, image):
  """Whether a record is a JPEG that stays as it is: `image`, in RGB or gray."""
  if isinstance(record, np.ndarray) or record[:2] != b"\xff\xd8":
    return False
  mode, size = _header(record)
  as_wanted = mode == ("L" if image.shape[-1] == 1 else "RGB")
  turned = b"Exif\0" in record[: 1 << 16]
  return as_wanted and tuple(size) == image.shape[:2] and not turned


def _encoded(image, kind, **options):
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


# -- prepare ------------------------------------------------------------------


def prepare_cifar10(
  data_dir: str | os.PathLike,
  *,
  archive: str | os.PathLike = "",
  url: str = _CIFAR10_URL,
  sha256: str = _CIFAR10_SHA256,
) -> Path:
  """Prepares CIFAR-10 with TFDS's own builder, without TensorFlow.

  Args:
    data_dir: where prepared datasets are.
    archive: cifar-10-binary.tar.gz; "" downloads it.
    url: where from.
    sha256: of the archive, in hexadecimal.

  Returns:
    The folder that was written.

  Raises:
    UserError: no such archive, or one with another content.
  """
  import tensorflow_datasets as tfds

  data_dir = Path(data_dir).expanduser().absolute()
  if archive:  # What is wrong with it is told before anything is written.
    _verify(Path(archive).expanduser(), sha256)

  class Cifar10(tfds.image_classification.Cifar10, skip_registration=True):
    """TFDS encodes pixels (and opens archives) with TensorFlow alone."""

    def _split_generators(self, dl_manager):
      dl_manager.download_and_extract = lambda _: temporary
      return super()._split_generators(dl_manager)

    def _generate_examples(self, split_prefix, filepaths):
      for key, example in super()._generate_examples(split_prefix, filepaths):
        yield key, dict(example, image=_encoded(example["image"], "PNG"))

  data_dir.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
    if archive:
      file = Path(archive).expanduser()
    else:
      file = Path(temporary, "archive.tar.gz")
      _download(url, file)
      _verify(file, sha256)
    with tarfile.open(file) as tar:
      tar.extractall(temporary, filter="data")
    builder = Cifar10(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(
      download_dir=temporary,
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
  return Path(builder.data_dir)


def _verify(archive, sha256):
  try:
    with open(archive, "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{archive}: cannot be read ({error.strerror}).") from None
  if found != sha256:
    raise UserError(
      f"{archive} is not the official cifar-10-binary.tar.gz: its SHA-256 is "
      f"{found}, not {sha256}."
    )


def _download(url, file):
  try:
    with urllib.request.urlopen(url, timeout=60) as response:
      size = int(response.headers.get("Content-Length") or 0) or None
      with (
        open(file, "wb") as target,
        auto.tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar,
      ):
        while part := response.read(1 << 20):
          target.write(part)
          bar.update(len(part))
  except OSError as error:
    raise UserError(
      f"{url} cannot be downloaded ({error}); get it in another way and name it "
      "with --archive."
    ) from error


# -- the command --------------------------------------------------------------


def main(argv=None) -> None:
  """Runs the command line; a UserError is one line and exit code 2."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.datasets",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for command in ("check", "pack"):
    sub = commands.add_parser(command)
    sub.add_argument("name", help="digits, tfds:NAME or folder:PATH")
    sub.add_argument("--data_dir", default="", help="of TFDS")
    sub.add_argument("--labels", default="", help="of a folder: data.labels")
    sub.add_argument("--eval_fraction", type=float, default=0.0)
  check_parser, pack_parser = commands.choices.values()
  check_parser.add_argument("--split", default="")
  check_parser.add_argument("--image_size", type=int, default=0)
  check_parser.add_argument("--images_per_second", type=float, default=0.0)
  pack_parser.add_argument("--splits", default="train", help="a comma between")
  pack_parser.add_argument("--output", required=True, help="data_dir to write")
  pack_parser.add_argument("--canvas_size", type=int, required=True)
  pack_parser.add_argument("--as", dest="as_name", default="packed")
  pack_parser.add_argument("--lossless", action="store_true", help="PNG")
  pack_parser.add_argument("--skip", action="store_true", help="damaged images")
  prepare_parser = commands.add_parser("prepare")
  prepare_parser.add_argument("name", choices=["cifar10"])
  prepare_parser.add_argument("--data_dir", required=True)
  prepare_parser.add_argument("--archive", default="")
  args = parser.parse_args(argv)
  try:
    {"check": _check, "pack": _pack, "prepare": _prepare}[args.command](args)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def _open(args, split):
  source = sources.make_source(
    args.name,
    split=split,
    data_dir=args.data_dir,
    labels=args.labels,
    eval_fraction=args.eval_fraction,
  )
  if source.note:
    print(source.note, flush=True)
  return source


def _check(args):
  everything = "all" if args.name.startswith("folder:") else "train"
  source = _open(args, args.split or everything)
  report = check(
    source,
    image_size=args.image_size,
    images_per_second=args.images_per_second,
  )
  _print_report(report, source, args.images_per_second)
  if report["damaged"]:
    sys.exit(2)


def _pack(args):
  splits = {split: _open(args, split) for split in args.splits.split(",")}
  skipped = []
  folder = pack(
    splits,
    output=args.output,
    canvas_size=args.canvas_size,
    name=args.as_name,
    lossless=args.lossless,
    on_skip=skipped.append if args.skip else None,
  )
  for line in skipped:
    print(f"skipped: {line}")
  print(
    f"packed into {folder}; train on it with --config.data.name="
    f"tfds:{args.as_name} --config.data.data_dir={args.output}",
    flush=True,
  )


def _prepare(args):
  folder = prepare_cifar10(args.data_dir, archive=args.archive)
  print(
    f"prepared {folder}; use it with --config.data.data_dir={args.data_dir}",
    flush=True,
  )


if __name__ == "__main__":
  main()
