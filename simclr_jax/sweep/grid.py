"""The cells of a grid: which runs there are and what they start from."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from simclr_jax import cli, resnet
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
    return _name(self.method, self.size, self.percent, self.seed)


def _name(method, size, percent, seed) -> str:
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
  for cell in cells:
    cell.flags.extend(
      f"--config.{field}"
      for scope, field in fields
      if scope in (cell.stage, "config")
    )
  return [cell for cell in cells if cell.name in wanted]


def _chain(recipe, size, small, percents, seed) -> Iterator[Cell]:
  """All runs of one network and seed."""

  def cell(method, percent, stage, options="", *, needs=None, network=None):
    flags = [f"--config={stage}.py:{recipe}{options}", f"--config.seed={seed}"]
    if network:
      depth, width = _parse_size(network)
      flags += [
        f"--config.model.depth={depth}",
        f"--config.model.width={width}",
      ]
    return Cell(method, size, percent, seed, stage, flags, needs)

  encoder = _name("pretrain", size, None, seed)
  yield cell("pretrain", None, "pretrain", network=size)
  for p in percents:
    few = f",labels={p:g}"
    teacher = [_name(m, size, p, seed) for m in ("finetune", "self_distill")]
    yield cell("scratch", p, "finetune", few, network=size)
    yield cell("linear", p, "finetune", f"{few},linear", needs=encoder)
    yield cell("finetune", p, "finetune", few, needs=encoder)
    yield cell("self_distill", p, "distill", needs=teacher[0])
    if size != small:
      yield cell(
        "distill", p, "distill", ",small", needs=teacher[1], network=small
      )


def _parse_size(text: str) -> tuple[int, float]:
  depth, _, width = text.partition("x")
  try:
    numbers = int(depth), float(width)
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


def check_cells(cells: Sequence[Cell], workdir: Path) -> None:
  """Parses every command, and compares it with the run that is there.

  Raises:
    UserError: an unknown field, a value of a wrong type, or another run.
  """
  for cell in cells:
    config, folder = cli.parse(command(cell, workdir), stage=cell.stage)
    file = Path(folder) / "config.json"
    if not file.exists():
      continue
    stored = config_lib.flat(
      config_lib.from_json_tree(json.loads(file.read_text()))
    )
    for name, value in config_lib.flat(config).items():
      if not config_lib.is_derived(value) and stored.get(name) != value:
        raise UserError(
          f"{folder} holds another run: config.{name} was "
          f"{stored.get(name)!r}, is {value!r}. Give the values it has, or "
          "take another --workdir."
        )
