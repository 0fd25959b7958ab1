"""The cells of a grid: which runs there are and what they start from."""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simclr_jax import cli, resnet, rundir
from simclr_jax import config as config_lib
from simclr_jax.config import UserError

# With what the figure calls them, each after those that it needs.
METHODS = {
  "pretrain": "kNN",
  "scratch": "from scratch",
  "linear": "linear",
  "finetune": "fine-tuned",
  "self_distill": "self-distilled",
  "distill": "distilled to small",
}
SIZES = {
  "digits": "18x0.125,18x0.25,18x0.5",
  "cifar10": "18x0.5,18x1,50x1",
}
_HINT = "take another --workdir"
# What makes the cells differ, and where it comes from.
_SET_BY = {
  "seed": "--seeds",
  "label_percent": "--labels",
  "labels_per_class": "--labels",
  "model.depth": "--sizes",
  "model.width": "--sizes",
  "pretrained": "the cells that each one needs",
  "teacher": "the cells that each one needs",
}


class Cell(NamedTuple):
  """One run of the grid."""

  method: str
  size: str  # depth x width; of the teacher where the student is the small one
  percent: float | None  # of the labels; None for pretraining
  seed: int
  stage: str
  flags: list[str]  # of its command, but for directories
  needs: str | None  # the cell that it starts from

  @property
  def name(self) -> str:
    """That of its folder."""
    return cell_name(self.method, self.size, self.percent, self.seed)


def cell_name(method: str, size: str, percent: float | None, seed: int) -> str:
  """What the folder of a cell is called.

  >>> cell_name("pretrain", "18x1", None, 0)
  'pretrain_18x1_seed0'
  """
  part = "" if percent is None else f"_{percent:g}"
  return f"{method}_{size}{part}_seed{seed}"


def command(cell: Cell, workdir: Path) -> list[str]:
  """The flags of the stage's command for the sweep in `workdir`."""
  flags = [*cell.flags, f"--workdir={workdir / cell.name}"]
  if cell.needs:
    field = "teacher" if cell.stage == "distill" else "pretrained"
    flags.append(f"--config.{field}={workdir / cell.needs}")
  return flags


def make_cells(
  *,
  recipe: str,
  sizes: Sequence[str],
  percents: Sequence[float],
  seeds: Sequence[int],
  methods: Sequence[str],
  fields: Sequence[tuple[str, str]] = (),
) -> list[Cell]:
  """The runs of a grid, each after those that it needs.

  Args:
    recipe: "digits", "cifar10", ...; every stage has it.
    sizes: such as "18x0.25": depth and width; the first is the small one.
    percents: of the labels.
    seeds: of the weights, the data order and the choice of labels.
    methods: of METHODS; what they need is added.
    fields: (stage or "config", "FIELD=VALUE").

  Raises:
    UserError: an unknown size.

  >>> grid = dict(recipe="digits", sizes=["18x0.125"], seeds=[0])
  >>> cells = make_cells(**grid, percents=[1], methods=["finetune"])
  >>> [cell.name for cell in cells]
  ['pretrain_18x0.125_seed0', 'finetune_18x0.125_1_seed0']
  """
  cells = [
    cell
    for size in sizes
    for seed in seeds
    for cell in _chain(recipe, size, sizes[0], percents, seed)
  ]
  wanted = {cell.name for cell in cells if cell.method in methods}
  for cell in reversed(cells):
    if cell.name in wanted and cell.needs:
      wanted.add(cell.needs)
  set_fields(cells, fields)
  return [cell for cell in cells if cell.name in wanted]


def set_fields(
  cells: Sequence[Cell], fields: Sequence[tuple[str, str]]
) -> None:
  """Adds (stage or "config", "FIELD=VALUE") to the flags of cells, in place.

  Raises:
    UserError: a field that the grid itself sets.

  >>> cell = make_cell("digits", "scratch", 1, "finetune", size="18x1", seed=0)
  >>> set_fields([cell], [("finetune", "num_steps=3")])
  >>> cell.flags[-1]
  '--config.num_steps=3'
  """
  for scope, field in fields:
    name = field.partition("=")[0]
    # Pretraining may begin from weights that no cell makes.
    if name in _SET_BY and (scope, name) != ("pretrain", "pretrained"):
      raise UserError(
        f"--{scope}.{name} cannot be given: the grid sets it, from "
        f"{_SET_BY[name]}."
      )
  for cell in cells:
    cell.flags.extend(
      f"--config.{field}"
      for scope, field in fields
      if scope in (cell.stage, "config")
    )


def _chain(recipe, size, small, percents, seed) -> Iterator[Cell]:
  """All runs of one network and seed."""
  cell = functools.partial(make_cell, recipe, size=size, seed=seed)
  encoder = cell_name("pretrain", size, None, seed)
  yield cell("pretrain", None, "pretrain", network=size)
  for p in percents:
    few = f",labels={p:g}"
    tuned = cell_name("finetune", size, p, seed)
    teacher = cell_name("self_distill", size, p, seed)
    yield cell("scratch", p, "finetune", few, network=size)
    yield cell("linear", p, "finetune", f"{few},linear", needs=encoder)
    yield cell("finetune", p, "finetune", few, needs=encoder)
    yield cell("self_distill", p, "distill", needs=tuned)
    if size != small:
      yield cell(
        "distill", p, "distill", ",small", needs=teacher, network=small
      )


def make_cell(
  recipe: str,
  method: str,
  percent: float | None,
  stage: str,
  options: str = "",
  *,
  size: str,
  seed: int,
  needs: str | None = None,
  network: str | None = None,
  fields: Mapping[str, Any] | None = None,
) -> Cell:
  """One run.

  Args:
    recipe: "digits", "cifar10", ...
    method: what the run is called.
    percent: of the labels.
    stage: whose command it is.
    options: of the recipe, such as ",small".
    size: what the cell counts as.
    seed: of the run.
    needs: the name of the cell that it starts from.
    network: the size of its network; None: from what it starts from.
    fields: further fields of its config.

  >>> make_cell("digits", "scratch", 1.0, "finetune", size="18x1", seed=0).name
  'scratch_18x1_1_seed0'
  """
  fields = {"seed": seed, "report": False} | dict(fields or {})  # seconds each
  if network:
    depth, width = _parse_size(network)
    fields |= {"model.depth": depth, "model.width": width}
  flags = [f"--config={stage}.py:{recipe}{options}"]
  flags += [f"--config.{name}={value}" for name, value in fields.items()]
  return Cell(method, size, percent, seed, stage, flags, needs)


def _parse_size(text: str) -> tuple[int, float]:
  depth, _, width = text.partition("x")
  try:
    numbers = int(depth), float(width)
    if math.isinf(64 * numbers[1]):  # the widest layer's channels
      raise ValueError
  except ValueError:
    raise UserError(
      f'--sizes: "{text}" is no size; give depth x width, such as 18x0.25.'
    ) from None
  resnet.check_architecture(
    depth=numbers[0],
    width=numbers[1],
    sk_ratio=0.0,
    stem="cifar",
    pool_padding="same",
  )
  return numbers


def check_cells(
  cells: Sequence[Cell],
  workdir: Path,
  fields: Sequence[tuple[str, str]] = (),
) -> None:
  """Checks every command, and compares it with the run that is there.

  Args:
    cells: from `make_cells`.
    workdir: of the sweep.
    fields: those that `make_cells` got, for messages.

  Raises:
    UserError: an unknown field, a value of a wrong type or out of its range,
      or another run.
  """
  for cell in cells:
    try:
      config, folder = cli.parse(command(cell, workdir), stage=cell.stage)
      # Each run checks this too, for all of its devices: found here, one
      # mistake does not fail every cell.
      config_lib.check(config, num_devices=1)
    except UserError as error:
      text = _as_given(str(error), cell.stage, fields)
      raise UserError(text) from None
    file = Path(folder) / "config.json"
    if not file.exists():
      continue
    stored = config_lib.flat(
      config_lib.from_json_tree(rundir.read_json(file, hint=_HINT))
    )
    for name, value in config_lib.flat(config).items():
      if not config_lib.is_derived(name, value) and stored.get(name) != value:
        raise UserError(
          f"{folder} holds another run: config.{name} was "
          f"{stored.get(name)!r}, is {value!r}. Give the values it has, or "
          f"{_HINT}."
        )


def _as_given(text: str, stage: str, fields) -> str:
  """A message about config.FIELD, with stage.FIELD where that set it."""
  scopes = {
    field.partition("=")[0]: scope
    for scope, field in fields
    if scope in (stage, "config")
  }
  return re.sub(
    r"\bconfig\.([\w.]*\w)",
    lambda found: f"{scopes.get(found[1], 'config')}.{found[1]}",
    text,
  )
