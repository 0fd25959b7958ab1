"""The handwritten digits that scikit-learn bundles: 1,797 real scans."""

import hashlib

import numpy as np

from simclr_jax import config
from simclr_jax.sources.source import Source


def open_digits(*, split: str, seed: int) -> Source:
  """The test set of the UCI optical digits, split here into train and test."""
  import sklearn.datasets  # Takes a second to import.

  if split not in ("train", "test"):
    raise config.UserError(
      f'digits has no split "{split}"; there are: train, test.'
    )
  pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
  pixels = pixels.reshape(-1, 8, 8, 1)
  # Ink is counted from 0 to 16 in each pixel.
  images = np.rint(pixels * (255 / 16)).astype(np.uint8)
  is_test = _stratified_mask(labels, num_chosen=360, seed=seed)
  chosen = np.flatnonzero(is_test if split == "test" else ~is_test)
  images, labels = images[chosen], labels[chosen].astype(np.int32)
  digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
  return Source(
    name="digits",
    split=split,
    num_examples=len(chosen),
    read=lambda indices: [(images[i], int(labels[i])) for i in indices],
    describe=lambda index: f"digits {split} image {index}",
    label_names=tuple("0123456789"),
    channels=1,
    fingerprint=f"digits:{split}:{len(chosen)}:{digest[:16]}",
    labels=labels,
  )


def _stratified_mask(labels, *, num_chosen, seed):
  """bool [n]: num_chosen examples, each class by its share of all examples.

  Shares are rounded down, and the classes with the largest remainders give
  one more each.
  """
  classes, counts = np.unique(labels, return_counts=True)
  shares = counts * num_chosen / len(labels)
  quotas = np.floor(shares).astype(int)
  by_remainder = np.argsort(quotas - shares, kind="stable")
  quotas[by_remainder[: num_chosen - quotas.sum()]] += 1
  rng = np.random.default_rng(seed)
  mask = np.zeros(len(labels), bool)
  for label, quota in zip(classes, quotas, strict=True):
    mask[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
  return mask
