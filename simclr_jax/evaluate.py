"""What features are worth to a classifier, from a run or a file of features.

  python -m simclr_jax.evaluate --checkpoint=DIR
  python -m simclr_jax.evaluate --features=features.npz
      [--test_features=test.npz] [--per_class=1,5,10 --draws=5] [--folds=5]

Three classifiers on frozen features: nearest neighbours (knn), logistic
regression by L-BFGS (linear) and least squares in closed form (ridge). They
train on all labels of the run's training split (or --features) and are tested
on its evaluation split (or --test_features); where there is none, by
cross-validation. --per_class trains on so few labels of each class, as often
as --draws says. Several results are given as mean and standard deviation.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from sklearn import model_selection

from simclr_jax import (
  cli,
  data,
  errors,
  feature_file,
  hosts,
  network,
  overview,
  probes,
)
from simclr_jax.config import UserError, nearest
from simclr_jax.data.order import at_most
from simclr_jax.data.splits import labels_needed
from simclr_jax.feature_file import Features
from simclr_jax.provenance import provenance

PROBES: dict[str, tuple[Callable[..., dict], str]] = {
  "knn": (probes.knn, "knn"),
  "linear": (probes.linear, "linear (L-BFGS)"),
  "ridge": (probes.ridge, "linear (closed form)"),
}
_FOLDS = 5  # where there is nothing to test on


def evaluate(
  *,
  checkpoint: str = "",
  features: str = "",
  test_features: str = "",
  layer: str = "h",
  probe_names: Sequence[str] = ("knn", "linear", "ridge"),
  per_class: Sequence[int] | int = (),
  draws: int = 5,
  folds: int = 0,
  num_neighbors: int = 0,
  seed: int = 0,
  batch_size: int = 0,
  output: str = "",
) -> dict:
  """Trains and tests classifiers on frozen features; prints a table.

  Args:
    checkpoint: the directory of a run; either this or features.
    features: a file from `embed`, or with "features" [n, C] and "labels" [n].
    test_features: another one, to test on.
    layer: of the run's network: "h", "head_k" or "z".
    probe_names: some of "knn", "linear" and "ridge", or one of them.
    per_class: numbers of labels a class to train on, beside all of them, or
      one number.
    draws: how often those are drawn.
    folds: of cross-validation; 0: none where there are images to test on,
      else 5.
    num_neighbors: of knn; 0: as the run has it, or 20.
    seed: of draws and folds.
    batch_size: images over all devices; 0: 64 a device.
    output: a new JSON file for the result; its folder is made. "": none.

  Returns:
    {"results": [{"protocol", "num_labels", "num_test", "top1", "top1_std",
    "top5", "top5_std", "runs"}, ..], ..}: fractions in [0, 1], or null.

  Raises:
    UserError: a mistake in the arguments or the files, or too few labels.

  >>> scores = evaluate(checkpoint="runs/finetuned", probe_names=["ridge"])
  protocol...
  >>> [row["protocol"] for row in scores["results"]]
  ['classifier of the run', 'linear (closed form)']
  """
  probe_names = [probe_names] if isinstance(probe_names, str) else probe_names
  per_class = [per_class] if isinstance(per_class, int) else per_class
  for name in probe_names:
    if name not in PROBES:
      raise UserError(
        f'--probes: there is no "{name}"{nearest(name, list(PROBES))} They '
        f"are {', '.join(PROBES)}."
      )
  if bool(checkpoint) == bool(features):
    raise UserError("give either --checkpoint=DIR or --features=FILE")
  if features and (layer != "h" or batch_size):
    raise UserError("--layer and --batch_size go with --checkpoint")
  if test_features and (checkpoint or folds):
    raise UserError("--test_features goes with --features, without --folds")
  if draws < 1 or folds < 0 or folds == 1 or num_neighbors < 0:
    raise UserError(
      f"--draws={draws} must be 1 or more, --folds={folds} 2 or more (0: "
      f"none) and --num_neighbors={num_neighbors} not negative"
    )
  if not 0 <= seed < 2**32:  # scikit-learn takes no other
    raise UserError(f"--seed: got {seed}, must be from 0 to {2**32 - 1}")
  is_writer = jax.process_index() == 0
  hosts.agree(_problem_of(output) if output and is_writer else "")
  if checkpoint:
    train, test, about = _of_run(checkpoint, layer, folds, batch_size)
  else:
    train, *rest = feature_file.read_to_fit(features, test_features)
    test = rest[0] if rest else None
    about = {"features": features, "test_features": test_features}
    about |= train.about
  about["num_neighbors"] = k = num_neighbors or about.get("num_neighbors") or 20
  folds = folds or (0 if test else _FOLDS)
  plans = _plans(train, test, per_class, draws, folds, seed)
  rows = _classifier(test or train)
  for name in probe_names:
    probe, protocol = PROBES[name]
    options = {"k": k} if name == "knn" else {}
    options["num_classes"] = len(train.label_names)
    for suffix, splits in plans:
      runs = [probe(*split, **options) for split in splits]
      rows.append(_row(protocol + suffix, runs, splits))
  result = about | {"seed": seed, "results": rows} | provenance()
  if is_writer:
    print(_table(rows), flush=True)
    if output:
      try:
        path = Path(output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
          file.write(json.dumps(result, indent=2) + "\n")
      except OSError as error:
        raise UserError(
          f"--output={output} cannot be written: {error.strerror}"
        ) from None
  return result


def _problem_of(output) -> str:
  """Why this file cannot be made, or ""."""
  if "://" in str(output):
    return f"--output={output} must be a local file"
  path = Path(output).expanduser()
  if os.path.lexists(path):
    return (
      f"--output={output} exists already and is left as it is; give another"
    )
  folder = next(p for p in path.absolute().parents if os.path.lexists(p))
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    return f"--output={output}: {folder} is no folder to write to"
  return ""


def _of_run(checkpoint, layer, folds, batch_size):
  """(training features, evaluation features or None, about) of a run."""
  net = network.load(checkpoint)
  network.check_layer(net, layer)
  fields = net.config.data
  options = {k: fields[k] for k in ("data_dir", "labels", "eval_fraction")}

  def features(split):
    source = network.open_source(net, fields.name, split=split, **options)
    if source.labels is not None:
      source = source.select(np.flatnonzero(source.labels >= 0))
    if not source.num_classes or not len(source):
      raise UserError(
        f'{fields.name} has no labelled image in split "{split}"'
        f"{labels_needed(fields.name)}"
      )
    batches = list(
      network.stream(
        net,
        source,
        layer=layer,
        batch_size=at_most(
          batch_size, num_examples=len(source), num_devices=jax.device_count()
        ),
        on_skip=print if fields.on_error == "skip" else None,
      )
    )
    kept = np.concatenate([b.pop("kept") for b in batches])
    found = {
      k: np.concatenate([b[k] for b in batches])[kept] for k in batches[0]
    }
    predictions = found.get("predictions")
    if predictions is not None:
      # The classifier's classes are numbered as its own dataset was.
      has_all = {*source.label_names} <= {*net.label_names}
      predictions = (
        feature_file.renumber(predictions, net.label_names, source.label_names)
        if has_all
        else None
      )
    return Features(
      features=found["features"],
      labels=found["labels"],
      label_names=source.label_names,
      predictions=predictions,
      about={},
    )

  about = {
    "checkpoint": {k: net.about[k] for k in ("workdir", "step", "hash")},
    "stage": net.config.stage,
    "data": fields.name,
    "layer": layer,
  }
  if "knn" in net.config:
    about["num_neighbors"] = net.config.knn.num_neighbors
  train, test = features(fields.split), None
  if fields.eval_split and not folds:
    test = features(fields.eval_split)
  return train, test, about


def _plans(train, test, per_class, draws, folds, seed):
  """[(end of the protocol's name, [(x, y, test x, test y), ..]), ..]."""
  labelled = np.flatnonzero(train.labels >= 0)
  x, y = train.features[labelled], train.labels[labelled]
  classes, counts = np.unique(y, return_counts=True)
  if len(classes) < 2:
    raise UserError(
      f"the training images have labels of {len(classes)} classes; it takes "
      "two or more"
    )

  def need(option, number, least):
    if number < least:
      raise UserError(f"{option}: got {number}, must be {least} or more")
    fewest, name = min(zip(counts.tolist(), classes.tolist(), strict=True))
    if fewest < number:
      many = f"ask for at most {fewest}: {option}={fewest}"
      raise UserError(
        f'{option}: {number} asked for, but class "{train.label_names[name]}" '
        f"has {fewest} labelled image{'s' * (fewest > 1)}; "
        f"{many if fewest >= least else 'label more of it'}"
      )

  def split(chosen, rest):
    if test is not None:
      return x[chosen], y[chosen], test.features, test.labels
    return x[chosen], y[chosen], x[rest], y[rest]

  everything = np.arange(len(y))
  if folds:
    need("--folds", folds, 2)
    splitter = model_selection.StratifiedKFold(
      folds, shuffle=True, random_state=seed
    )
    plans = [(f" {folds} folds", [split(*s) for s in splitter.split(x, y)])]
  else:
    plans = [("", [split(everything, ())])]
  for number in per_class:
    need("--per_class", number, 1)
    splits = []
    for draw in range(draws):
      chosen = data.label_subset(y, per_class=number, seed=seed + draw)
      splits.append(split(chosen, np.setdiff1d(everything, chosen)))
    plans.append((f" {number} per class", splits))
  return plans


def _classifier(rated: Features) -> list[dict]:
  """The row of the predictions that came with the features, if any."""
  labelled = rated.labels >= 0
  if rated.predictions is None or not labelled.any():
    return []
  hits = rated.predictions[labelled] == rated.labels[labelled]
  row: dict = {"protocol": "classifier of the run", "num_labels": None}
  row |= {"num_test": int(labelled.sum()), "top1": float(hits.mean())}
  return [row | dict.fromkeys(("top1_std", "top5", "top5_std"), None)]


def _row(protocol, runs, splits):
  row = {"protocol": protocol}
  for name, index in (("num_labels", 1), ("num_test", 3)):
    numbers = [int((split[index] >= 0).sum()) for split in splits]
    row[name] = round(sum(numbers) / len(numbers))
  for name in ("top1", "top5"):
    values = [run[name] for run in runs]
    row[name] = float(np.mean(values))
    several = len(values) > 1
    row[f"{name}_std"] = float(np.std(values, ddof=1)) if several else None
  return row | {"runs": runs}


def _table(rows) -> str:
  def percent(row, name):
    if row[name] is None:
      return "-"
    spread = row[f"{name}_std"]
    return f"{row[name]:.1%}" + (
      "" if spread is None else f" ± {100 * spread:.1f}"
    )

  lines = [("protocol", "labels", "tested on", "top-1", "top-5")]
  for row in rows:
    labels = "-" if row["num_labels"] is None else str(row["num_labels"])
    cells = (row["protocol"], labels, str(row["num_test"]))
    lines.append((*cells, percent(row, "top1"), percent(row, "top5")))
  return "\n".join(overview.aligned(lines))


def main(argv=None) -> None:
  """The command; see the top of this file."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )

  def numbers(text):
    return [int(part) for part in text.split(",") if part]

  add = parser.add_argument
  add("--checkpoint", default="", help="the directory of a run")
  add("--features", default="", help="a file from simclr_jax.embed")
  add("--test_features", default="", help="another one, to test on")
  add("--layer", default="h", help="of the run: h, head_1, .. or z")
  add("--probes", default=",".join(PROBES), help="default: %(default)s")
  add("--per_class", type=numbers, default=[], help="such as 1,5,10")
  add("--draws", type=int, default=5, help="of those; default: 5")
  add("--folds", type=int, default=0, help="of cross-validation")
  add("--num_neighbors", type=int, default=0, help="default: the run's, or 20")
  add("--seed", type=int, default=0, help="of draws and folds")
  add("--batch_size", type=int, default=0, help="images over all devices")
  add("--output", default="", help="a new JSON file; default: none")
  args = vars(parser.parse_args(argv))
  probe_names = [name for name in args.pop("probes").split(",") if name]
  with errors.ending():
    cli.setup()
    with hosts.together():
      evaluate(probe_names=probe_names, **args)


if __name__ == "__main__":
  main()
