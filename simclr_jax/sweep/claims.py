"""What SimCLRv2 claims, each as a difference of two runs of the same seed."""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simclr_jax import cli
from simclr_jax.config import UserError
from simclr_jax.sweep.grid import (
  Cell,
  cell_name,
  make_cell,
  make_cells,
  set_fields,
)

# For each seed; on average but not for each; not on average.
HOLDS, UNCLEAR, FAILS = "holds", "not for each seed", "does not hold"


class Claim(NamedTuple):
  """That one run is better than another."""

  text: str
  percent: float  # of the labels
  better: tuple[str, str]  # method and size
  worse: tuple[str, str]


class Finding(NamedTuple):
  """A claim and its runs; accuracies are fractions, in the order of seeds."""

  claim: Claim
  seeds: list[int]
  better: list[float]
  worse: list[float]

  @property
  def gains(self) -> list[float]:
    """Differences, one a seed."""
    return [a - b for a, b in zip(self.better, self.worse, strict=True)]

  @property
  def verdict(self) -> str:
    """Whether the claim holds here."""
    if min(self.gains) > 0:
      return HOLDS
    return UNCLEAR if statistics.mean(self.gains) > 0 else FAILS


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
  for depth in (2, 1):
    encoder = f"pretrain_head{depth}"
    yield cell(
      encoder,
      None,
      "pretrain",
      network=size,
      fields={"head.num_layers": depth},
    )
    for p in few:
      # The last layer is the output, so that one layer is left out whole.
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
    # As many images are seen as where all of them are there.
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


def findings(
  claims: Sequence[Claim], rows: Sequence[Mapping[str, Any]]
) -> list[Finding]:
  """Claims of which both runs are there, for at least one seed.

  Args:
    claims: from `make_claims`.
    rows: from `results.collect`.

  >>> claim = Claim("b is better", 1.0, ("b", "18x1"), ("a", "18x1"))
  >>> row = {"size": "18x1", "label_percent": 1.0, "seed": 0}
  >>> rows = [row | {"method": m, "top1": t} for m, t in [("a", 0.5), ("b", 1)]]
  >>> findings([claim], rows)[0].verdict
  'holds'
  """
  top1 = {
    (row["method"], row["size"], row["label_percent"], row["seed"]): row["top1"]
    for row in rows
    if row["top1"] is not None
  }
  found = []
  for claim in claims:
    keys = [(*side, claim.percent) for side in (claim.better, claim.worse)]
    seeds = sorted(
      seed
      for *key, seed in top1
      if tuple(key) == keys[0] and (*keys[1], seed) in top1
    )
    if seeds:
      values = [[top1[*key, seed] for seed in seeds] for key in keys]
      found.append(Finding(claim, seeds, *values))
  return found


_COLUMNS = (
  "claim",
  "label_percent",
  "better",
  "worse",
  "seed",
  "top1_better",
  "top1_worse",
  "gain",
  "verdict",
)


def to_csv(found: Sequence[Finding]) -> str:
  """One line for each claim and seed.

  >>> claim = Claim("b is better", 1.0, ("b", "18x1"), ("a", "18x1"))
  >>> print(to_csv([Finding(claim, [0], [0.75], [0.5])]).splitlines()[1])
  b is better,1.0,b 18x1,a 18x1,0,0.75,0.5,0.25,holds
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(_COLUMNS)
  for finding in found:
    claim = finding.claim
    sides = [" ".join(side) for side in (claim.better, claim.worse)]
    for seed, *values in zip(
      finding.seeds, finding.better, finding.worse, finding.gains, strict=True
    ):
      writer.writerow(
        [claim.text, claim.percent, *sides, seed, *values, finding.verdict]
      )
  return text.getvalue()


def read_csv(file: Path) -> list[Finding]:
  """What `to_csv` wrote there; [] where there is no such file.

  >>> read_csv(Path("runs/none.csv"))
  []
  """
  found: dict[Claim, Finding] = {}
  if not file.exists():
    return []
  with file.open(newline="") as lines:
    for row in csv.DictReader(lines):
      better, worse = (tuple(row[k].split()) for k in ("better", "worse"))
      claim = Claim(row["claim"], float(row["label_percent"]), better, worse)
      finding = found.setdefault(claim, Finding(claim, [], [], []))
      finding.seeds.append(int(row["seed"]))
      finding.better.append(float(row["top1_better"]))
      finding.worse.append(float(row["top1_worse"]))
  return list(found.values())


def to_table(found: Sequence[Finding]) -> list[tuple[str, ...]]:
  """Rows of text: claim, labels, both accuracies, gain, verdict.

  >>> claim = Claim("b is better", 1.0, ("b", "18x1"), ("a", "18x1"))
  >>> to_table([Finding(claim, [0], [0.75], [0.5])])[1]
  ('b is better', '1%', '75.0%', '50.0%', '+25.0%', 'holds')
  """
  rows: list[tuple[str, ...]] = [
    ("claim", "labels", "with", "without", "gain", "here")
  ]
  for finding in found:
    cells = [_mean(finding.better), _mean(finding.worse)]
    gain = _mean(finding.gains, "+.1%")
    rows.append(
      (
        finding.claim.text,
        f"{finding.claim.percent:g}%",
        *cells,
        gain,
        finding.verdict,
      )
    )
  return rows


def _mean(values: Sequence[float], form: str = ".1%") -> str:
  text = format(statistics.mean(values), form)
  if len(values) > 1:
    text += f" ± {statistics.stdev(values):.1%}"
  return text


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
  """A table of Markdown; the first row is its head.

  >>> print(to_markdown([("a", "b"), ("1", "2")]))
  | a | b |
  | --- | --- |
  | 1 | 2 |
  """
  lines = [f"| {' | '.join(row)} |" for row in rows]
  return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
