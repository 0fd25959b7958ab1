"""How fast images get to the device: the table of rates of the data pipeline.

Each line is a measurement of its own; what is compared takes turns in one run,
and medians are printed. Photographs are synthetic: smooth with some noise, so
that a JPEG of 500x375 pixels has the 100 kB of a photograph's.

  python benchmarks/data.py memory wait                (seconds)
  python benchmarks/data.py cifar10 --data_dir=DIR     (a minute)
  python benchmarks/data.py stream threads --peer=PYTHON --output=data.json
  python benchmarks/data.py records                    (minutes, to write them)

`--peer` names the Python of another environment, with torch and torchvision.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image

from simclr_jax import data, datasets, sources
from simclr_jax.sources import decode, workers


def seconds_of(fn):
  begin = time.perf_counter()
  fn()
  return time.perf_counter() - begin


def alternating(forms, rounds):
  """{name: median seconds} of functions that take turns, after one round."""
  taken = {name: [] for name in forms}
  for _ in range(rounds + 1):
    for name, fn in forms.items():
      taken[name].append(seconds_of(fn))
  return {name: statistics.median(v[1:]) for name, v in taken.items()}


def row(measure, value, unit="", *, at_least=None, at_most=None):
  """A line of the table; without a limit it is there to compare with."""
  holds = value >= at_least if at_least else value <= (at_most or value)
  asked = f">= {at_least}" if at_least else f"<= {at_most}" if at_most else ""
  return dict(
    measure=measure,
    value=float(f"{value:.4g}"),
    unit=unit,
    asked=asked,
    holds=bool(holds) if asked else None,
  )


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
  height, width = shape
  y, x = np.mgrid[0:height, 0:width] / 50

  def write(i):
    rng = np.random.default_rng(i)
    waves = [np.sin(x * a + y * b + i) for a, b in rng.uniform(0, 3, (3, 2))]
    pixels = 128 + 60 * np.stack(waves, -1) + rng.normal(0, 16, (*shape, 3))
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(Path(folder) / f"{i:05}.jpg", quality=90)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(write, range(num_images)))
  return sources.make_source(f"folder:{folder}", split="train")


# -- the lines ----------------------------------------------------------------


def measure_memory(args):
  """In memory: batches ready for the device, shuffled and sharded."""
  from simclr_jax import parallel

  dataset = cifar_like()
  batch_size, num_steps = 512, 400

  def run():
    batches = data.train_batches(
      dataset, seed=0, batch_size=batch_size, start_step=0, num_steps=num_steps
    )
    for batch in parallel.prefetch(batches):
      batch["image"].block_until_ready()

  rate = num_steps * batch_size / alternating({"": run}, args.rounds)[""]
  yield row("CIFAR-10 in memory", rate, "images/s", at_least=600_000)


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

  num_steps = 10 * args.rounds + 3
  batches = parallel.prefetch(
    data.train_batches(
      dataset, seed=0, batch_size=128, start_step=0, num_steps=num_steps
    )
  )
  waits, steps = [], []
  for _ in range(num_steps):
    begin = time.perf_counter()
    batch = next(batches)
    waits.append(time.perf_counter() - begin)
    step(batch["image"]).block_until_ready()
    steps.append(time.perf_counter() - begin)
  share = statistics.median(waits[3:]) / statistics.median(steps[3:])
  yield row("input wait of a step", 100 * share, "% of it", at_most=5)


def measure_cifar10(args):
  """The prepared records decoded into memory; the second start."""
  source = sources.make_source(
    "tfds:cifar10", split="train", data_dir=args.data_dir
  )
  fast = decode.simplejpeg
  for name, decoder, limit in (("Pillow", None, 25), ("simplejpeg", fast, 12)):
    if name == "simplejpeg" and fast is None:
      continue
    decode.simplejpeg, times = decoder, []
    for _ in range(args.rounds):
      with tempfile.TemporaryDirectory() as folder:
        start = functools.partial(
          data.open_dataset, source, canvas_size=32, cache_dir=folder
        )
        times.append((seconds_of(start), seconds_of(start)))
    first, second = np.median(times, axis=0)
    yield row(f"CIFAR-10 decoded, {name}", first, "s", at_most=limit)
    yield row(f"second start, {name}", second, "s", at_most=2)
  decode.simplejpeg = fast


def peer(python, folder):
  """A function that has torchvision's loader make two views of each image."""
  process = subprocess.Popen(
    [python, Path(__file__).with_name("torchvision_loader.py"), folder],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def turn(expected="done"):
    if expected == "done":
      process.stdin.write("\n")
      process.stdin.flush()
    assert process.stdout.readline().strip() == expected

  turn("ready")
  return turn


def measure_stream(args):
  """500x375 JPEGs to a 256 canvas on one core; packed; against torchvision."""
  fast, cores = decode.simplejpeg, os.sched_getaffinity(0)
  ends = {", Pillow": None} | ({", simplejpeg": fast} if fast else {})
  os.sched_setaffinity(0, {min(cores)})  # also of torchvision's process
  workers.threads.cache_clear()
  with tempfile.TemporaryDirectory() as temporary:
    folder, out = Path(temporary, "images"), Path(temporary, "out")
    (folder / "class").mkdir(parents=True)
    source = photos(folder / "class", args.images)
    datasets.pack({"train": source}, output=out, canvas_size=256)
    packed = sources.make_source(
      "tfds:packed", split="train", data_dir=str(out)
    )
    size = sum(f.stat().st_size for f in folder.rglob("*.jpg"))

    def batches_of(source, decoder, epochs):
      num_steps = len(source) * epochs // 32

      def run():
        decode.simplejpeg = decoder
        batches = data.train_batches(
          data.Streamed(source, 256),
          seed=0,
          batch_size=32,
          start_step=0,
          num_steps=num_steps,
        )
        assert sum(1 for _ in batches) == num_steps
        decode.simplejpeg = fast

      return run

    forms, epochs = {}, {}
    for end, decoder in ends.items():
      for name, of, n in (("streamed", source, 1), ("packed", packed, 8)):
        forms[name + end] = batches_of(of, decoder, n)
        epochs[name + end] = n  # packed images take little time: 8 epochs
    if args.peer:
      forms["torchvision, two views"] = peer(args.peer, folder)
    seconds = alternating(forms, args.rounds)
  os.sched_setaffinity(0, cores)
  workers.threads.cache_clear()
  rate = {
    name: len(source) * epochs.get(name, 1) / value
    for name, value in seconds.items()
  }
  yield row("size of a photograph", size / len(source) / 1000, "kB")
  for name, value in rate.items():
    yield row(name, value, "images/s/core")
  for end in ends:
    one, packed = rate["streamed" + end], rate["packed" + end]
    yield row(f"packed over streamed{end}", packed / one, "x", at_least=5)
    if args.peer:
      ratio = one / rate["torchvision, two views"]
      yield row(f"streamed over torchvision{end}", ratio, "x", at_least=4)


def measure_threads(args):
  """Decoding by all threads, and by as many processes, over one thread."""
  cores = workers.num_cores()
  with tempfile.TemporaryDirectory() as folder:
    source = photos(folder, max(args.images, 32 * cores))
    parts = np.array_split(np.arange(len(source)), cores)

    def fetched(part):
      for i in part:
        source.fetch([i], max_size=256)

    def processes():
      children = []
      for part in parts:
        if not (child := os.fork()):
          fetched(part)
          os._exit(0)
        children.append(child)
      assert all(os.waitpid(child, 0)[1] == 0 for child in children)

    seconds = alternating(
      {
        # Before any thread is there, which a fork would lose.
        "processes": processes,
        "one": lambda: fetched(range(len(source))),
        "threads": lambda: list(workers.threads().map(fetched, parts)),
      },
      args.rounds,
    )
  for name in ("threads", "processes"):
    yield row(
      f"{cores} {name} over one",
      seconds["one"] / seconds[name],
      "x",
      at_least=12 if cores == 16 and name == "threads" else None,
    )


_RECORDS = """
import resource, sys, time
import numpy as np
from simclr_jax import data, sources
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2
tfds.list_builders(with_community_datasets=False)
scale = 1 if sys.platform == "darwin" else 1024
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
begin = time.perf_counter()
source = sources.make_source("tfds:packed", split="train", data_dir=sys.argv[1])
next(data.train_batches(data.Streamed(source, 8), seed=0, batch_size=256,
                        start_step=0, num_steps=1))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
print(len(source), time.perf_counter() - begin, (peak - base) / 2**30)
"""


def measure_records(args):
  """Start-up and memory with many records, up to the first batch."""
  source = sources.Source(
    name="synthetic",
    split="train",
    num_examples=args.records,
    read=lambda indices: [(np.zeros((8, 8, 3), np.uint8), 0) for _ in indices],
    describe=str,
    label_names=tuple("0123456789"),
    channels=3,
    fingerprint="synthetic",
  )
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.records_dir or temporary
    written = seconds_of(
      lambda: datasets.pack({"train": source}, output=folder, canvas_size=8)
    )
    found = []
    for _ in range(args.rounds):
      done = subprocess.run(
        [sys.executable, "-c", _RECORDS, folder],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
      )
      found.append([float(x) for x in done.stdout.split()])
  number, seconds, gib = np.median(found, axis=0)
  yield row("records", number)
  if not args.records_dir:  # those in a given folder may be older
    yield row("packing them", number / written, "records/s")
  yield row("start-up to the first batch", seconds, "s", at_most=10)
  yield row("memory above the baseline", gib, "GiB", at_most=1)


MEASURES = {
  "threads": measure_threads,
  "memory": measure_memory,
  "wait": measure_wait,
  "cifar10": measure_cifar10,
  "stream": measure_stream,
  "records": measure_records,
}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("lines", nargs="+", choices=[*MEASURES, "all"])
  parser.add_argument("--data_dir", default="", help="of TFDS, for cifar10")
  parser.add_argument("--peer", default="", help="a Python with torchvision")
  parser.add_argument("--images", type=int, default=128, help="photographs")
  parser.add_argument("--records", type=int, default=1_000_000)
  parser.add_argument("--records_dir", default="", help="to keep them in")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--output", default="", help="JSON")
  args = parser.parse_args()
  rows = []
  for name in MEASURES:
    for found in MEASURES[name](args) if {name, "all"} & {*args.lines} else ():
      rows.append(found)
      missed = "missed" if found["holds"] is False else ""
      print(
        f"{found['measure']:38} {found['value']:>10g} {found['unit']:14} "
        f"{found['asked']:9} {missed}",
        flush=True,
      )
  if args.output:
    about = {"cores": workers.num_cores(), "python": platform.python_version()}
    text = json.dumps({**about, "rows": rows}, indent=2)
    Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
  main()
