"""Curves of healthy pretraining runs, for docs/results.md.

  python benchmarks/curves.py --output=docs/images/healthy.svg \\
      "digits=runs/digits/pretrain" "cifar10,tiny=runs/cifar10_cpu/pretrain_0"

A row for each run: loss with the value of a network that knows nothing,
contrastive accuracy, accuracy of the probe on its batch, learning rate. The
vertical line is the end of the warm-up.
"""

import argparse
import json
import pathlib

import matplotlib as mpl
from matplotlib.figure import Figure

from simclr_jax import metrics

PANELS = {
  "loss": "loss",
  "contrastive_accuracy": "contrastive accuracy",
  "probe_accuracy": "accuracy of the probe",
  "learning_rate": "learning rate",
}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
  parser.add_argument("--output", type=pathlib.Path, required=True)
  args = parser.parse_args()
  runs = [
    (name, pathlib.Path(folder))
    for name, folder in (run.rsplit("=", 1) for run in args.runs)
  ]
  figure = Figure(figsize=(11, 2.3 * len(runs)), layout="constrained")
  grid = figure.subplots(len(runs), len(PANELS), squeeze=False)
  for row, (name, folder) in zip(grid, runs, strict=True):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    config = json.loads((folder / "config.json").read_text())
    uniform = metrics.uniform_loss(config["batch_size"])
    peak = max(records, key=lambda record: record.get("learning_rate", 0))
    for axes, (field, title) in zip(row, PANELS.items(), strict=True):
      points = [(r["step"], r[field]) for r in records if field in r]
      axes.plot(*zip(*points, strict=True), lw=1.4)
      axes.axvline(peak["step"], color="0.7", lw=0.8)
      if field == "loss":
        axes.axhline(uniform, color="0.4", lw=0.9, ls="--")
      axes.set_title(title, fontsize=9)
      axes.tick_params(labelsize=8)
      axes.grid(alpha=0.3)
    row[0].set_ylabel(name)
  for axes in grid[-1]:
    axes.set_xlabel("step", fontsize=8)
  args.output.parent.mkdir(parents=True, exist_ok=True)
  with mpl.rc_context({"svg.hashsalt": "curves"}):
    figure.savefig(args.output, metadata={"Date": None})
  print(args.output)


if __name__ == "__main__":
  main()
