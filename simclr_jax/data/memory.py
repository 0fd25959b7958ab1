"""Datasets that fit the memory: decoded once, gathered by index."""

import concurrent.futures
import dataclasses
import math
import os
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from simclr_jax import config
from simclr_jax.data import cache, fetch
from simclr_jax.data.stream import Streamed
from simclr_jax.sources import Source, workers

# Examples that one thread reads and decodes at a time.
_CHUNK = 256
# What was decoded faster than this is not kept on disk (docs/data.md says so).
_CACHE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Decoded images in memory, each in the top left of a square canvas.

  `train_batches` and `eval_batches` use only its `len` and `gather`.

  Attributes:
    images: uint8 [N, S, S, C]; zeros outside an image's size.
    sizes: int32 [N, 2], each image's true height and width, at most S.
    labels: int32 [N], -1 where unknown.
    label_names: tuple of class names.
    replaced: bool [N], where another image is in the place of a damaged one;
      None where damage is an error.
    own_labels: int32 [N], those of the source, also of damaged images; None
      where `labels` are.
    seed: of the order that replacements come from.
  """

  images: np.ndarray = dataclasses.field(repr=False)
  sizes: np.ndarray = dataclasses.field(repr=False)
  labels: np.ndarray = dataclasses.field(repr=False)
  label_names: tuple[str, ...]
  replaced: np.ndarray | None = dataclasses.field(default=None, repr=False)
  own_labels: np.ndarray | None = dataclasses.field(default=None, repr=False)
  seed: int = 0

  @property
  def num_classes(self) -> int:
    """Number of class names; 0 for a dataset without labels."""
    return len(self.label_names)

  @property
  def channels(self) -> int:
    """1 or 3."""
    return self.images.shape[-1]

  @property
  def listed(self) -> np.ndarray:
    """int32 [N], labels known before any damage, to choose from."""
    return self.labels if self.own_labels is None else self.own_labels

  def __len__(self):
    return len(self.images)

  def select(self, indices: np.ndarray) -> "Dataset":
    """The dataset of these examples alone (a copy), in this order.

    Damaged images are replaced by others of these, where one is good.
    """
    names = ("images", "sizes", "labels", "replaced", "own_labels")
    arrays = {name: getattr(self, name) for name in names}
    part = dataclasses.replace(
      self,
      **{k: array[indices] for k, array in arrays.items() if array is not None},
    )
    damaged, instead = part._replacements()
    part.images[damaged] = part.images[instead]
    part.sizes[damaged] = part.sizes[instead]
    part.labels[damaged] = part.listed[instead]
    return part

  def with_labels(self, labels: np.ndarray) -> "Dataset":
    """The same images with others in the place of `listed`, int32 [N]."""
    damaged, instead = self._replacements()
    shown = labels.copy()
    shown[damaged] = labels[instead]
    return dataclasses.replace(self, labels=shown, own_labels=labels)

  def _replacements(self):
    """Indices of damaged images, and of those that `fetch` puts there."""
    if self.replaced is None or self.replaced.all():
      return np.zeros((2, 0), np.int64)
    order = fetch.replacement_order(self.seed, len(self))
    damaged = np.flatnonzero(self.replaced[order])
    good = np.flatnonzero(~self.replaced[order])
    after = good[np.searchsorted(good, damaged) % len(good)]
    return order[damaged], order[after]

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """indices [n] -> {"image": uint8 [n, S, S, C], "label", "size"}.

    With "replaced", bool [n], where `replaced` is not None.
    """
    # One row an image: NumPy then copies each image in one piece.
    rows = self.images.reshape(len(self), -1)
    images = rows.take(indices, axis=0)
    batch = {
      "image": images.reshape(-1, *self.images.shape[1:]),
      "label": self.labels[indices],
      "size": self.sizes[indices],
    }
    if self.replaced is not None:
      batch["replaced"] = self.replaced[indices]
    return batch


def open_dataset(
  source: Source,
  *,
  canvas_size: int,
  memory_gib: float = 0.0,
  beside: Dataset | Streamed | None = None,
  cache_dir: str | os.PathLike = "",
  on_error: str = "raise",
  seed: int = 0,
  on_skip: Callable[[str], object] | None = None,
  progress: Callable[[int, int], object] | None = None,
) -> Dataset | Streamed:
  """Opens a source for training or evaluation: in memory where it fits.

  Args:
    source: a `sources.Source`.
    canvas_size: S, the side of the square canvas in pixels.
    memory_gib: images of up to this many GiB (2**30 bytes) on their canvas
      are kept in memory by each process; 0 is `budget_bytes`.
    beside: an open dataset of this process; where it is in memory, its images
      count as well.
    cache_dir: a local folder where decoded images (and the labels of streamed
      records) are kept for the next start, by content; "" for nowhere.
    on_error: at a damaged image, "raise" an error that names it; "skip" it:
      the next good image of an order drawn from the seed is in its place;
      "drop" it, for evaluation: it is left out.
    seed: of that order, not negative.
    on_skip: called with a line about each damaged image, from any thread.
    progress: called as progress(done, total) now and then.

  Returns:
    A `Dataset`, or a `Streamed` one of the same use.

  Raises:
    config.UserError: see `load`.

  >>> from simclr_jax import sources
  >>> source = sources.make_source("digits", split="test")
  >>> len(open_dataset(source, canvas_size=8))
  360
  """
  fetch.check_on_error(on_error)
  shape = (len(source), canvas_size, canvas_size, source.channels)
  size = math.prod(shape)
  if isinstance(beside, Dataset):
    size += beside.images.nbytes
  options = {
    "canvas_size": canvas_size,
    "on_error": on_error,
    "seed": seed,
    "on_skip": on_skip,
  }
  if size > (memory_gib * 2**30 or budget_bytes()):
    return Streamed(source, **options, cache_dir=cache_dir)
  folder = cache.images_folder(source, canvas_size, cache_dir)
  if folder and (kept := cache.read_images(folder, shape)):
    if on_error == "skip":
      kept["replaced"] = np.zeros(len(source), bool)
    return Dataset(**kept, label_names=source.label_names)
  begin = time.perf_counter()
  dataset = load(source, **options, progress=progress)
  damaged = len(dataset) < len(source) or (
    dataset.replaced is not None and dataset.replaced.any()
  )
  # Damage is told at each start, so it is not kept.
  if folder and not damaged and time.perf_counter() - begin > _CACHE_SECONDS:
    cache.write_images(folder, vars(dataset))
  return dataset


def load(
  source: Source,
  *,
  canvas_size: int,
  on_error: str = "raise",
  seed: int = 0,
  on_skip: Callable[[str], object] | None = None,
  progress: Callable[[int, int], object] | None = None,
) -> Dataset:
  """Reads and decodes a whole source into memory, once.

  Args:
    source: a `sources.Source`.
    canvas_size: S, the side of the square canvas in pixels. Larger images
      are shrunk to fit it, keeping their aspect; smaller ones keep their size.
    on_error: "raise", "skip" or "drop", as in `open_dataset`.
    seed: of the order that replacements come from.
    on_skip: called with a line about each damaged image.
    progress: called as progress(done, total) now and then, if given.

  Returns:
    A `Dataset` of N * S * S * C bytes.

  Raises:
    config.UserError: no such `on_error`, a damaged image (names the record or
      file) or none that is good, or more than fits this machine's memory.

  >>> from simclr_jax import sources
  >>> source = sources.make_source("digits", split="test")
  >>> load(source, canvas_size=8).images.shape
  (360, 8, 8, 1)
  """
  fetch.check_on_error(on_error)
  if canvas_size < 1:
    raise ValueError(f"canvas_size is {canvas_size}; it must be 1 or more")
  total = len(source)
  shape = (total, canvas_size, canvas_size, source.channels)
  memory = memory_bytes()
  if math.prod(shape) > memory:
    raise config.UserError(
      f"{source.name} {source.split} takes {math.prod(shape) / 2**30:.1f} GiB "
      f"on a canvas of {canvas_size} pixels, and this machine has "
      f"{memory / 2**30:.1f}; lower data.canvas_size or take a slice of it."
    )
  images = np.zeros(shape, np.uint8)
  sizes = np.zeros((total, 2), np.int32)
  labels = np.full(total, -1, np.int32)
  damaged: dict[int, config.UserError] = {}

  def fill(start):
    indices = range(start, min(start + _CHUNK, total))
    if on_error == "raise":
      examples = fetch.fetch_all(source, indices, max_size=canvas_size)
    else:
      examples = fetch.fetch_each(source, indices, max_size=canvas_size)
    for i, example in zip(indices, examples, strict=True):
      if isinstance(example, config.UserError):
        damaged[i] = example
        labels[i] = _own_label(source, i)
        continue
      image, labels[i] = example
      height, width = sizes[i] = image.shape[:2]
      images[i, :height, :width] = image
    return len(indices)

  with workers.make_threads() as pool:
    futures = [pool.submit(fill, i) for i in range(0, total, _CHUNK)]
    try:
      done = 0
      for future in concurrent.futures.as_completed(futures):
        done += future.result()
        if progress:
          progress(done, total)
    finally:  # After an error or Ctrl-C, do not decode the rest first.
      pool.shutdown(cancel_futures=True)
  own_labels = labels.copy()
  for i in sorted(damaged):
    if on_skip:
      on_skip(str(damaged[i]))
    if on_error == "skip":
      j, _, labels[i] = fetch.replacement(
        source,
        i,
        seed=seed,
        max_size=canvas_size,
        known=lambda j: j not in damaged,
      )
      images[i], sizes[i] = images[j], sizes[j]
  dataset = Dataset(images, sizes, labels, source.label_names)
  if on_error == "skip":
    replaced = np.zeros(total, bool)
    replaced[list(damaged)] = True
    dataset = dataclasses.replace(
      dataset, replaced=replaced, own_labels=own_labels, seed=seed
    )
  if on_error == "drop" and damaged:
    dataset = dataset.select(np.setdiff1d(np.arange(total), list(damaged)))
  return dataset


def _own_label(source, index):
  """The label of a damaged image, -1 where its record cannot be read."""
  if source.labels is not None:
    return source.labels[index]
  try:
    return source.read([index])[0][1]
  except config.UserError:
    return -1


def memory_bytes() -> int:
  """Memory of this machine, or of the container that this runs in."""
  limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for file in ("memory.max", "memory/memory.limit_in_bytes"):
    try:
      limits.append(int(Path("/sys/fs/cgroup", file).read_text()))
    except (OSError, ValueError):  # No such file, or "max".
      continue
  return min(limits)


def budget_bytes() -> int:
  """Bytes of images that a process keeps in memory, unless it is told.

  Half of the memory, divided by the processes of this host; where hosts
  differ, the least, so that all keep or stream the same. Every process of a
  run must call it.

  >>> budget_bytes() <= memory_bytes() / 2
  True
  """
  here = np.array([[zlib.crc32(socket.gethostname().encode()), memory_bytes()]])
  if jax.distributed.is_initialized():  # jax.process_count() takes the GPU.
    # As bytes, because JAX would make them 32 bits wide.
    parts = multihost_utils.process_allgather(here.view(np.uint8)[0])
    here = parts.view(here.dtype)
  hosts, memory = here.T
  sharing = (hosts == hosts[:, None]).sum(axis=0)
  return int((memory // (2 * sharing)).min())
