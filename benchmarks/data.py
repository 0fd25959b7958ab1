"""How fast images get to the device: the table of rates of the data pipeline.

Each line is a measurement of its own; ratios are of alternating rounds in one
process, and medians are printed. Pixels are synthetic, and smooth with some
noise, so that JPEGs have the size of photographs' (about 100 kB at 500x375).

  python benchmarks/data.py memory wait                (seconds)
  python benchmarks/data.py cifar10 --data_dir=DIR     (a minute)
  python benchmarks/data.py stream threads records --output=data.json
"""

import argparse
import functools
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image

from simclr_jax import data, datasets, sources
from simclr_jax.data import fetch
from simclr_jax.sources import decode


def seconds_of(fn):
  begin = time.perf_counter()
  fn()
  return time.perf_counter() - begin


def alternating(forms, rounds):
  """{name: median seconds} of functions that take turns."""
  taken = {name: [] for name in forms}
  for _ in range(rounds):
    for name, fn in forms.items():
      taken[name].append(seconds_of(fn))
  return {name: statistics.median(values) for name, values in taken.items()}


def cifar_like(num_examples=50_000):
  rng = np.random.default_rng(0)
  shape = (num_examples, 32, 32, 3)
  return data.Dataset(
    images=rng.integers(0, 256, shape, np.uint8),
    sizes=np.full((num_examples, 2), 32, np.int32),
    labels=rng.integers(0, 10, num_examples).astype(np.int32),
    label_names=tuple("0123456789"),
  )


def photos(folder, num_images, shape=(375, 500)):
  """JPEGs, as a source."""
  rng = np.random.default_rng(0)
  height, width = shape
  y, x = np.mgrid[0:height, 0:width] / 50
  for i in range(num_images):
    waves = [np.sin(x * a + y * b + i) for a, b in rng.uniform(0, 3, (3, 2))]
    pixels = 128 + 60 * np.stack(waves, -1) + rng.normal(0, 9, (*shape, 3))
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(Path(folder) / f"{i:05}.jpg", quality=90)
  return sources.make_source(f"folder:{folder}", split="train")


# -- the lines ----------------------------------------------------------------


def measure_memory(args):
  """Batches ready for the device, shuffled and sharded, images/s."""
  from simclr_jax import parallel

  dataset = cifar_like()
  batch_size = 512

  def run():
    batches = data.train_batches(
      dataset, seed=0, batch_size=batch_size, start_step=0, num_steps=200
    )
    for batch in parallel.prefetch(batches):
      batch["image"].block_until_ready()

  run()
  seconds = alternating({"run": run}, args.rounds)["run"]
  return {"images_per_second": 200 * batch_size / seconds, "at_least": 600_000}


def measure_wait(args):
  """The part of a small encoder's step that is spent waiting for input."""
  import jax
  import jax.numpy as jnp

  from simclr_jax import models, parallel

  dataset = cifar_like(10_000)
  model = models.make_model(depth=18, width=0.125, stem="cifar", dim=16)
  variables = jax.jit(model.init)(
    jax.random.key(0), jnp.zeros((2, 32, 32, 3), jnp.float32)
  )

  @jax.jit
  def step(images):
    def loss(params):
      outputs, _ = model.apply(
        {**variables, "params": params},
        images[0].astype(jnp.float32) / 255,
        train=True,
        mutable=["batch_stats"],
      )
      return jnp.mean(outputs["z"] ** 2)

    grads = jax.grad(loss)(variables["params"])
    return jax.tree.leaves(grads)[0].sum()

  batches = parallel.prefetch(
    data.train_batches(
      dataset, seed=0, batch_size=128, start_step=0, num_steps=23
    )
  )
  waits, steps = [], []
  for _ in range(20):
    begin = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - begin
    step(batch["image"]).block_until_ready()
    waits.append(waited)
    steps.append(time.perf_counter() - begin)
  share = statistics.median(waits[3:]) / statistics.median(steps[3:])
  return {"share_of_step": share, "at_most": 0.05}


def measure_cifar10(args):
  """The prepared records decoded into memory; the second start; seconds."""
  source = sources.make_source(
    "tfds:cifar10", split="train", data_dir=args.data_dir
  )
  result = {}
  fast = decode.simplejpeg
  for name, decoder, limit in (("pillow", None, 25), ("simplejpeg", fast, 12)):
    if name == "simplejpeg" and fast is None:
      continue
    decode.simplejpeg = decoder
    with tempfile.TemporaryDirectory() as folder:
      start = functools.partial(
        data.open_dataset, source, canvas_size=32, cache_dir=folder
      )
      first, second = seconds_of(start), seconds_of(start)
    result[name] = {
      "seconds": first,
      "at_most": limit,
      "second_start_seconds": second,
      "second_at_most": 2,
    }
  decode.simplejpeg = fast
  return result


def torchvision_views(files):
  """torchvision's loader, one process, two SimCLR views of each; or None."""
  try:
    import torch
    from torchvision import transforms as t
  except ImportError:
    return None
  jitter = t.ColorJitter(0.8, 0.8, 0.8, 0.2)
  view = t.Compose(
    [
      t.RandomResizedCrop(224),
      t.RandomHorizontalFlip(),
      t.RandomApply([jitter], 0.8),
      t.RandomGrayscale(0.2),
      t.RandomApply([t.GaussianBlur(23)], 0.5),
      t.ToTensor(),
    ]
  )
  torch.set_num_threads(1)

  def run():
    for file in files:
      with PIL.Image.open(file) as image:
        rgb = image.convert("RGB")
      view(rgb), view(rgb)

  return run


def measure_stream(args):
  """500x375 JPEGs to a 256 canvas by one thread, images/s; packed."""
  with tempfile.TemporaryDirectory() as folder:
    source = photos(folder, args.images)
    indices = range(len(source))
    out = Path(folder) / "out"
    datasets.pack({"train": source}, output=out, canvas_size=256)
    packed = sources.make_source(
      "tfds:packed", split="train", data_dir=str(out)
    )
    size = sum(f.stat().st_size for f in Path(folder).glob("*.jpg"))
    forms = {
      "unpacked": lambda: source.fetch(indices, max_size=256),
      "packed": lambda: packed.fetch(indices, max_size=256),
    }
    views = torchvision_views([source.describe(i) for i in indices])
    if views:
      forms["torchvision two views"] = views
    seconds = alternating(forms, args.rounds)
  rates = {name: len(source) / value for name, value in seconds.items()}
  result = {
    "kilobytes": size / len(source) / 1000,
    "images_per_second_and_core": rates,
    "packed_over_unpacked": rates["packed"] / rates["unpacked"],
    "packed_at_least": 5,
  }
  if views:
    result["over_torchvision"] = (
      rates["unpacked"] / rates["torchvision two views"]
    )
    result["torchvision_at_least"] = 4
  return result


def measure_threads(args):
  """Decoding by all threads over decoding by one."""
  cores = fetch.num_cores()
  with tempfile.TemporaryDirectory() as folder:
    source = photos(folder, max(args.images, 32 * cores))
    source.fetch(range(len(source)), max_size=256)

    def gather():
      # As a batch is streamed; the canvases are part of it.
      data.Streamed(source, 256).gather(np.arange(len(source)))

    seconds = alternating(
      {
        "one": lambda: [
          source.fetch([i], max_size=256) for i in range(len(source))
        ],
        "all": gather,
      },
      args.rounds,
    )
  return {
    "cores": cores,
    "times_one_thread": seconds["one"] / seconds["all"],
    "at_least": 12 if cores == 16 else None,
  }


_RECORDS = """
import resource, sys, time
import numpy as np
from simclr_jax import sources
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
tfds.list_builders(with_community_datasets=False)
scale = 1 if sys.platform == "darwin" else 1024
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
begin = time.perf_counter()
source = sources.make_source("tfds:packed", split="train", data_dir=sys.argv[1])
source.fetch(np.random.default_rng(0).integers(0, len(source), 256).tolist())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
print(len(source), time.perf_counter() - begin, (peak - base) / 2**30)
"""


def measure_records(args):
  """Start-up and memory with many records in one file, in a new process."""
  file = io.BytesIO()
  PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
  record = file.getvalue()
  source = sources.Source(
    name="synthetic",
    split="train",
    num_examples=args.records,
    read=lambda indices: [(record, i % 10) for i in indices],
    describe=str,
    label_names=tuple("0123456789"),
    channels=3,
    shape=(8, 8),
    fingerprint="synthetic",
  )
  with tempfile.TemporaryDirectory() as folder:
    datasets.pack({"train": source}, output=folder, canvas_size=8)
    done = subprocess.run(
      [sys.executable, "-c", _RECORDS, folder],
      capture_output=True,
      text=True,
      check=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
  number, seconds, gib = map(float, done.stdout.split())
  return {
    "records": number,
    "seconds": seconds,
    "at_most": 10,
    "gib_above_baseline": gib,
    "gib_at_most": 1,
  }


MEASURES = {
  "memory": measure_memory,
  "wait": measure_wait,
  "cifar10": measure_cifar10,
  "stream": measure_stream,
  "threads": measure_threads,
  "records": measure_records,
}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("lines", nargs="+", choices=[*MEASURES, "all"])
  parser.add_argument("--data_dir", default="", help="of TFDS, for cifar10")
  parser.add_argument("--images", type=int, default=64, help="photographs")
  parser.add_argument("--records", type=int, default=1_000_000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--output", default="", help="JSON")
  args = parser.parse_args()
  results = {}
  for name in MEASURES if "all" in args.lines else args.lines:
    results[name] = MEASURES[name](args)
    print(name, json.dumps(results[name], indent=2), flush=True)
  results["cores"] = fetch.num_cores()
  results["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  if args.output:
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  main()
