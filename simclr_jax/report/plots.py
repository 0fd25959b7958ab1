"""Matplotlib's figures as SVG that takes its colours from the page."""

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import offsetbox, rcsetup
from matplotlib.figure import Figure

# Stand-ins that become CSS: a page in the dark has other colours.
_TEXT, _GRID, _PAPER = "#010101", "#020202", "#030303"
_SERIES = [f"#0401{i:02x}" for i in range(10)]
_CSS = {_TEXT: "currentColor", _GRID: "var(--line)", _PAPER: "var(--card)"} | {
  color: f"var(--c{i})" for i, color in enumerate(_SERIES)
}
# Legible on both, used as shades from transparent on.
_BLUE, _ORANGE = (0.23, 0.47, 0.86), (0.90, 0.47, 0.13)
_STYLE = {
  "axes.axisbelow": True,
  "axes.edgecolor": _GRID,
  "axes.facecolor": "none",
  "axes.grid": True,
  "axes.labelcolor": _TEXT,
  "axes.prop_cycle": rcsetup.cycler("color", _SERIES),
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlecolor": _TEXT,
  "figure.facecolor": "none",
  "font.size": 9.5,
  "grid.color": _GRID,
  "grid.linewidth": 0.6,
  "legend.frameon": False,
  "legend.labelcolor": _TEXT,
  "lines.linewidth": 1.6,
  "svg.fonttype": "none",
  "text.color": _TEXT,
  "text.parse_math": False,
  "xtick.color": _GRID,
  "xtick.labelcolor": _TEXT,
  "ytick.color": _GRID,
  "ytick.labelcolor": _TEXT,
}
_MOST_POINTS = 1000  # of a curve
_LINE = 60  # characters beside each other in a legend
_MOST_NAMES = 20  # of classes in a legend or on an axis


def _svg(draw, *, name: str, title: str, size: tuple[float, float]) -> str:
  """Inline SVG of what draw(axes, figure) draws; sizes are in inches."""
  return inline_svg(
    lambda figure: draw(figure.add_subplot(), figure),
    name=name,
    title=title,
    size=size,
  )


def inline_svg(
  draw: Callable[[Figure], Any],
  *,
  name: str,
  title: str,
  size: tuple[float, float],
) -> str:
  """SVG in the page's colours of what `draw` draws onto a figure.

  Args:
    draw: takes a matplotlib Figure.
    name: of the plot, unique on the page.
    title: for people who cannot see it.
    size: width and height in inches.

  >>> def draw(figure):
  ...   figure.add_subplot().plot([1, 2])
  >>> inline_svg(draw, name="line", title="A line", size=(2, 2))[:4]
  '<svg'
  """
  with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
    figure = Figure(figsize=size, layout="constrained")
    file = io.StringIO()
    with warnings.catch_warnings():
      # The browser draws the text, in its own fonts.
      warnings.filterwarnings("ignore", message="Glyph .* missing from")
      draw(figure)
      nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
      figure.savefig(file, format="svg", metadata=nothing)
  text = file.getvalue()
  text = text[text.index("<svg") :]
  for color, css in _CSS.items():
    text = text.replace(color, css)
  # Ids are made for a file with one figure.
  text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
  label = html.escape(title)
  return re.sub(
    r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
    lambda found: f'<svg {found[1]} role="img" aria-label="{label}">',
    text,
    count=1,
  )


def curves(
  series: dict[str, tuple], *, name: str, title: str, line=None, log=False
) -> str:
  """Values over steps.

  Args:
    series: label -> (steps, values).
    name: of the plot, unique on the page.
    title: for people who cannot see it.
    line: (value, label) of a horizontal line, or None.
    log: a logarithmic axis where no value is below 0; zeros are left out.
  """

  def draw(axes, figure):
    for label, (steps, values) in series.items():
      every = -(-len(steps) // _MOST_POINTS)
      few = "o" if len(steps) < 25 else ""
      label = f"{label} {values[-1]:.{3 if log else 4}g}"
      axes.plot(steps[::every], values[::every], few + "-", ms=3.5, label=label)
    axes.set_xlim(0, 1.02 * max(steps[-1] for steps, _ in series.values()))
    if line:
      axes.axhline(line[0], color=_TEXT, lw=1, ls="--", label=line[1])
    every = np.concatenate([values for _, values in series.values()])
    if log and (every >= 0).all() and (every > 0).any():
      axes.set_yscale("log", nonpositive="mask")
      axes.yaxis.set_major_formatter("{x:g}")
      axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("step")
    _, labels = axes.get_legend_handles_labels()
    columns = _LINE // (max(map(len, labels)) + 7)
    figure.legend(loc="outside upper left", ncols=max(1, columns), fontsize=8.5)

  return _svg(draw, name=name, title=title, size=(4.4, 2.7))


def _shaded(axes, colors, shades, labels) -> None:
  """Cells [n, m] of `colors` [n, m, 3], from transparent (0) to full (1)."""
  axes.grid(False)
  pixels = np.concatenate([colors, shades[..., None]], axis=-1)
  axes.imshow(pixels, interpolation="none")
  axes.tick_params(length=0)
  axes.set_ylabel(labels[0])
  axes.set_xlabel(labels[1])


def matrix(values, *, name: str, title: str, labels: tuple[str, str]) -> str:
  """Cosines [n, n] as shades: blue above 0, orange below.

  Args:
    values: in [-1, 1].
    name, title: as in `curves`.
    labels: of the rows and of the columns.
  """

  def draw(axes, figure):
    colors = np.where(values[..., None] < 0, _ORANGE, _BLUE)
    _shaded(axes, colors, np.clip(np.abs(values), 0, 1), labels)

  return _svg(draw, name=name, title=title, size=(4.4, 4.2))


def confusion(counts, names, *, name: str, title: str) -> str:
  """Counts [K, K] as numbers; blue where right, orange where wrong."""

  def draw(axes, figure):
    right = np.eye(len(counts), dtype=bool)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # A share of 1% of wrong answers is to be seen too.
    shades = np.where(right, 0.75 * share, share**0.5)
    colors = np.where(right[..., None], _BLUE, _ORANGE)
    _shaded(axes, colors, shades, ("true", "predicted"))
    for row, column in zip(*np.nonzero(counts), strict=True):
      axes.text(
        column,
        row,
        str(counts[row, column]),
        ha="center",
        va="center",
        fontsize=8.5 if len(counts) <= 12 else 6.5,
      )
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=90 if _long(names) else 0)
    axes.set_yticks(ticks, names)

  return _svg(draw, name=name, title=title, size=(4.4, 4.2))


def bars(values, names, *, name: str, title: str, mean: float) -> str:
  """Fractions in [0, 1] as horizontal bars, with a line at their mean."""

  def draw(axes, figure):
    axes.grid(False, axis="y")
    axes.barh(range(len(values)), values, color=_SERIES[0], height=0.7)
    axes.axvline(mean, color=_TEXT, lw=1, ls="--", label=f"all: {mean:.1%}")
    for i, value in enumerate(values):
      axes.text(1.02, i, f"{value:.0%}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    figure.legend(loc="outside upper left", fontsize=8.5)

  height = max(4.2, 0.9 + 0.22 * len(values))
  return _svg(draw, name=name, title=title, size=(4.4, height))


def scatter(
  points, labels, names, *, name: str, title: str, thumbnails=None
) -> str:
  """A map of images: points [m, 2] coloured by label, some as thumbnails.

  Args:
    points: positions.
    labels: int [m]; -1 is drawn in the colour of the text.
    names: of the classes.
    name, title: as in `curves`.
    thumbnails: uint8 [m, T, T, C]; drawn where they do not overlap.
  """

  def draw(axes, figure):
    axes.set_axis_off()
    axes.margins(0.06)
    for label in np.unique(labels):
      known = label >= 0
      axes.scatter(
        *points[labels == label].T,
        s=9 if thumbnails is None else 14,
        color=_SERIES[label % 10] if known else _TEXT,
        marker="o^sDv"[label // 10 % 5] if known else "o",
        alpha=0.8,
        linewidths=0,
        label=names[label] if known else "no label",
      )
    if thumbnails is not None:
      for i in _apart(points, 0.075):
        image = thumbnails[i]
        if image.shape[-1] == 1:
          image = np.repeat(image, 3, -1)
        box = offsetbox.OffsetImage(
          image, zoom=16 / len(image), interpolation="none"
        )
        color = _SERIES[labels[i] % 10] if labels[i] >= 0 else _TEXT
        thumbnail = offsetbox.AnnotationBbox(
          box,
          points[i],
          pad=0.08,
          bboxprops={"edgecolor": color, "facecolor": color, "lw": 1.5},
        )
        thumbnail.set_in_layout(False)  # or the map may shrink to nothing
        axes.add_artist(thumbnail)
      if 1 < len(np.unique(labels)) <= _MOST_NAMES:
        figure.legend(
          loc="outside lower center",
          ncols=5 if _long(names) else 10,
          fontsize=9.5,
          handletextpad=0,
          columnspacing=0.8,
          markerscale=1.6,
        )

  size = (2.6, 2.4) if thumbnails is None else (4.8, 4.7)
  return _svg(draw, name=name, title=title, size=size)


def _apart(points, distance: float) -> list[int]:
  """Points that keep a distance, a fraction of the map, from each other."""
  span = np.ptp(points, axis=0)
  scaled = points / np.where(span > 0, span, 1)
  kept: list[int] = []
  for i in range(len(points)):
    if all(np.abs(scaled[i] - scaled[k]).max() > distance for k in kept):
      kept.append(i)
  return kept


def _long(names) -> bool:
  return max(map(len, names), default=0) > 3
