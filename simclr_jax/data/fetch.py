"""Reading images that may be damaged."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from simclr_jax.config import UserError, nearest
from simclr_jax.sources import Source

# What happens at a damaged image: an error; the next good image of a seeded
# order in its place (training); nothing in its place (evaluation).
ON_ERROR = ("raise", "skip", "drop")


def check_on_error(on_error: str) -> None:
  """Raises UserError for what is not in ON_ERROR."""
  if on_error not in ON_ERROR:
    raise UserError(
      f'on_error must be one of {", ".join(ON_ERROR)}; got "{on_error}"'
      f"{nearest(str(on_error), ON_ERROR)}"
    )


def fetch_all(
  source: Source, indices: Sequence[int], *, max_size: int
) -> list[tuple[np.ndarray, int]]:
  """As `source.fetch`; the error says what can be done about it."""
  try:
    return source.fetch(indices, max_size=max_size)
  except UserError as error:
    raise UserError(
      f"{str(error).rstrip('.')}; mend or remove it, or set data.on_error=skip."
    ) from error


def fetch_each(
  source: Source, indices: Sequence[int], *, max_size: int
) -> list[tuple[np.ndarray, int] | UserError]:
  """As `source.fetch`, with the error in the place of a damaged image."""
  try:
    return source.fetch_each(indices, max_size=max_size)
  except UserError as error:  # One cannot be read: which?
    if len(indices) == 1:
      return [error]
  return [fetch_each(source, [i], max_size=max_size)[0] for i in indices]


@functools.lru_cache(maxsize=2)
def replacement_order(seed: int, num_examples: int) -> np.ndarray:
  """Of all images: the next good one after a damaged one takes its place."""
  # Three numbers: no epoch of the training order is drawn from the same.
  return np.random.default_rng((seed, 0, 1)).permutation(num_examples)


def replacement(
  source: Source,
  index: int,
  *,
  seed: int,
  max_size: int,
  known: Callable[[int], bool] = lambda index: True,
) -> tuple[int, np.ndarray, int]:
  """The next good image after a damaged one in an order drawn from the seed.

  Args:
    source: a `Source`.
    index: of the damaged image.
    seed: of the order.
    max_size: as in `source.fetch`.
    known: index -> False where the image is known to be damaged.

  Returns:
    (its index, image, label).

  Raises:
    UserError: none is good.
  """
  order = replacement_order(seed, len(source))
  start = int(np.flatnonzero(order == index)[0])
  for candidate in np.roll(order, -start)[1:].tolist():
    if known(candidate):
      (found,) = fetch_each(source, [candidate], max_size=max_size)
      if not isinstance(found, UserError):
        return candidate, *found
  raise UserError(
    f"none of the {len(source)} images of {source.name} {source.split} can be "
    "read."
  )
