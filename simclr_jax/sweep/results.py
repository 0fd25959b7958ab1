"""What a sweep has found: csv, figure, table."""

import csv
import io
import json
import os
import statistics
from collections.abc import Sequence
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


def make_figure(rows):
  """A panel for each method: top-1 against labels, a line for each size.

  Returns:
    A matplotlib Figure, or None where there is nothing to draw. Bars are one
    standard deviation over seeds.
  """
  from matplotlib import colormaps, figure  # takes a second

  points = {k: v for k, v in summary(rows).items() if k[2] is not None}
  methods = [m for m in METHODS if any(k[0] == m for k in points)]
  if not methods:
    return None
  sizes = list(dict.fromkeys(row["size"] for row in rows))
  percents = sorted({k[2] for k in points})
  fig = figure.Figure(
    figsize=(2.4 * len(methods) + 0.8, 3.4), layout="constrained"
  )
  axes = fig.subplots(1, len(methods), sharey=True, squeeze=False)[0]
  for method, ax in zip(methods, axes, strict=True):
    for i, size in enumerate(sizes):
      x = [p for p in percents if (method, size, p) in points]
      if not x:
        continue
      mean, deviation, _ = zip(
        *(points[method, size, p] for p in x), strict=True
      )
      color = colormaps["viridis"](0.85 * i / max(len(sizes) - 1, 1))
      depth, _, width = size.partition("x")
      label = f"ResNet-{depth} ×{width}"
      ax.errorbar(
        x, mean, deviation, color=color, label=label, marker="o", capsize=2
      )
    ax.set_xscale("log")
    ax.set_xticks(percents, [f"{p:g}%" for p in percents], minor=False)
    ax.set_xticks([], minor=True)
    ax.set_title(METHODS[method])
    ax.set_xlabel("labels")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.grid(alpha=0.3)
  axes[0].set_ylabel("top-1")
  handles = {
    label: handle
    for ax in axes
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
  }
  fig.legend(
    handles.values(), handles.keys(), loc="outside lower center", ncols=4
  )
  return fig


def write_results(cells: Sequence[Cell], workdir: Path) -> None:
  """Writes label_efficiency.{csv,png,svg} and prints the table."""
  rows = collect(cells, workdir)
  if not rows:
    return
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  files = {"csv": text.getvalue().encode()}
  if fig := make_figure(rows):
    import matplotlib

    same = {"svg.hashsalt": "label_efficiency"}  # the same bytes each time
    for kind, dates in (("png", {}), ("svg", {"Date": None})):
      content = io.BytesIO()
      with matplotlib.rc_context(same):
        fig.savefig(content, format=kind, dpi=150, metadata=dates)
      files[kind] = content.getvalue()
  for kind, content in files.items():
    # Other processes write it too.
    draft = workdir / f".label_efficiency.{kind}.{os.getpid()}"
    draft.write_bytes(content)
    draft.replace(workdir / f"label_efficiency.{kind}")
  print(f"\n{'method':20}{'size':>10}{'labels':>8}{'top-1':>16}{'seeds':>7}")
  for (method, size, percent), (mean, spread, count) in summary(rows).items():
    labels = "" if percent is None else f"{percent:g}%"
    top1 = f"{mean:.1%} +- {spread:.1%}" if count > 1 else f"{mean:.1%}"
    print(f"{METHODS[method]:20}{size:>10}{labels:>8}{top1:>16}{count:7}")
  print(f"\n{len(rows)} of {len(cells)} cells; see {workdir}", flush=True)
