"""What every dataset looks like to the rest of the package."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from simclr_jax import config
from simclr_jax.sources.workers import decode_all


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Images and labels by index; what every dataset looks like to `data`.

  Attributes:
    name: what the user wrote, such as "tfds:cifar10".
    split: the split or split expression, such as "train[:10%]".
    num_examples: how many images there are; also `len(source)`.
    read: indices -> list of (record, label): a record is an encoded image
      (bytes) or pixels (uint8 [h, w, C]); label is an int, -1 where unknown.
    describe: index -> the record's or file's name for messages.
    label_names: class names; the label k is label_names[k].
    channels: 1 or 3; `fetch` returns that many.
    fingerprint: a string that changes with the content, for caches.
    labels: int32 [num_examples] where known without reading all records; then
      these count, not those that `read` returns.
    note: a line about what was understood, for the user; "" for none.
    read_ids: indices -> list of (id, label): what the dataset itself calls a
      record, such as a file's name; None where it has no such names.
  """

  name: str
  split: str
  num_examples: int
  read: Callable[[Sequence[int]], list[tuple[bytes | np.ndarray, int]]]
  describe: Callable[[int], str]
  label_names: tuple[str, ...]
  channels: int
  fingerprint: str
  labels: np.ndarray | None = None
  note: str = ""
  read_ids: Callable[[Sequence[int]], list[tuple[str, int]]] | None = None

  @property
  def num_classes(self) -> int:
    """Number of class names; 0 for a dataset without labels."""
    return len(self.label_names)

  def __len__(self):
    return self.num_examples

  def __getitem__(self, index):
    return self.fetch([index])[0]

  def __getitems__(self, indices):
    return self.fetch(indices)

  def select(self, indices: np.ndarray) -> "Source":
    """The source of these examples alone, in this order."""
    indices = np.asarray(indices)
    digest = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()

    def of_these(read):
      return lambda chosen: read([int(indices[i]) for i in chosen])

    return dataclasses.replace(
      self,
      num_examples=len(indices),
      read=of_these(self.read),
      read_ids=self.read_ids and of_these(self.read_ids),
      describe=lambda index: self.describe(int(indices[index])),
      fingerprint=f"{self.fingerprint}:{len(indices)}:{digest[:16]}",
      labels=None if self.labels is None else self.labels[indices],
    )

  def fetch(
    self, indices: Sequence[int], *, max_size: int = 0
  ) -> list[tuple[np.ndarray, int]]:
    """Reads and decodes some images; safe to call from several threads.

    Args:
      indices: ints in [0, num_examples).
      max_size: images are shrunk, keeping their aspect, until no side is
        longer than this (pixels); 0 leaves them as they are.

    Returns:
      A list of (image uint8 [h, w, channels], label int, -1 unknown).

    Raises:
      config.UserError: an image is damaged; names the record or file.
    """
    examples = []
    for example in self.fetch_each(indices, max_size=max_size):
      if isinstance(example, config.UserError):
        raise example
      examples.append(example)
    return examples

  def fetch_each(
    self, indices: Sequence[int], *, max_size: int = 0
  ) -> list[tuple[np.ndarray, int] | config.UserError]:
    """As `fetch`, with the error in the place of an image that is damaged.

    Raises:
      config.UserError: one of them cannot be read at all.
    """
    indices = [int(i) for i in indices]
    records = self.read(indices)
    images = decode_all(
      [record for record, _ in records],
      channels=self.channels,
      max_size=max_size,
    )
    examples: list[tuple[np.ndarray, int] | config.UserError] = []
    for index, (_, label), image in zip(indices, records, images, strict=True):
      if isinstance(image, ValueError):
        examples.append(config.UserError(f"{self.describe(index)}: {image}"))
        continue
      if self.labels is not None:
        label = int(self.labels[index])
      examples.append((image, label))
    return examples
