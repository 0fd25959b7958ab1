"""What SimCLRv2 claims, each as a difference of two runs of the same seed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from simclr_jax import cli
from simclr_jax.config import UserError
from simclr_jax.sweep.grid import (
  Cell,
  cell_name,
  make_cell,
  make_cells,
  set_fields,
)


class Claim(NamedTuple):
  """That one run is better than another."""

  text: str
  percent: float  # of the labels
  better: tuple[str, str]  # method and size
  worse: tuple[str, str]


def make_claim_cells(
  *,
  recipe: str,
  sizes: Sequence[str],
  percents: Sequence[float],
  seeds: Sequence[int],
  fields: Sequence[tuple[str, str]] = (),
) -> list[Cell]:
  """The runs that the claims compare, each after those that it needs.

  Those of the grid are named as there, so that a folder can hold both.

  Args:
    recipe: "digits", "cifar10", ...
    sizes: of the small network and of the one that the claims are about.
    percents: of the labels.
    seeds: one run of each cell for each of them.
    fields: (stage or "config", "FIELD=VALUE").

  Raises:
    UserError: no two sizes.

  >>> cells = make_claim_cells(
  ...   recipe="digits", sizes=["18x0.125", "18x0.25"], percents=[1], seeds=[0]
  ... )
  >>> [cell.method for cell in cells][-2:]
  ['distill_direct', 'distill_labelled']
  """
  if len(sizes) != 2:
    raise UserError(
      f"--sizes: claims compare two sizes, small and big; got {len(sizes)}."
    )
  small, size = sizes
  grid = make_cells(
    recipe=recipe,
    sizes=sizes,
    percents=percents,
    seeds=seeds,
    methods=["finetune"],
  )
  chains = make_cells(
    recipe=recipe,
    sizes=sizes,
    percents=[p for p in percents if p < 100],
    seeds=seeds,
    methods=["distill"],
  )
  there = {cell.name for cell in grid}
  cells = grid + [cell for cell in chains if cell.name not in there]
  extra = [
    cell
    for seed in seeds
    for cell in _variants(recipe, size, small, percents, seed)
  ]
  set_fields(cells + extra, fields)
  return cells + extra


def _variants(recipe, size, small, percents, seed) -> Iterator[Cell]:
  """The runs that no grid has."""

  def cell(method, percent, stage, options="", **more):
    return make_cell(
      recipe, method, percent, stage, options, size=size, seed=seed, **more
    )

  few = [p for p in percents if p < 100]
  for depth in (2, 1) if few else ():
    encoder = f"pretrain_head{depth}"
    yield cell(
      encoder,
      None,
      "pretrain",
      network=size,
      fields={"head.num_layers": depth},
    )
    for p in few:
      # Not from the last layer, which is the head's output: with one layer in
      # all, from h.
      yield cell(
        f"finetune_head{depth}",
        p,
        "finetune",
        f",labels={p:g}",
        needs=cell_name(encoder, size, None, seed),
        fields={"head_layer": depth - 1},
      )
  for p in percents:
    layer = _default_layer(recipe, p)
    yield cell(
      f"finetune_layer{1 - layer}",
      p,
      "finetune",
      f",labels={p:g}",
      needs=cell_name("pretrain", size, None, seed),
      fields={"head_layer": 1 - layer},
    )
  usual = cli.load_recipe(f"{recipe},small", stage="distill")
  for p in few:
    teacher = cell_name("finetune", size, p, seed)
    student = {"needs": teacher, "network": small}
    yield cell("distill_direct", p, "distill", ",small", **student)
    # So many epochs that as many images are seen as where there are all.
    longer = {
      "num_epochs": usual.num_epochs * 100 / p,
      "optim.warmup_epochs": usual.optim.warmup_epochs * 100 / p,
    }
    yield cell(
      "distill_labelled",
      p,
      "distill",
      ",small",
      **student,
      fields={"only_labelled": True} | longer,
    )


def _default_layer(recipe: str, percent: float) -> int:
  config = cli.load_recipe(f"{recipe},labels={percent:g}", stage="finetune")
  return config.head_layer


def make_claims(
  recipe: str, sizes: Sequence[str], percents: Sequence[float]
) -> list[Claim]:
  """What is claimed, for each percentage of the labels.

  Source: 2006.10029, section 3.

  >>> claims = make_claims("digits", ["18x0.125", "18x0.25"], [1, 100])
  >>> claims[0].text, claims[0].better
  ('a bigger network is better', ('finetune', '18x0.25'))
  """
  small, size = sizes
  claims = [
    Claim(
      "a bigger network is better", p, ("finetune", size), ("finetune", small)
    )
    for p in percents
  ]
  few = [p for p in percents if p < 100]
  for depth in (2, 1):
    layers = f"{depth} layers" if depth > 1 else "1 layer"
    claims += [
      Claim(
        f"a head of 3 layers is better than of {layers}",
        p,
        ("finetune", size),
        (f"finetune_head{depth}", size),
      )
      for p in few
    ]
  for p in percents:
    layer = _default_layer(recipe, p)
    methods = ["finetune_layer0", "finetune_layer1"]
    methods[layer] = "finetune"
    claims.append(
      Claim(
        "fine-tuning from the head's first layer is better than from its input",
        p,
        (methods[1], size),
        (methods[0], size),
      )
    )
  for text, better, worse in (
    (
      "distilling on all images is better than on the labelled ones",
      ("distill_direct", size),
      ("distill_labelled", size),
    ),
    (
      "self-distilling the teacher first is better",
      ("distill", size),
      ("distill_direct", size),
    ),
    (
      "a distilled small network is better than the same fine-tuned",
      ("distill", size),
      ("finetune", small),
    ),
  ):
    claims += [Claim(text, p, better, worse) for p in few]
  return claims
