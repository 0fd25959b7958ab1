"""Trees of weights: what tells two apart, and how one is put into another."""

import difflib
import hashlib

import jax
import numpy as np
from flax import traverse_util

from simclr_jax.config import UserError


def fingerprint(tree) -> str:
  """Sixteen digits that tell the network with these variables from others.

  >>> fingerprint({"params": {"w": np.ones(2)}})
  'c861336b63f4a26a'
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(_flatten(tree).items()):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def shapes(tree) -> dict[str, tuple[int, ...]]:
  """The shape of each tensor, by its path.

  >>> shapes({"stem": {"kernel": np.ones((7, 7))}})
  {'stem/kernel': (7, 7)}
  """
  return {name: np.shape(leaf) for name, leaf in _flatten(tree).items()}


def difference(want: dict, have: dict) -> str:
  """Describes in one line how two {name: shape} tables differ, or "".

  >>> difference({"conv_1": (3, 3)}, {"conv": (3, 3)})
  'missing conv_1 (nearest: conv); not expected conv (nearest: conv_1)'
  """
  missing = sorted(want.keys() - have.keys())
  extra = sorted(have.keys() - want.keys())
  unequal = [
    f"{k} has shape {have[k]}, needed {want[k]}"
    for k in sorted(want.keys() & have.keys())
    if want[k] != have[k]
  ]

  def more(entries):
    return f" and {len(entries) - 5} more" if len(entries) > 5 else ""

  def some(names, others):
    shown = []
    for name in names[:5]:
      near = difflib.get_close_matches(name, others, n=1)
      shown.append(name + (f" (nearest: {near[0]})" if near else ""))
    return ", ".join(shown) + more(names)

  parts = []
  if missing:
    parts.append(f"missing {some(missing, extra)}")
  if extra:
    parts.append(f"not expected {some(extra, missing)}")
  if unequal:
    parts.append("; ".join(unequal[:5]) + more(unequal))
  return "; ".join(parts)


def merge(variables: dict, loaded: dict, *, new=(), where: str) -> dict:
  """Puts the network of another run into freshly initialised variables.

  Args:
    variables: {"params", "batch_stats"} of the new network.
    loaded: the same from a checkpoint.
    new: top-level names (such as "classifier") that stay as initialised.
    where: the checkpoint, for the message.

  Returns:
    Variables of the structure and dtypes of `variables`.

  Raises:
    UserError: a name is missing or not expected, or a shape differs; all of
      them in one line.

  >>> new = {"params": {"encoder": np.zeros(1), "classifier": np.zeros(1)}}
  >>> old = {"params": {"encoder": np.ones(1)}}
  >>> merge(new, old, new=("classifier",), where="runs/pretrained")
  {'params': {'encoder': array([1.]), 'classifier': array([0.])}}
  """
  merged = {}
  for collection, tree in variables.items():
    part = {k: v for k, v in tree.items() if k not in new}
    source = {k: v for k, v in loaded[collection].items() if k in part}
    if problem := difference(shapes(part), shapes(source)):
      raise UserError(f"{where} holds another network: {problem}")
    cast = jax.tree.map(lambda a, b: np.asarray(b, a.dtype), part, source)
    merged[collection] = {**tree, **cast}
  return merged


def _flatten(tree) -> dict:
  return traverse_util.flatten_dict(tree, sep="/")
