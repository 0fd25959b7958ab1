"""Top-1 against the fraction of labels, as the paper draws it."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from simclr_jax.sweep.grid import METHODS
from simclr_jax.sweep.results import summary


def draw(figure, rows) -> None:
  """A panel for each method: top-1 against labels, a line for each size.

  Bars are one standard deviation over seeds.

  Args:
    figure: a matplotlib Figure.
    rows: from `collect`.

  >>> from matplotlib.figure import Figure
  >>> row = {"method": "linear", "size": "18x1", "label_percent": 1.0}
  >>> figure = Figure()
  >>> draw(figure, [row | {"top1": 0.5}])
  >>> [axes.get_title() for axes in figure.axes]
  ['linear']
  """
  points = _points(rows)
  methods = _methods(points)
  sizes = list(dict.fromkeys(size for _, size, _ in points))
  percents = sorted({percent for *_, percent in points})
  axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
  for method, ax in zip(methods, axes, strict=True):
    for i, size in enumerate(sizes):
      x = [p for p in percents if (method, size, p) in points]
      if not x:
        continue
      mean, deviation, _ = zip(
        *(points[method, size, p] for p in x), strict=True
      )
      depth, _, width = size.partition("x")
      label = f"ResNet-{depth} ×{width}"
      ax.errorbar(
        x, mean, deviation, color=f"C{i}", label=label, marker="o", capsize=2
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
  figure.legend(
    handles.values(), handles.keys(), loc="outside lower center", ncols=4
  )


def _points(rows) -> dict:
  return {key: v for key, v in summary(rows).items() if key[2] is not None}


def _methods(points) -> list[str]:
  """Those to draw, in their order."""
  return [m for m in METHODS if any(key[0] == m for key in points)]


def size_of(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
  """Width and height in inches; (0, 0) where there is nothing to draw.

  >>> size_of([])
  (0.0, 0.0)
  """
  if not (methods := _methods(_points(rows))):
    return 0.0, 0.0
  return 2.4 * len(methods) + 0.8, 3.4


def files(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
  """{"label_efficiency.png": ..., "label_efficiency.svg": ...}, or {}.

  >>> files([])
  {}
  """
  if not any(size := size_of(rows)):
    return {}
  import matplotlib  # takes a second
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  draw(figure, rows)
  made = {}
  same = {"svg.hashsalt": "label_efficiency"}  # the same bytes each time
  for kind, dates in (("png", {}), ("svg", {"Date": None})):
    content = io.BytesIO()
    with matplotlib.rc_context(same):
      figure.savefig(content, format=kind, dpi=150, metadata=dates)
    made[f"label_efficiency.{kind}"] = content.getvalue()
  return made
