"""Whether a small encoder learns from a fifth of CIFAR-10, on a CPU.

  python benchmarks/cifar10_cpu.py [--workdir=runs/cifar10_cpu] [--seeds=0,1,2]
      [--epochs=50] [--output=FILE.json]

For each seed: the recipe cifar10,tiny; the linear accuracy of its encoder and
of the same encoder untrained (a run of one step, whose learning rate is 0);
500 labels (1%) fine-tuned from it and from scratch, with the same settings.
Every run is an ordinary one: killed, the same command continues. Exit code 1
where the gain over the untrained encoder is below 12 points or that over from
scratch below 8, for any seed. Needs TFDS_DATA_DIR with cifar10.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from simclr_jax import cli, evaluate, finetune, pretrain
from simclr_jax.config import UserError
from simclr_jax.provenance import provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKS = {"linear": 0.12, "finetune": 0.08}  # gains
NETWORK = {
  "model.depth": 18,
  "model.width": 0.25,
  "data.image_size": 16,
  "data.canvas_size": 32,
}
# For 500 labels. The recipe's batch of 512 would make 59 steps, too few to
# train anything from scratch; at 16 pixels a crop of less than half shows
# little.
FEW = {
  "batch_size": 64,
  "num_epochs": 60,
  "augment.area_range": (0.5, 1.0),
  "head_layer": 0,
  "optim.learning_rate": 0.01,
}


def train(module, recipe, workdir, **fields):
  """Trains unless that is done; returns top-1."""
  stage = module.__name__.rpartition(".")[2]
  flags = [f"--config={stage}.py:{recipe}", f"--workdir={workdir}"]
  flags += [f"--config.{k}={v}" for k, v in fields.items()]
  config, _ = cli.parse(flags, stage=stage)
  return module.train_and_evaluate(config, workdir)["top1"]


def linear(run):
  """Top-1 of logistic regression on the features of a run's encoder."""
  file = run / "linear.json"
  if not file.exists():
    evaluate.evaluate(
      checkpoint=str(run), probe_names=["linear"], output=str(file)
    )
  rows = json.loads(file.read_text())["results"]
  return next(r["top1"] for r in rows if r["protocol"].startswith("linear"))


def one_seed(workdir, seed, epochs):
  """All runs of a seed: {name: top-1}."""
  encoder, untrained = workdir / f"pretrain_{seed}", workdir / f"random_{seed}"
  few = FEW | {"seed": seed}
  tiny = "cifar10,tiny"
  knn = train(pretrain, f"{tiny},epochs={epochs:g}", encoder, seed=seed)
  train(pretrain, tiny, untrained, seed=seed, num_steps=1)
  return {
    "seed": seed,
    "knn": knn,
    "linear": linear(encoder),
    "untrained": linear(untrained),
    "finetune": train(
      finetune,
      "cifar10,labels=1",
      workdir / f"finetune_{seed}",
      pretrained=encoder,
      **few,
    ),
    "scratch": train(
      finetune,
      "cifar10,labels=1",
      workdir / f"scratch_{seed}",
      **NETWORK,
      **few,
    ),
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--workdir", type=pathlib.Path, default=ROOT / "runs" / "cifar10_cpu"
  )
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--epochs", type=float, default=50)
  parser.add_argument("--output", type=pathlib.Path)
  args = parser.parse_args()
  cli.setup()
  begin = time.perf_counter()
  rows = [
    one_seed(args.workdir.absolute(), int(seed), args.epochs)
    for seed in args.seeds.split(",")
  ]
  gains = {
    "linear": [row["linear"] - row["untrained"] for row in rows],
    "finetune": [row["finetune"] - row["scratch"] for row in rows],
  }
  result = {
    "epochs": args.epochs,
    "seeds": rows,
    "gains": gains,
    "marks": MARKS,
    "seconds": round(time.perf_counter() - begin),  # of this start
    **provenance(),
  }
  text = json.dumps(result, indent=2) + "\n"
  print(text)
  if args.output:
    args.output.write_text(text)
  failed = [name for name, mark in MARKS.items() if min(gains[name]) < mark]
  for name, values in gains.items():
    spread = f" +- {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    print(
      f"{name}: gains {statistics.mean(values):.1%}{spread}, at least "
      f"{min(values):.1%} of {MARKS[name]:.0%}"
      + (": FAILED" if name in failed else "")
    )
  return 1 if failed else 0


if __name__ == "__main__":
  try:
    sys.exit(main())
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
