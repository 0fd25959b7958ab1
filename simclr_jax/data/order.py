"""Which examples are in batch t, and on which host: functions of t alone."""

import functools
from collections.abc import Iterator

import numpy as np

from simclr_jax import config
from simclr_jax.data.memory import Dataset
from simclr_jax.data.stream import Streamed, ahead


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


def at_most(batch_size: int, *, num_examples: int, num_devices: int) -> int:
  """A batch size for evaluation, without what would be padding alone.

  Args:
    batch_size: that was asked for; no multiple of num_devices is left so.
    num_examples: of the dataset.
    num_devices: of all hosts.

  >>> at_most(10**12, num_examples=360, num_devices=8)
  360
  >>> at_most(64, num_examples=360, num_devices=8)
  64
  """
  if batch_size % num_devices:
    return batch_size
  whole = -(-max(num_examples, 1) // num_devices) * num_devices
  return min(batch_size, whole)


def _host_block(batch_size, process_index, process_count):
  """The slice of a global batch that belongs to one host."""
  if batch_size < 1:
    raise config.UserError(f"batch_size must be 1 or more, got {batch_size}.")
  if batch_size % process_count:
    raise config.UserError(
      f"batch_size is {batch_size}; it must be a multiple of the "
      f"{process_count} hosts."
    )
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)


def train_batches(
  dataset: Dataset | Streamed,
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
    dataset: a `Dataset` or `Streamed`, or what has `len` and `gather(indices)`.
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

  >>> from simclr_jax import data, sources
  >>> source = sources.make_source("digits", split="train")
  >>> batches = train_batches(
  ...   data.load(source, canvas_size=8),
  ...   seed=0,
  ...   batch_size=256,
  ...   start_step=0,
  ...   num_steps=2,
  ... )
  >>> [batch["image"].shape for batch in batches]
  [(256, 8, 8, 1), (256, 8, 8, 1)]
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

  # The checks above run at the call, not at the first next.
  return _started(dataset, batches())


def eval_batches(
  dataset: Dataset | Streamed,
  *,
  batch_size: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches that hold every example once, in order, for evaluation.

  All hosts get the same number of batches of the same shape. The last batch is
  filled up with the first example at weight 0.

  Args:
    dataset: a `Dataset` or `Streamed`, or what has `len` and `gather(indices)`.
    batch_size: of the global batch, a multiple of process_count.
    start: the first example.
    process_index: this host, from 0.
    process_count: number of hosts.

  Yields:
    As `train_batches`, and "weight": float32 [local], 1 for an example and 0
    for padding. An unlabelled example has weight 1 and label -1.

  >>> from simclr_jax import data, sources
  >>> source = sources.make_source("digits", split="test")
  >>> batches = eval_batches(data.load(source, canvas_size=8), batch_size=256)
  >>> [int(batch["weight"].sum()) for batch in batches]
  [256, 104]
  """
  block = _host_block(batch_size, process_index, process_count)

  def batches():
    for first in range(start, len(dataset), batch_size):
      positions = np.arange(first + block.start, first + block.stop)
      is_real = positions < len(dataset)
      batch = dataset.gather(np.where(is_real, positions, 0))
      yield {**batch, "weight": is_real.astype(np.float32)}

  return _started(dataset, batches())


def _started(dataset, batches):
  """Has a thread work ahead where a batch takes long."""
  return ahead(batches) if isinstance(dataset, Streamed) else batches
