"""Features of any number of images, in one file.

  python -m simclr_jax.embed --checkpoint=DIR --data=folder:PATH
      --output=features.npz

The file has a row an image: `features` [n, C] float32, `files`, `labels` (-1
unknown) and, where the run has a classifier, `predictions`; `label_names` says
what those numbers mean. .npz is for NumPy (np.load, nothing pickled), .parquet
for data frames. Rows are kept in OUTPUT.parts until all are there: killed, the
same command continues.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from simclr_jax import cli, feature_file, network, parallel
from simclr_jax.config import UserError
from simclr_jax.provenance import provenance

# A part is written when it has so many numbers or has taken so long.
_PART_NUMBERS = 2**24
_PART_SECONDS = 30


def embed(
  checkpoint,
  data: str,
  output,
  *,
  split: str = "",
  data_dir: str = "",
  labels: str = "",
  eval_fraction: float = 0.0,
  layer: str = "h",
  batch_size: int = 0,
  on_error: str = "raise",
) -> dict:
  """Writes the features of all images of a dataset.

  With several hosts each must call it; host 0 writes.

  Args:
    checkpoint: the directory of a run.
    data: "digits", "tfds:NAME" or "folder:PATH".
    output: the new file, .npz or .parquet.
    split: of the dataset; "": all of a folder, else "train".
    data_dir: of TFDS.
    labels: of a folder: a csv, "folders", "none", or "" to find out.
    eval_fraction: of a folder's labels, held out as split "test".
    layer: "h" (what the encoder says), "head_k" or "z".
    batch_size: images over all devices; 0: 64 a device. No row depends on it.
    on_error: at a damaged image "raise" an error, or "skip" it: no row.

  Returns:
    {"num_images", "num_skipped", "num_features", "images_per_second"}.

  Raises:
    UserError: the output exists, no checkpoint, no such data or layer, a
      damaged image, parts of another command.

  >>> result = embed("runs/finetuned", "digits", "digits.npz", split="test")
  embedded 360 images...
  >>> np.load("digits.npz")["features"].shape
  (360, 32)
  """
  output = Path(output).expanduser()
  parallel.agree(_problem_of(output))
  if on_error not in ("raise", "skip"):
    raise UserError(
      f'--on_error: got "{on_error}", allowed are "raise" and "skip"'
    )
  net = network.load(checkpoint)
  network.check_layer(net, layer)
  source = network.open_source(
    net,
    data,
    split=split,
    data_dir=data_dir,
    labels=labels,
    eval_fraction=eval_fraction,
  )
  if source.note:
    print(source.note, flush=True)
  about = {
    "checkpoint": {k: net.about[k] for k in ("workdir", "step", "hash")},
    "data": source.name,
    "split": source.split,
    "fingerprint": source.fingerprint,
    "layer": layer,
    "image_size": net.config.data.image_size,
  }
  names = (*net.label_names, *source.label_names)
  label_names = list(dict.fromkeys(names))  # the classifier's first
  # Class k of the dataset is number[k]; its last entry is for -1.
  number = np.array([*map(label_names.index, source.label_names), -1], np.int32)

  parts = output.with_name(f"{output.name}.parts")
  with _claimed(parts, about) as start:
    start = parallel.broadcast(start)
    if start:
      print(f"continuing after {start:,} images found in {parts}", flush=True)
    skipped: set[str] = set()
    rows = network.stream(
      net,
      source,
      layer=layer,
      batch_size=batch_size,
      start=start,
      on_skip=skipped.add if on_error == "skip" else None,
    )
    begin = time.monotonic()
    _write_parts(parts, rows, source, number, start)
    for line in sorted(skipped):
      print(f"skipped: {line}", flush=True)
    seconds = time.monotonic() - begin
    problem, shape = "", (0, 0)
    if jax.process_index() == 0:
      with _writing(output) as failed:
        shape = _assemble(output, parts, label_names, about | provenance())
      problem = "".join(failed)
    parallel.agree(problem)
  result = {
    "num_images": shape[0],
    "num_skipped": len(source) - shape[0],
    "num_features": shape[1],
    "images_per_second": round((len(source) - start) / seconds, 1),
  }
  if jax.process_index() == 0:
    print(
      f"embedded {shape[0]:,} images ({layer}, {shape[1]} numbers each, "
      f"{result['num_skipped']} skipped) into {output}: "
      f"{result['images_per_second']:g} images/s",
      flush=True,
    )
  return result


def _problem_of(output: Path) -> str:
  """Why this file cannot be made, or ""."""
  if output.suffix not in feature_file.SUFFIXES or "://" in str(output):
    return (
      f"--output={output} must be a local file whose name ends in "
      f"{' or '.join(feature_file.SUFFIXES)}"
    )
  if jax.process_index() == 0 and os.path.lexists(output):
    return (
      f"--output={output} exists already and is left as it is; give another"
    )
  return ""


@contextlib.contextmanager
def _writing(what) -> Iterator[list[str]]:
  """Collects the message of a disk that is full or cannot be written."""
  failed: list[str] = []
  try:
    yield failed
  except OSError as error:
    failed.append(f"{what} cannot be written: {error.strerror or error}")


# -- parts --------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(parts: Path, about: dict) -> Iterator[int]:
  """Holds the folder of parts; yields how many images are in it (host 0)."""
  problem, lock, start = "", None, 0
  if jax.process_index() == 0:
    with _writing(parts) as failed:
      parts.mkdir(parents=True, exist_ok=True)
      lock = (parts / "command.json").open("a+")
      problem = _problem_of_parts(lock, parts, about)
      start = max((stop for _, stop, _ in _parts(parts)), default=0)
    problem = "".join(failed) or problem
  try:
    parallel.agree(problem)
    yield start
  finally:
    if lock:
      lock.close()


def _problem_of_parts(lock, parts, about):
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return f"{parts} is being written by another process"
  lock.seek(0)
  text = lock.read()
  if text:
    stored = json.loads(text)
    differ = sorted(k for k in about if about[k] != stored.get(k))
    if differ:
      return (
        f"{parts} has the first part of another command's result (other: "
        f"{', '.join(differ)}); give another --output, or remove it"
      )
  else:
    lock.write(json.dumps(about))
    lock.flush()
  return ""


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
  """(first image, image after the last, file) of each part, in order."""
  files = sorted(folder.glob("[0-9]*-[0-9]*.npz"))
  return [(*map(int, file.stem.split("-")), file) for file in files]


def _write_parts(parts, rows, source, number, start) -> None:
  """Writes what comes in `rows` to disk, a part now and then."""
  held: dict[str, list[np.ndarray]] = {}
  first = stop = start
  begin = since = time.monotonic()
  is_writer = jax.process_index() == 0
  prefix = f"{source.name}/{source.split}/"
  folder = os.path.join(source.name.removeprefix("folder:"), "")

  def file_name(index):
    if source.name.startswith("folder:"):
      return source.describe(index).removeprefix(folder)
    return f"{prefix}{index}"

  def write():
    if is_writer and held:
      with _writing(parts) as failed:
        _write_part(parts / f"{first:012}-{stop:012}.npz", held)
      if failed:
        raise UserError("".join(failed))

  try:
    for batch in rows:
      kept = np.flatnonzero(batch.pop("kept"))
      if is_writer:
        batch["labels"] = number[batch["labels"]]
        for name, values in batch.items():
          held.setdefault(name, []).append(values[kept])
        held.setdefault("files", []).append(
          np.array([file_name(stop + int(i)) for i in kept], np.str_)
        )
      stop += len(batch["labels"])
      now = time.monotonic()
      size = sum(x.size for x in held.get("features", ()))
      if size >= _PART_NUMBERS or now - since >= _PART_SECONDS:
        write()
        speed = (stop - start) / (now - begin)
        if is_writer:
          print(
            f"{stop:,} of {len(source):,} images, {speed:.0f} images/s",
            flush=True,
          )
        held, first, since = {}, stop, now
  finally:  # also what came before a damaged image
    write()


def _write_part(path, held):
  arrays = {name: np.concatenate(values) for name, values in held.items()}
  draft = path.with_suffix(".draft")
  with draft.open("wb") as file:
    np.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  draft.replace(path)


def _assemble(output, parts, label_names, about) -> tuple[int, int]:
  """Joins the parts to one file; returns the shape of its features."""
  draft = parts / "whole"
  shape = feature_file.write(
    draft,
    [file for _, _, file in _parts(parts)],
    label_names=label_names,
    about=about,
    suffix=output.suffix,
  )
  if os.path.lexists(output):
    raise FileExistsError(errno.EEXIST, "it exists by now")
  draft.replace(output)
  shutil.rmtree(parts)
  return shape


def main(argv=None) -> None:
  """The command; see the top of this file."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.embed",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", required=True, help="the directory of a run")
  add("--data", required=True, help="digits, tfds:NAME or folder:PATH")
  add("--output", required=True, help="the new file, .npz or .parquet")
  add("--split", default="", help='default: all of a folder, else "train"')
  add("--data_dir", default="", help="of TFDS")
  add("--labels", default="", help="of a folder: a csv, folders or none")
  add("--eval_fraction", type=float, default=0.0, help="of a folder's labels")
  add("--layer", default="h", help="h, head_1, .. or z")
  add("--batch_size", type=int, default=0, help="images over all devices")
  add("--on_error", default="raise", help="at a damaged image: raise or skip")
  args = parser.parse_args(argv)
  try:
    cli.setup()
    with parallel.together():
      embed(**vars(args))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
  main()
