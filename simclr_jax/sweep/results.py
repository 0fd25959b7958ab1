"""What a sweep has found: rows, their means, their table."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simclr_jax.sweep.grid import METHODS, Cell


def collect(cells: Sequence[Cell], workdir: Path) -> list[dict[str, Any]]:
  """One row for every cell that is complete; the columns of the csv."""
  rows = []
  for cell in cells:
    file = workdir / cell.name / "result.json"
    if not file.exists():
      continue
    result = json.loads(file.read_text())
    rows.append(
      {
        "method": cell.method,
        "size": cell.size,
        "label_percent": cell.percent,
        "seed": cell.seed,
        **{k: result[k] for k in ("top1", "top5", "num_steps", "seconds")},
        "run": cell.name,
      }
    )
  return rows


def summary(rows) -> dict[tuple, tuple[float, float, int]]:
  """(method, size, percent) -> mean, standard deviation and count of top-1.

  >>> row = {"method": "linear", "size": "18x1", "label_percent": 1.0}
  >>> summary([row | {"top1": 0.5}, row | {"top1": None}])
  {('linear', '18x1', 1.0): (0.5, 0.0, 1)}
  """
  groups: dict[tuple, list[float]] = {}
  for row in rows:
    if row["top1"] is not None:
      key = (row["method"], row["size"], row["label_percent"])
      groups.setdefault(key, []).append(row["top1"])
  return {
    key: (
      statistics.mean(values),
      statistics.stdev(values) if len(values) > 1 else 0.0,
      len(values),
    )
    for key, values in groups.items()
  }


def to_table(rows) -> list[tuple[str, ...]]:
  """Rows of text: method, size, labels, top-1, number of seeds.

  >>> row = {"method": "linear", "size": "18x1", "label_percent": 1.0}
  >>> to_table([row | {"top1": 0.5}, row | {"top1": 0.25}])[1]
  ('linear', '18x1', '1%', '37.5% ± 17.7%', '2')
  """
  table: list[tuple[str, ...]] = [
    ("method", "size", "labels", "top-1", "seeds")
  ]
  for (method, size, percent), (mean, spread, count) in summary(rows).items():
    labels = "–" if percent is None else f"{percent:g}%"
    top1 = f"{mean:.1%} ± {spread:.1%}" if count > 1 else f"{mean:.1%}"
    name = METHODS.get(method, method)
    table.append((name, size, labels, top1, str(count)))
  return table


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """A csv whose columns are the keys of the first row.

  >>> to_csv([{"top1": 0.5, "seed": 0}])
  'top1,seed\\n0.5,0\\n'
  """
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def read_csv(file: Path) -> list[dict[str, Any]]:
  """The rows that `to_csv` wrote there; [] where there is no such file.

  >>> read_csv(Path("runs/none.csv"))
  []
  """
  if not file.exists():
    return []
  numbers = {"label_percent": float, "seed": int, "top1": float}
  with file.open(newline="") as lines:
    return [
      {
        name: (numbers[name](text) if text else None)
        if name in numbers
        else text
        for name, text in row.items()
      }
      for row in csv.DictReader(lines)
    ]
