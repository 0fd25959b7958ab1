"""What the benchmarks share: forms that take turns, a peer's process, a table.

A peer runs in a process of its own, in an environment of its own, which is made
once (Python 3.11; PyTorch for your GPU, or a CPU build):

  python3.11 -m venv peers && alias pip=peers/bin/pip
  pip install torch==2.13.0 numpy pillow
  pip install --no-deps torchvision==0.28.0 kornia kornia_rs lightly \
      lightly_utils torchmetrics pytorch_lightning hydra-core aenum
  pip install einops lightning_utilities PyYAML rich tqdm requests pydantic \
      packaging psutil python-dateutil urllib3

and given as --peers=peers/bin/python.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import build, optimizers, parallel, pretrain


def parser(description: str) -> argparse.ArgumentParser:
  """With the flags that all scripts have."""
  made = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  made.add_argument("--peers", default="", help="Python of the peers; '': none")
  made.add_argument("--rounds", type=int, default=5)
  made.add_argument("--output", default="", help="a JSON file")
  return made


def seconds_of(fn, *args) -> float:
  begin = time.perf_counter()
  fn(*args)
  return time.perf_counter() - begin


@contextlib.contextmanager
def peer(python: str, work: str, **options):
  """Yields (a function that runs one round, its seconds; versions)."""
  script = Path(__file__).with_name("torch_peer.py")
  process = subprocess.Popen(
    [python, str(script), work, json.dumps(options)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def line():
    text = process.stdout.readline()
    if not text:
      sys.exit(f"the peer's process ended: {process.wait()}")
    return json.loads(text)

  def one_round():
    process.stdin.write("go\n")
    process.stdin.flush()
    return line()

  versions = line()
  try:
    yield one_round, versions
  finally:
    process.stdin.close()
    process.wait()


def maybe_peer(python: str, work: str, **options):
  """`peer`, or (None, {}) where no Python is given."""
  if not python:
    return contextlib.nullcontext((None, {}))
  return peer(python, work, **options)


@functools.cache
def floors() -> dict:
  """What this device can do: {"tflops": of bfloat16 or float32, "gbytes"}/s.

  The rate of one large matrix product, in bfloat16 on accelerators and float32
  on CPUs, and that of bytes read and written by a copy; the best of 5, each of
  some that are not waited for one by one. Random numbers: zeros are faster.
  """
  on_cpu = jax.default_backend() == "cpu"
  side, size, times = (2048, 2**26, 1) if on_cpu else (8192, 2**29, 10)
  dtype = jnp.float32 if on_cpu else jnp.bfloat16
  a = jax.random.normal(jax.random.key(0), (side, side), dtype)
  x = jax.random.normal(jax.random.key(1), (size,), jnp.float32)

  def best(fn, *args):
    def some():
      for _ in range(times):
        out = fn(*args)
      out.block_until_ready()

    some()
    return min(seconds_of(some) for _ in range(5)) / times

  return {
    "tflops": 2 * side**3 / best(jax.jit(jnp.matmul), a, a) / 1e12,
    "gbytes": 2 * x.nbytes / best(jax.jit(lambda x: -x), x) / 1e9,
  }


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}
_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


def bytes_moved(hlo: str) -> int:
  """Operands and results of all kernels of a compiled program, by its text.

  What runs in loops counts once.
  """

  def size(shape):
    found = re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shape)
    return sum(
      _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
      for kind, dims in found
    )

  entry = hlo[hlo.index("\nENTRY ") :]
  sizes, total = {}, 0
  line = re.compile(r"^ +(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*)$", re.M)
  for name, shape, kind, rest in line.findall(entry):
    sizes[name] = size(shape)
    if kind not in _FREE:
      operands = re.findall(r"%[\w.-]+", rest.split("), ")[0])
      total += sizes[name] + sum(sizes.get(o, 0) for o in operands)
  return total


def pretraining(config, *, channels: int = 3):
  """A config of pretraining to (mapped step, state, key), as a run has them."""
  build.resolve(config)
  classes = 10
  model = build.make_model(
    config,
    num_classes=classes if config.probe else None,
    head_layer=0,
    probe=True,
  )
  optimizer = optimizers.make_optimizer(
    config.optim.name,
    learning_rate=lambda step: 1e-3,
    weight_decay=config.optim.weight_decay,
  )
  variables = build.init(
    config, model, types.SimpleNamespace(channels=channels)
  )
  state = parallel.replicate(build.init_state(variables, optimizer))
  step = pretrain.make_step(config, model, optimizer, probe=config.probe)
  return (
    parallel.pmap(step, donate_argnums=0),
    state,
    parallel.replicate(jax.random.key(config.seed)),
  )


def batch_of(config, *, channels: int = 3) -> dict:
  """One batch of random pixels on the devices."""
  rng = np.random.default_rng(0)
  n, canvas = config.batch_size, config.data.canvas_size
  return parallel.shard(
    {
      "image": rng.integers(0, 256, (n, canvas, canvas, channels), np.uint8),
      "size": np.full((n, 2), canvas, np.int32),
      "label": rng.integers(0, 10, n).astype(np.int32),
    }
  )


def alternate(forms: dict, rounds: int) -> dict:
  """{name: seconds of each round}; every form runs once before.

  Each round begins with another form: what runs after a peer's round is slower.
  """
  seconds = {name: [] for name in forms}
  names = list(forms)
  for i in range(rounds + 1):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      taken = forms[name]()
      if i:
        seconds[name].append(taken)
  return seconds


def report(
  title: str, seconds: dict, *, count: int, ours: str, at_least: dict, **more
) -> dict:
  """Prints rates and ratios; returns what goes into JSON.

  Args:
    title: of the line.
    seconds: from `alternate`.
    count: images of a round.
    ours: the form that the others are compared with.
    at_least: peer -> the ratio wanted.
    **more: further JSON values.
  """
  print(f"\n{title}")
  rows = {}
  for name, taken in seconds.items():
    rates = [count / s for s in taken]
    row = {"images_per_second": statistics.median(rates), "seconds": taken}
    text = f"  {name:34}{row['images_per_second']:10.1f} images/s"
    text += f"  ({min(rates):.1f}..{max(rates):.1f})"
    if name != ours:
      ratios = [t / o for t, o in zip(taken, seconds[ours], strict=True)]
      row["ratio"] = statistics.median(ratios)
      row["ratio_range"] = (min(ratios), max(ratios))
      row["at_least"] = at_least.get(name)
      text += f"  {ours} is {row['ratio']:.2f}x"
      if row["at_least"]:
        text += f", wanted {row['at_least']:g}x"
    print(text, flush=True)
    rows[name] = row
  return {"title": title, "ours": ours, "rows": rows} | more


def write(lines: list[dict], args, **more) -> None:
  """Writes JSON where --output asks for it."""
  if args.output:
    found = {
      "command": sys.argv,
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "cores": os.cpu_count(),
      "python": platform.python_version(),
      "jax": jax.__version__,
      "lines": lines,
    }
    Path(args.output).write_text(json.dumps(found | more, indent=2) + "\n")
