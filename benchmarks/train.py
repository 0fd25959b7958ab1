"""Training end to end, from stored images to updates, against lightly's.

  python benchmarks/train.py --peers=peers/bin/python --data_dir=DIR
  python benchmarks/train.py --peers=peers/bin/python --cases jpegs

Ours is what a run does: batches gathered on the host, two of them prefetched,
views made in the step, metrics read one step late. Theirs is lightly's
transform in the workers of a DataLoader (2 for small images, one a core for
JPEGs) and the same network, lightly's loss and SGD. Neither reads ahead of its
round, which would take from the other's.

cifar10: a narrow ResNet-18, where input matters, on CIFAR-10's records (of TFDS
in --data_dir; without it on random images of the same size). jpegs: ResNet-50
at 224 pixels on synthetic 500x375 JPEGs (some 100 kB each), streamed; for GPUs.
A round has two batches for each of 16 workers: a worker makes whole ones.
"""

import collections
import itertools
import os
import tempfile
from pathlib import Path

import data as data_benchmark
import jax
import numpy as np
import rounds

from simclr_jax import cli, data, parallel, sources

# name: recipe, depth, width, side, batch, steps a round, at least
CASES = {
  "cifar10": ("cifar10", 18, 0.25, 32, 128, 24, 2),
  "jpegs": ("imagenet", 50, 1.0, 224, 512, 32, 3),
}


def make_form(config, dataset, steps):
  step, state, key = rounds.pretraining(config)
  holder, count = [state], itertools.count()

  def one_round():
    first = next(count) * steps
    batches = parallel.prefetch(
      data.train_batches(
        dataset,
        seed=0,
        batch_size=config.batch_size,
        start_step=first,
        num_steps=first + steps,
      )
    )
    unread = collections.deque()
    for batch in batches:
      holder[0], metrics = step(holder[0], batch, key)
      unread.append(metrics["loss"])
      if len(unread) > 1:
        parallel.unreplicate(unread.popleft())
    jax.block_until_ready(holder[0])

  return lambda: rounds.seconds_of(one_round)


def open_images(case, config, folder, args):
  """(our dataset, what the peer reads)."""
  if case == "jpegs":
    source = data_benchmark.photos(f"{folder}/jpegs", args.images)
    canvas = config.data.canvas_size = 256
    return data.Streamed(source, canvas), f"{folder}/jpegs"
  if args.data_dir:
    source = sources.make_source(
      "tfds:cifar10", split="train", data_dir=args.data_dir
    )
    dataset = data.open_dataset(source, canvas_size=32, cache_dir=folder)
  else:
    dataset = data_benchmark.cifar_like()
  file = f"{folder}/images.npy"
  np.save(file, dataset.images)
  return dataset, file


def main():
  cli.setup()
  parser = rounds.parser(__doc__)
  default = ["cifar10"]
  if jax.default_backend() != "cpu":
    default.append("jpegs")
  parser.add_argument("--cases", nargs="+", choices=CASES, default=default)
  parser.add_argument("--data_dir", default="", help="of TFDS, with cifar10")
  parser.add_argument("--images", type=int, default=2048, help="JPEGs")
  args = parser.parse_args()
  lines, versions = [], {}
  for case in args.cases:
    recipe, depth, width, side, batch, steps, wanted = CASES[case]
    config = cli.load_recipe(recipe, stage="pretrain")
    config.batch_size = batch
    config.data.image_size = side
    config.model.update(depth=depth, width=width)
    with tempfile.TemporaryDirectory() as folder:
      (Path(folder) / "jpegs").mkdir()
      dataset, path = open_images(case, config, folder, args)
      forms = {"simclr_jax": make_form(config, dataset, steps)}
      with rounds.maybe_peer(
        args.peers,
        "train",
        path=path,
        depth=depth,
        width=width,
        size=side,
        strength=config.augment.strength,
        blur=config.augment.blur_probability,
        batch=batch,
        steps=steps,
        workers=2 if case == "cifar10" else os.cpu_count(),
        compile=False,  # it waits for its workers
      ) as (lightly, found):
        if lightly:
          forms["lightly"], versions = lightly, found
        seconds = rounds.alternate(forms, args.rounds)
    lines.append(
      rounds.report(
        f"end to end: ResNet-{depth} x{width:g}, {side} pixels, {case}, batch "
        f"{batch}",
        seconds,
        count=steps * batch,
        ours="simclr_jax",
        at_least={"lightly": wanted},
      )
    )
  rounds.write(lines, args, peers=versions)


if __name__ == "__main__":
  main()
