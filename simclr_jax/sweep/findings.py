"""Whether the claims hold: gains over seeds, their csv and table."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simclr_jax.sweep.claims import Claim

# The gain is above 0: for each seed; only on average; not even on average.
HOLDS, UNCLEAR, FAILS = "holds", "not for each seed", "does not hold"


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


def find(
  claims: Sequence[Claim], rows: Sequence[Mapping[str, Any]]
) -> list[Finding]:
  """Claims of which both runs are there, for at least one seed.

  Args:
    claims: from `make_claims`.
    rows: from `results.collect`.

  >>> claim = Claim("b is better", 1.0, ("b", "18x1"), ("a", "18x1"))
  >>> row = {"size": "18x1", "label_percent": 1.0, "seed": 0}
  >>> rows = [row | {"method": m, "top1": t} for m, t in [("a", 0.5), ("b", 1)]]
  >>> find([claim], rows)[0].verdict
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
