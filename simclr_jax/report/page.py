"""The sections of the page, each made from a run, and their template."""

import base64
import io
import math

import jinja2
import numpy as np
from PIL import Image

from simclr_jax import metrics as metrics_lib
from simclr_jax.report import findings, plots
from simclr_jax.report import run as run_lib
from simclr_jax.report.run import Missing, Run

# Curves that come first, in this order; others follow by their names' prefix.
_MAIN = (
  ("Loss", ("loss", "distillation_loss", "supervised_loss")),
  ("Contrastive accuracy", ("contrastive_accuracy",)),
  ("Accuracy of the batch", ("accuracy", "probe_accuracy", "agreement")),
  ("Evaluation", ("eval_top1", "eval_top5", "eval_probe_top1")),
  ("Learning rate", ("learning_rate",)),
  ("Images per second", ("images_per_second",)),
)
_MOST_CLASSES = 20  # in the confusion matrix and the bars


def render(run: Run, others=()) -> str:
  """The page's HTML.

  Args:
    run: the run that it is about.
    others: runs to show beside it.
  """

  def section(make, *args):
    try:
      return make(*args)
    except Missing as missing:
      return str(missing)

  return template("page.html.j2").render(
    run=run,
    result=run.result,
    samples=run.samples,
    names=run.label_names,
    differences=section(run_lib.differences, run),
    notes=findings.notes(run),
    curves=section(_curves, run),
    views=section(_views, run),
    similarity=section(_similarity, run),
    pca=section(_map, run, findings.pca, "PCA"),
    tsne=section(_map, run, findings.tsne, "t-SNE"),
    neighbours=section(_neighbours, run),
    classifier=section(_classifier, run),
    stages=_stages(run, others),
  )


def template(name: str) -> jinja2.Template:
  """One of the templates beside this file, with the filters that they use.

  >>> template("page.html.j2").name
  'page.html.j2'
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("simclr_jax.report", ""),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.ChainableUndefined,  # files of an older version
  )
  environment.filters |= {
    "image": _data_uri,
    "percent": lambda x: f"{x:.1%}" if isinstance(x, float) else "–",
    "duration": lambda x: _duration(x) if isinstance(x, float | int) else "–",
  }
  return environment.get_template(name)


def _curves(run: Run) -> dict[str, list[tuple[str, str]]]:
  """{"main": [(title, svg)], "more": [(title, svg)]}."""
  left = dict(run.metrics)
  if _same(left.get("loss"), left.get("distillation_loss")):
    del left["distillation_loss"]
  if not left:
    why = run.missing.get("metrics.jsonl", "metrics.jsonl has no lines yet.")
    raise Missing(why)
  knn = run.result.get("protocol") == "knn" or "eval_probe_top1" in left
  anchors = _anchors(run)
  plotted = {"main": [], "more": []}

  def plot(where, title, series, **options):
    name = f"{where}{len(plotted[where])}"
    svg = plots.curves(series, name=name, title=f"{title} by step", **options)
    plotted[where].append((title, svg))

  for title, names in _MAIN:
    series = {_label(n, knn): left.pop(n) for n in names if n in left}
    if series:
      plot("main", title, series, line=anchors.get(title))
  groups: dict[str, list[str]] = {}
  for name in left:
    groups.setdefault(name.partition("/")[0], []).append(name)
  for group, names in groups.items():
    series = {_label(n.removeprefix(f"{group}/"), knn): left[n] for n in names}
    plot("more", _label(group, knn), series, log=len(names) > 1)
  return plotted


def _same(a, b) -> bool:
  return a is not None and b is not None and np.array_equal(a, b)


def _anchors(run: Run) -> dict[str, tuple[float, str]]:
  """What a network that knows nothing would have."""
  anchors = {}
  if (num_classes := len(run.label_names)) > 1:
    anchors["Loss"] = math.log(num_classes), "uniform"
    anchors["Accuracy of the batch"] = 1 / num_classes, "chance"
  if run.stage == "pretrain":
    anchors["Loss"] = metrics_lib.uniform_loss(run.num_pairs), "uniform"
    anchors["Contrastive accuracy"] = 1 / run.config["batch_size"], "chance"
  return {
    title: (value, f"{word} {value:.4g}")
    for title, (value, word) in anchors.items()
  }


def _label(name: str, knn: bool) -> str:
  """eval_probe_top1 -> probe top-1."""
  words = name.removeprefix("eval_").replace("_", " ")
  if knn and name in ("eval_top1", "eval_top5"):
    words = f"kNN {words}"
  return words.replace("top1", "top-1").replace("top5", "top-5")


def _views(run: Run) -> list[dict]:
  originals, sizes, views, boxes = run.need(
    "originals", "original_sizes", "views", "boxes"
  )
  n = len(originals)
  return [
    {
      "original": originals[i, : sizes[i, 0], : sizes[i, 1]],
      "views": views[i::n],
      "boxes": boxes[i::n].tolist(),
    }
    for i in range(n)
  ]


def _similarity(run: Run) -> dict:
  values, kind = findings.similarities(run)
  if kind == "views":
    label = ("first view of image", "second view of image")
    wrong = values[~np.eye(len(values), dtype=bool)]
    facts = {
      "two views of one image": float(np.diag(values).mean()),
      "views of two images": float(wrong.mean()) if wrong.size else 0.0,
    }
  else:
    label, facts = ("image, by class", "image, by class"), {}
  svg = plots.matrix(
    values, name="similarity", title="Cosine similarities", labels=label
  )
  return {"svg": svg, "kind": kind, "facts": facts, "count": len(values)}


def _map(run: Run, project, title: str) -> str:
  points = project(run)
  labels, thumbnails = run.need("labels", "thumbnails")
  return plots.scatter(
    points,
    labels,
    run.label_names,
    name=title.replace("-", ""),
    title=f"{title} of the features",
    thumbnails=thumbnails,
  )


def _neighbours(run: Run) -> list:
  found = findings.neighbours(run)
  if len(run.samples["features"]) < 2:
    raise Missing("There is one image only.")
  return found


def _classifier(run: Run) -> dict:
  counts = findings.confusion(run)
  names, totals = run.label_names, counts.sum(1)
  right = np.diag(counts)
  accuracy = right / np.maximum(totals, 1)
  # Of many classes those with the most mistakes, in their order.
  worst = np.argsort(right - totals, kind="stable")[:_MOST_CLASSES]
  shown = np.sort(worst[totals[worst] > 0])
  shown_names = [names[i] for i in shown]
  return {
    "confusion": plots.confusion(
      counts[np.ix_(shown, shown)],
      shown_names,
      name="confusion",
      title="Confusion matrix",
    ),
    "per_class": plots.bars(
      accuracy[shown],
      shown_names,
      name="perclass",
      title="Accuracy by class",
      mean=right.sum() / totals.sum(),
    ),
    "mistakes": findings.mistakes(run),
    "all_classes": len(shown) == len(names),
    "probe": run.stage == "pretrain" and run.config["probe"],
    "count": int(totals.sum()),
  }


def _stages(run: Run, others) -> dict:
  runs, note = run_lib.chain(run)
  chain = {one.workdir for one in runs}
  others = [other for other in others if other.workdir not in chain]

  def small_map(i, one):
    try:
      return plots.scatter(
        findings.pca(one),
        one.samples["labels"],
        one.label_names,
        name=f"stage{i}",
        title=f"PCA of the features of {one.name}",
      )
    except Missing as missing:
      return str(missing)

  runs += others
  cards = [
    {"run": one, "map": small_map(i, one) if len(runs) > 1 else ""}
    for i, one in enumerate(runs)
  ]
  return {"cards": cards, "note": note, "others": bool(others)}


def _data_uri(pixels: np.ndarray) -> str:
  """uint8 [H, W, C] as the source of an <img>."""
  file = io.BytesIO()
  image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  image.save(file, format="PNG", optimize=True)
  return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _duration(seconds) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
