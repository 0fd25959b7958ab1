"""The table printed before the first step: what trains, and from where."""

from collections.abc import Sequence

import jax
import numpy as np

from simclr_jax import optimizers
from simclr_jax.train_state import group_of, tensor_names


def rows(
  config, params, *, trainable=None, loaded=None, new=("classifier",)
) -> list[tuple[str, ...]]:
  """One row a part of the network, with a heading.

  Args:
    config: of the run; its `optim` and `batch_size` are used.
    params: of the network, before training.
    trainable: tree of bools like params; None: everything trains.
    loaded: parameters of another run that were taken; None: none were.
    new: top-level names that were not taken from there.

  Returns:
    (part, values, trains, weights, decayed, adapted, peak learning rate).
  """
  optim = config.optim
  peak = optimizers.peak_learning_rate(
    learning_rate=optim.learning_rate,
    batch_size=config.batch_size,
    scaling=optim.scaling,
  )
  if trainable is None:
    trainable = jax.tree.map(lambda _: True, params)
  adapted = optimizers.is_adapted(params)
  decayed = optimizers.is_decayed(params)
  if optim.name == "lars":  # the classifier's kernel has its decay as plain L2
    decayed = jax.tree.map(
      lambda a, b: a or b, adapted, optimizers.is_classifier_kernel(params)
    )
  groups: dict[str, np.ndarray] = {}
  origin = {}
  columns = map(jax.tree.leaves, (params, trainable, decayed, adapted))
  for name, x, trains, decays, adapts in zip(
    tensor_names(params), *columns, strict=True
  ):
    group, top = group_of(name), name.split("/")[0]
    taken = loaded is not None and top in loaded and top not in new
    origin[group] = "loaded" if taken else "new"
    counts = np.array([1, trains, trains and decays, trains and adapts])
    groups[group] = groups.get(group, 0) + counts * int(np.size(x))
  table: list[tuple[str, ...]] = [
    ("part", "values", "trains", "weights", "decayed", "adapted", "peak rate")
  ]
  for group in sorted(groups, key=_place):
    total, trains, decays, adapts = groups[group]
    table.append(
      (
        group,
        f"{total:,}",
        "yes" if trains == total else f"{trains:,}" if trains else "frozen",
        origin[group],
        f"{decays:,}" if optim.weight_decay else "0",
        f"{adapts:,}" if optim.name == "lars" else "0",
        f"{peak:.4g}" if trains else "0",
      )
    )
  return table


def _place(group: str):
  order = ("stem", "block_group", "projection_head", "classifier")
  return [i for i, name in enumerate(order) if group.startswith(name)], group


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
  """A table's lines, its first column to the left, all others to the right.

  >>> aligned([("part", "values"), ("stem", "1,728"), ("all", "11,168,832")])
  ['part      values', 'stem       1,728', 'all   11,168,832']
  """
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return [
    "  ".join(
      text.rjust(width) if i else text.ljust(width)
      for i, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in table
  ]


def show(
  config, params, *, loaded=None, new=("classifier",), **options
) -> None:
  """Prints `rows`, and what of `loaded` was left; arguments as there."""
  if jax.process_index():
    return
  for line in aligned(rows(config, params, loaded=loaded, new=new, **options)):
    print(f"  {line}")
  total = sum(np.size(x) for x in jax.tree.leaves(params))
  scope = config.model.bn_group_size
  notes = [
    f"{total:,} values",
    f"{config.batch_size // jax.device_count()} images a device",
    f"BatchNorm over {f'groups of {scope}' if scope else 'all'} device(s)",
  ]
  if loaded is not None:
    left = sorted(k for k in loaded if k in new or k not in params)
    notes.append(f"left in the checkpoint: {', '.join(left) or 'nothing'}")
  print("  " + ", ".join(notes), flush=True)
