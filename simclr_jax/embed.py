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
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from simclr_jax import cli, errors, feature_file, hosts, network, sources
from simclr_jax.config import UserError
from simclr_jax.data import order
from simclr_jax.provenance import provenance
from simclr_jax.storage import write_whole

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
  hosts.agree(_problem_of(output))
  output = Path(output).expanduser()
  _check_options(eval_fraction, batch_size, on_error)
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
  batch_size = order.at_most(
    batch_size, num_examples=len(source), num_devices=jax.device_count()
  )
  if source.note:
    print(sources.as_flags(source.note, name="--data"), flush=True)
  about = {
    "checkpoint": {k: net.about[k] for k in ("workdir", "step", "hash")},
    "data": source.name,
    "split": source.split,
    "fingerprint": source.fingerprint,
    "layer": layer,
    "image_size": net.config.data.image_size,
  }
  # The classifier's names come first and complete: its outputs are numbered in
  # that order.
  label_names = list(net.label_names)
  label_names += [x for x in source.label_names if x not in net.label_names]
  # Class k of the dataset is number[k]; its last entry is for -1.
  number = np.array([*map(label_names.index, source.label_names), -1], np.int32)
  numbers = {
    "num_outputs": len(net.label_names),
    "data_classes": number[:-1].tolist(),
    "num_neighbors": net.config.knn.num_neighbors if "knn" in net.config else 0,
  }

  parts = output.with_name(f"{output.name}.parts")
  with _claimed(parts, about) as start:
    start = hosts.broadcast(start)
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
        shape = _assemble(
          output, parts, label_names, about | numbers | provenance()
        )
      problem = "".join(failed)
    hosts.agree(problem)
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


def _check_options(eval_fraction, batch_size, on_error):
  """Before anything is read, and before a folder is made for parts."""
  if on_error not in ("raise", "skip"):
    raise UserError(
      f'--on_error: got "{on_error}", allowed are "raise" and "skip"'
    )
  if not 0 <= eval_fraction < 1:  # nor nan
    raise UserError(
      f"--eval_fraction: got {eval_fraction:g}, must be from 0 to below 1; 0.2 "
      "holds out a fifth"
    )
  devices = jax.device_count()
  if batch_size < 0 or batch_size % devices:
    raise UserError(
      f"--batch_size: got {batch_size}, must be a multiple of the {devices} "
      "devices"
    )


def _problem_of(output) -> str:
  """Why this file cannot be made, or ""."""
  path = Path(output).expanduser()
  # In a Path, gs:// is gs:/, a folder here.
  if path.suffix not in feature_file.SUFFIXES or "://" in str(output):
    return (
      f"--output={output} must be a local file whose name ends in "
      f"{' or '.join(feature_file.SUFFIXES)}"
    )
  if jax.process_index() == 0 and os.path.lexists(path):
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
  """Holds the folder of parts; yields how many images are in it (host 0).

  An end without any row leaves no folder.
  """
  problem, lock, start, command = "", None, 0, parts / "command.json"
  if jax.process_index() == 0:
    with _writing(parts) as failed:
      parts.mkdir(parents=True, exist_ok=True)
      lock = (parts / "lock").open("a")
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        problem = _problem_of_parts(parts, command, about)
      except BlockingIOError:
        problem = f"{parts} is being written by another process"
      found = feature_file.parts(parts)
      start = max((stop for _, stop, _ in found), default=0)
    problem = "".join(failed) or problem
  try:
    hosts.agree(problem)
    yield start
  finally:
    if lock:
      if not problem and not feature_file.parts(parts):
        with contextlib.suppress(OSError):  # also where others keep files in it
          for file in (command, parts / "lock", *parts.glob("*.draft")):
            file.unlink(missing_ok=True)
          parts.rmdir()
      lock.close()


def _problem_of_parts(parts, command, about):
  """Notes the command, or says why rows that are there are not its own."""
  if feature_file.parts(parts):
    try:
      stored = json.loads(command.read_text())
      differ = sorted(k for k in about if about[k] != stored.get(k))
    except (ValueError, AttributeError, OSError):
      return f"{command} is damaged; give another --output, or remove {parts}"
    if differ:
      other = ", ".join(differ).replace("fingerprint", "files of --data")
      return (
        f"{parts} has the first part of another command's result (other: "
        f"{other}); give another --output, or remove it"
      )
  else:  # whatever an earlier start has left: there is no row of it
    write_whole(command, json.dumps(about))
  return ""


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
    if any(map(len, held.get("files", ()))):  # nowhere but on the writer
      with _writing(parts) as failed:
        feature_file.write_part(parts, first, stop, held)
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


def _assemble(output, parts, label_names, about) -> tuple[int, int]:
  """Joins the parts to one file; returns the shape of its features."""
  draft = parts / "whole"
  shape = feature_file.write(
    draft,
    [file for _, _, file in feature_file.parts(parts)],
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
  with errors.ending():
    cli.setup()
    with hosts.together():
      embed(**vars(args))


if __name__ == "__main__":
  main()
