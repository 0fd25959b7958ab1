"""Datasets larger than the memory: decoded as they are needed."""

import dataclasses
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from simclr_jax.config import UserError
from simclr_jax.data import fetch
from simclr_jax.data.scan import scan_labels
from simclr_jax.sources import Source, workers

# Examples that one thread reads and decodes at a time, at least and at most.
_CHUNKS = 4, 32


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
  """Images that are read and decoded by each `gather`; see `Dataset`.

  Attributes:
    source: where they are.
    canvas_size: S, the side of the square canvas in pixels.
    on_error: "raise", "skip" or "drop", see `open_dataset`. A dropped image
      is gathered black and with label -1, so that no measure counts it.
    seed: of the order that replacements come from.
    on_skip: called with a line about each damaged image, from any thread.
    cache_dir: where labels are kept that had to be read with their records;
      "" for nowhere.
  """

  source: Source
  canvas_size: int
  on_error: str = "raise"
  seed: int = 0
  on_skip: Callable[[str], object] | None = None
  cache_dir: str | os.PathLike = ""

  @property
  def label_names(self) -> tuple[str, ...]:
    """Class names."""
    return self.source.label_names

  @property
  def num_classes(self) -> int:
    """Number of class names; 0 for a dataset without labels."""
    return self.source.num_classes

  @property
  def channels(self) -> int:
    """1 or 3."""
    return self.source.channels

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int32 [N], -1 where unknown; may have to read all records, once.

    Damaged images have the labels that the source gives them until
    `note_labels` says what was gathered in their place.
    """
    if self.source.labels is not None:
      return np.array(self.source.labels, np.int32)
    if not self.num_classes:
      return np.full(len(self), -1, np.int32)
    return scan_labels(self.source, self.cache_dir)

  @property
  def listed(self) -> np.ndarray:
    """int32 [N], labels known before any damage, to choose from."""
    return self.labels

  def __len__(self):
    return len(self.source)

  def select(self, indices: np.ndarray) -> "Streamed":
    """The dataset of these examples alone, in this order."""
    source = self.source
    if "labels" in vars(self):  # They may have been read from the records.
      source = dataclasses.replace(source, labels=self.labels)
    return dataclasses.replace(self, source=source.select(indices))

  def with_labels(self, labels: np.ndarray) -> "Streamed":
    """The same images with other labels, int32 [N]."""
    source = dataclasses.replace(self.source, labels=labels)
    return dataclasses.replace(self, source=source)

  def note_labels(self, labels: np.ndarray) -> None:
    """Takes int32 [N] for `labels`: what `gather` gave, from all hosts.

    A host knows of damage only in the images that it has read itself.
    """
    vars(self)["labels"] = labels

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """indices [n] -> {"image": uint8 [n, S, S, C], "label", "size"}.

    With "replaced", bool [n], where damaged images are skipped.

    Raises:
      UserError: a damaged image (names it), where `on_error` is "raise".
    """
    n, side = len(indices), self.canvas_size
    batch: dict[str, np.ndarray] = {
      "image": np.zeros((n, side, side, self.channels), np.uint8),
      "label": np.full(n, -1, np.int32),
      "size": np.full((n, 2), side, np.int32),
    }
    if self.on_error == "skip":
      batch["replaced"] = np.zeros(n, bool)
    # Small, so that all threads end a batch at about the same time.
    chunk = min(max(-(-n // (8 * workers.num_cores())), _CHUNKS[0]), _CHUNKS[1])

    def fill(start):
      part = [int(i) for i in indices[start : start + chunk]]
      if self.on_error == "raise":
        examples = fetch.fetch_all(self.source, part, max_size=side)
      else:
        examples = fetch.fetch_each(self.source, part, max_size=side)
      for row, (i, example) in enumerate(
        zip(part, examples, strict=True), start=start
      ):
        if isinstance(example, UserError):
          example = self._instead(i, example)
          if example is None:
            continue
          batch["replaced"][row] = True
        image, batch["label"][row] = example
        height, width = batch["size"][row] = image.shape[:2]
        batch["image"][row, :height, :width] = image

    for _ in workers.threads().map(fill, range(0, n, chunk)):
      pass
    return batch

  def _instead(self, index, error):
    """(image, label) in the place of a damaged image, None for nothing."""
    if self.on_skip:
      self.on_skip(str(error))
    if self.on_error == "drop":
      return None
    return fetch.replacement(
      self.source, index, seed=self.seed, max_size=self.canvas_size
    )[1:]


def ahead(items: Iterable, *, size: int = 2) -> Iterator:
  """Yields `items`, which a thread makes up to `size` ahead.

  An exception of `items` is raised here in its place. Closing the iterator
  (or dropping it) ends the thread, once the item in work is made.

  Args:
    items: made in that thread alone.
    size: items waiting or in work, 1 or more.

  >>> list(ahead(range(3)))
  [0, 1, 2]
  """
  # One more is in the thread's hands.
  slots: queue.Queue = queue.Queue(maxsize=max(1, size - 1))
  stop = threading.Event()
  end = object()

  def work():
    last = (end, None)
    try:
      for item in items:
        slots.put((item, None))
        if stop.is_set():
          return
    except BaseException as error:
      last = (end, error)
    slots.put(last)

  thread = threading.Thread(target=work, name="batches", daemon=True)
  thread.start()
  try:
    while True:
      item, error = slots.get()
      if error is not None:
        raise error
      if item is end:
        return
      yield item
  finally:
    stop.set()
    while thread.is_alive():  # It may wait for a place to put its item.
      try:
        slots.get(timeout=0.01)
      except queue.Empty:
        continue
