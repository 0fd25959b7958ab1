"""The training and evaluation images of a run, as its config names them."""

import contextlib
import dataclasses
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from tqdm import auto

from simclr_jax import sources, storage
from simclr_jax.config import UserError
from simclr_jax.data.memory import Dataset, open_dataset
from simclr_jax.data.scan import with_listed_labels
from simclr_jax.data.stream import Streamed


def open_splits(
  config, workdir, *, channels: int | None = None
) -> tuple[Dataset | Streamed, Dataset | Streamed | None]:
  """Opens the training and evaluation images; None without the latter.

  To fine-tune, only images with a label are taken. Decoded images, where that
  took more than a second, are kept in `decoded_images` beside `workdir`, where
  all stages of an experiment find them; damaged ones that are skipped are
  listed in skipped.txt in it.

  Args:
    config: of a stage; `data`, `seed` and `stage` are read.
    workdir: the run's directory.
    channels: of the network; None: as the images have them.

  Raises:
    UserError: a mistake in `config.data`, or a damaged image.

  >>> from simclr_jax import cli
  >>> config = cli.load_recipe("digits", stage="pretrain")
  >>> train, test = open_splits(config, "runs/new")  # doctest: +ELLIPSIS
  pretrain: images of 1 channel: saturation, ...
  >>> len(train), len(test)
  (1437, 360)
  """
  train = _source(config, config.data.split, channels)
  if train.note:
    print(train.note, flush=True)
  if config.stage == "pretrain" and train.channels != 3:
    print(
      f"pretrain: images of {train.channels} channel: saturation, hue and "
      "grayscale need RGB and are left out of the views",
      flush=True,
    )
  if config.data.label_ids:
    train = with_listed_labels(
      train, config.data.label_ids, cache_dir=_cache_dir(workdir)
    )
    assert train.labels is not None
    print(
      f"{train.name} {train.split}: {np.sum(train.labels >= 0)} of "
      f"{len(train)} images are labelled, those in {config.data.label_ids}.",
      flush=True,
    )
  if config.stage == "finetune" and train.labels is not None:
    labelled = np.flatnonzero(train.labels >= 0)
    if not len(labelled):
      raise UserError(
        f'{train.name} has no labelled image in split "{train.split}"'
        f"{labels_needed(train.name)}"
      )
    if len(labelled) < len(train):
      train = train.select(labelled)
  on_skip = _skipped_list(workdir)
  skip = config.data.on_error == "skip"

  def opened(source, on_error, beside=None):
    with _progress(f"reading {source.name} {source.split}") as progress:
      dataset = open_dataset(
        source,
        beside=beside,
        canvas_size=config.data.canvas_size,
        memory_gib=config.data.memory_gib,
        cache_dir=_cache_dir(workdir),
        on_error=on_error if skip else "raise",
        seed=config.seed,
        on_skip=on_skip,
        progress=progress,
      )
    if isinstance(dataset, Streamed):
      print(
        f"{source.name} {source.split}: {len(source)} images are streamed; on "
        f"canvases of {config.data.canvas_size} pixels they exceed "
        "config.data.memory_gib.",
        flush=True,
      )
    return dataset

  opened_train, opened_test = opened(train, "skip"), None
  if config.data.eval_split and train.num_classes:
    try:
      test = _source(config, config.data.eval_split, channels)
    except UserError as error:  # The split, as all else was right for `train`.
      raise UserError(
        f"config.data.eval_split: {str(error).rstrip('.')}; give another, or "
        "nothing (config.data.eval_split=) not to evaluate."
      ) from None
    opened_test = opened(test, "drop", beside=opened_train)
    if not np.any(opened_test.labels >= 0):
      raise UserError(
        f'config.data.eval_split: "{test.split}" of {test.name} has no '
        'labelled image to evaluate on; give another, or "" for none.'
      )
  return opened_train, opened_test


def _source(config, split, channels):
  source = sources.make_source(
    config.data.name,
    split=split,
    data_dir=config.data.data_dir,
    labels=config.data.labels,
    eval_fraction=config.data.eval_fraction,
  )
  return dataclasses.replace(source, channels=channels or source.channels)


def labels_needed(name: str) -> str:
  """Ends a sentence about a dataset without labels: how to give some.

  >>> labels_needed("tfds:mnist")
  '.'
  """
  if not name.startswith("folder:"):
    return "."
  return (
    "; write a labels.csv (columns file,label) into it, or sort images into a "
    "folder for each class."
  )


def _cache_dir(workdir):
  """A folder beside the run, "" where that is not a local disk."""
  if "://" in str(workdir):
    return ""
  return Path(workdir).expanduser().absolute().parent / "decoded_images"


@contextlib.contextmanager
def _progress(title):
  """A function for `open_dataset` that shows a bar in a terminal."""
  if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
    yield None
    return
  with auto.tqdm(desc=title, unit="image", dynamic_ncols=True) as bar:

    def progress(done, total):
      bar.total = total
      bar.update(done - bar.n)

    yield progress


def _skipped_list(workdir):
  """A function that adds a line to skipped.txt of the run, each line once."""
  index = jax.process_index()
  file = storage.root(workdir) / f"skipped{f'_{index}' if index else ''}.txt"
  lock = threading.Lock()
  lines: list[str] = []

  def add(line):
    with lock:
      if not lines and file.exists():
        lines.extend(file.read_text().splitlines())
      if line not in lines:
        lines.append(line)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
        print(f"skipped: {line}", flush=True)

  return add
