"""Which of the labels to train on."""

from collections.abc import Sequence

import numpy as np

from simclr_jax import config


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
