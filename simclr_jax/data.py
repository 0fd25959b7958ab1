"""From a source to batches: which examples, in what order, on which host.

Batch t of a run is a pure function of (seed, t): nothing is stored, a run
resumes at any step, and it is the same batch for any number of hosts.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from simclr_jax import config
from simclr_jax.sources import Source

# Examples that one thread reads and decodes at a time.
_CHUNK = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Decoded images in memory, each in the top left of a square canvas.

  `train_batches` and `eval_batches` use only its `len` and `gather`.

  Attributes:
    images: uint8 [N, S, S, C]; zeros outside an image's size.
    sizes: int32 [N, 2], each image's true height and width, at most S.
    labels: int32 [N], -1 where unknown.
    label_names: tuple of class names.
  """

  images: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray
  label_names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """Number of class names; 0 for a dataset without labels."""
    return len(self.label_names)

  def __len__(self):
    return len(self.images)

  def select(self, indices: np.ndarray) -> "Dataset":
    """The dataset of these examples alone (a copy), in this order."""
    return dataclasses.replace(
      self,
      images=self.images[indices],
      sizes=self.sizes[indices],
      labels=self.labels[indices],
    )

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """indices [n] -> {"image": uint8 [n, S, S, C], "label", "size"}."""
    # One row an image: NumPy then copies each image in one piece.
    rows = self.images.reshape(len(self), -1)
    images = rows.take(indices, axis=0)
    return {
      "image": images.reshape(-1, *self.images.shape[1:]),
      "label": self.labels[indices],
      "size": self.sizes[indices],
    }


def load(
  source: Source,
  *,
  canvas_size: int,
  num_threads: int | None = None,
  progress: Callable[[int, int], object] | None = None,
) -> Dataset:
  """Reads and decodes a whole source into memory, once.

  Args:
    source: a `sources.Source`.
    canvas_size: S, the side of the square canvas in pixels. Larger images
      are shrunk to fit it, keeping their aspect; smaller ones keep their size.
    num_threads: decoding threads; None is one a core.
    progress: called as progress(done, total) now and then, if given.

  Returns:
    A `Dataset` of N * S * S * C bytes.

  Raises:
    config.UserError: a damaged image (names the record or file), or more
      than fits this machine's memory.
  """
  if canvas_size < 1:
    raise ValueError(f"canvas_size is {canvas_size}; it must be 1 or more")
  total = len(source)
  shape = (total, canvas_size, canvas_size, source.channels)
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if math.prod(shape) > memory:
    raise config.UserError(
      f"{source.name} {source.split} takes {math.prod(shape) / 2**30:.1f} GiB "
      f"on a canvas of {canvas_size} pixels, and this machine has "
      f"{memory / 2**30:.1f}; lower data.canvas_size or take a slice of it."
    )
  images = np.zeros(shape, np.uint8)
  sizes = np.zeros((total, 2), np.int32)
  labels = np.full(total, -1, np.int32)

  def fill(start):
    indices = range(start, min(start + _CHUNK, total))
    examples = source.fetch(indices, max_size=canvas_size)
    for i, (image, label) in zip(indices, examples, strict=True):
      height, width = image.shape[:2]
      images[i, :height, :width] = image
      sizes[i] = height, width
      labels[i] = label
    return len(indices)

  with concurrent.futures.ThreadPoolExecutor(
    num_threads or os.cpu_count()
  ) as pool:
    futures = [pool.submit(fill, i) for i in range(0, total, _CHUNK)]
    try:
      done = 0
      for future in concurrent.futures.as_completed(futures):
        done += future.result()
        if progress:
          progress(done, total)
    finally:  # After an error or Ctrl-C, do not decode the rest first.
      pool.shutdown(cancel_futures=True)
  return Dataset(images, sizes, labels, source.label_names)


# -- order --------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _permutation(seed, epoch, num_examples):
  return np.random.default_rng((seed, epoch)).permutation(num_examples)


def batch_indices(
  *, seed: int, step: int, batch_size: int, num_examples: int
) -> np.ndarray:
  """Which examples are in global batch `step`: int64 [batch_size].

  The stream is endless: epoch e is a permutation drawn from (seed, e), the
  epochs follow each other, and batch t is positions t * batch_size to
  (t + 1) * batch_size. No example comes twice within an epoch and none is
  dropped at its end; a batch may span two epochs, or many where there are
  fewer examples than a batch.

  Args:
    seed: int, not negative.
    step: t, from 0.
    batch_size: of the global batch.
    num_examples: of the dataset, 1 or more.

  Example:
    >>> batch_indices(seed=0, step=1, batch_size=3, num_examples=4).shape
    (3,)
  """
  position = step * batch_size
  parts, missing = [], batch_size
  while missing:
    epoch, offset = divmod(position, num_examples)
    part = _permutation(seed, epoch, num_examples)[offset : offset + missing]
    parts.append(part)
    position += len(part)
    missing -= len(part)
  return np.concatenate(parts)


def _host_block(batch_size, process_index, process_count):
  """The slice of a global batch that belongs to one host."""
  if batch_size % process_count:
    raise config.UserError(
      f"batch_size is {batch_size}; it must be a multiple of the "
      f"{process_count} hosts."
    )
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)


def train_batches(
  dataset: Dataset,
  *,
  seed: int,
  batch_size: int,
  start_step: int,
  num_steps: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's part of global batches start_step to num_steps - 1.

  Args:
    dataset: a `Dataset`, or anything with `len` and `gather(indices)`.
    seed: of the order.
    batch_size: of the global batch, a multiple of process_count.
    start_step: the first step, the number of steps done before.
    num_steps: the number of steps of the whole run.
    process_index: this host, from 0.
    process_count: number of hosts.

  Yields:
    {"image": uint8 [local, S, S, C], "label": int32 [local], -1 unknown,
    "size": int32 [local, 2] height and width}, where local is batch_size /
    process_count; the hosts' parts in order are the global batch.
  """
  block = _host_block(batch_size, process_index, process_count)

  def batches():
    for step in range(start_step, num_steps):
      indices = batch_indices(
        seed=seed,
        step=step,
        batch_size=batch_size,
        num_examples=len(dataset),
      )
      yield dataset.gather(indices[block])

  return batches()  # The checks above run at the call, not at the first next.


def eval_batches(
  dataset: Dataset,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches that hold every example once, in order, for evaluation.

  All hosts get the same number of batches of the same shape; what is missing
  at the end is the first example with weight 0.

  Args:
    dataset: a `Dataset`, or anything with `len` and `gather(indices)`.
    batch_size: of the global batch, a multiple of process_count.
    process_index: this host, from 0.
    process_count: number of hosts.

  Yields:
    As `train_batches`, and "weight": float32 [local], 1 for an example and 0
    for padding. An unlabelled example has weight 1 and label -1.
  """
  block = _host_block(batch_size, process_index, process_count)

  def batches():
    for start in range(0, len(dataset), batch_size):
      positions = np.arange(start, start + batch_size)[block]
      is_real = positions < len(dataset)
      batch = dataset.gather(np.where(is_real, positions, 0))
      yield {**batch, "weight": is_real.astype(np.float32)}

  return batches()


# -- few labels ---------------------------------------------------------------


def label_subset(
  labels: np.ndarray,
  *,
  percent: float | None = None,
  per_class: int | None = None,
  seed: int,
  label_names: Sequence[str] | None = None,
) -> np.ndarray:
  """Chooses which labels to use: seeded, class-balanced, nested.

  One order of all labelled examples is drawn from the seed: one of each
  class, then a second of each class, and so on. A subset is the start of it,
  so that 1% is part of 10%, the classes differ by one at most while they
  last, and every class has one at least. For 1% of ImageNet's 1,281,167
  labels this gives 189 classes 12 images and 811 classes 13, as in the lists
  of SimCLRv2 (1percent.txt).

  Args:
    labels: int [N], -1 where unknown; those are never chosen.
    percent: of the labelled examples, above 0 to 100; rounded down, but at
      least one a class.
    per_class: examples a class; give either this or percent.
    seed: int, not negative.
    label_names: class names, used in messages; where given, every class must
      have enough labels, else every class that occurs.

  Returns:
    Sorted int64 indices into labels.

  Raises:
    config.UserError: no labels, a percentage out of range, or a class with
      fewer than per_class labels.

  Example:
    >>> label_subset(np.array([0, 1, -1, 0, 1]), per_class=1, seed=0).shape
    (2,)
  """
  if (percent is None) == (per_class is None):
    raise ValueError("give either percent or per_class")
  labels = np.asarray(labels)
  labelled = np.flatnonzero(labels >= 0)
  if not len(labelled):
    raise config.UserError("the dataset has no labelled image.")
  classes, counts = np.unique(labels[labelled], return_counts=True)
  if percent is not None:
    if not 0 < percent <= 100:
      raise config.UserError(
        f"label_percent is {percent}; it must be above 0 and at most 100."
      )
    # The small term keeps 7% of 100 at 7 (7 * 100 / 100 may round below).
    total = max(len(classes), int(percent * len(labelled) / 100 + 1e-6))
  else:
    assert per_class is not None  # Checked above.
    if per_class < 1:
      raise config.UserError(
        f"labels_per_class is {per_class}; it must be 1 or more."
      )
    count_of = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    names = dict(enumerate(label_names or ())) or {k: str(k) for k in count_of}
    fewest, name = min((count_of.get(k, 0), names[k]) for k in names)
    if fewest < per_class:
      raise config.UserError(
        f'labels_per_class is {per_class}, but class "{name}" has {fewest} '
        "labelled images; ask for at most that many."
      )
    total = per_class * len(classes)
  rng = np.random.default_rng(seed)
  class_order = np.empty(classes.max() + 1, np.int64)
  class_order[classes] = rng.permutation(len(classes))
  shuffled = rng.permutation(labelled)
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
  # The rank of an example among those of its class.
  rank = np.arange(len(by_class)) - np.repeat(
    np.cumsum(counts) - counts, counts
  )
  order = np.lexsort((class_order[labels[by_class]], rank))
  return np.sort(by_class[order[:total]])
