"""The training step on a CPU with XLA's convolution and with cpu_conv.

One process, the variants alternating; prints the median time of a step
(network forward and backward and a momentum update), the spread and the compile
time, and writes JSON.

  python benchmarks/cpu_conv.py --case=digits --rounds=7 --output=cpu_conv.json
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp

from simclr_jax import cli, losses, models

# name: images a step (two views), width, side, channels
CASES = {
  "digits": (512, 0.25, 16, 1),
  "cifar10": (128, 1.0, 32, 3),
  "narrow": (128, 0.25, 32, 3),
}
VARIANTS = ("lax", "cpu_conv")


def compile_step(case, variant):
  """The compiled step of (params, momentum, stats, images), and its state."""
  n, width, side, channels = CASES[case]
  model = models.make_model(
    depth=18,
    stem="cifar",
    width=width,
    conv="xla" if variant == "lax" else "cpu",
  )
  images = jax.random.uniform(jax.random.key(0), (n, side, side, channels))

  def loss_fn(params, stats, images):
    variables = {"params": params, "batch_stats": stats}
    outputs, updated = model.apply(
      variables, images, train=True, mutable=["batch_stats"]
    )
    z1, z2 = jnp.split(outputs["z"], 2)
    loss, _ = losses.nt_xent(z1, z2, temperature=0.5)
    return loss, updated["batch_stats"]

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
  def step(params, momentum, stats, images):
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, stats, images
    )
    add = functools.partial(jax.tree.map, lambda m, g: 0.9 * m + g)
    momentum = add(momentum, grads)
    params = jax.tree.map(lambda p, m: p - 1e-4 * m, params, momentum)
    return params, momentum, stats, loss

  # The widths alone decide the state, so it is made without a compilation.
  shapes = jax.eval_shape(model.init, jax.random.key(1), images)
  keys = iter(jax.random.split(jax.random.key(2), 500))
  variables = jax.tree.map(
    lambda s: 0.05 * jax.random.normal(next(keys), s.shape), shapes["params"]
  )
  ones = jax.tree.map(lambda s: jnp.ones(s.shape), shapes["batch_stats"])
  zeros = jax.tree.map(jnp.zeros_like, variables)
  state = (variables, zeros, ones)
  start = time.perf_counter()
  lowered = step.lower(*state, images)
  traced = time.perf_counter()
  compiled = lowered.compile()
  seconds = (traced - start, time.perf_counter() - traced)
  return compiled, state, images, seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--case", choices=CASES, default="digits")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--variants", default=",".join(VARIANTS))
  parser.add_argument("--output", default="")
  args = parser.parse_args()
  cli.setup()
  rows = {}
  for variant in args.variants.split(","):
    compiled, state, images, seconds = compile_step(args.case, variant)
    *state, loss = compiled(*state, images)  # warm up
    rows[variant] = {
      "step": compiled,
      "state": state,
      "images": images,
      "trace_seconds": seconds[0],
      "compile_seconds": seconds[1],
      "first_loss": float(loss),
      "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
      "seconds": [],
    }
  for _ in range(args.rounds):
    for row in rows.values():
      start = time.perf_counter()
      *row["state"], loss = row["step"](*row["state"], row["images"])
      loss.block_until_ready()
      row["seconds"].append(time.perf_counter() - start)
  for row in rows.values():
    for name in ("step", "state", "images"):
      del row[name]
    row["median"] = statistics.median(row["seconds"])
  base = next(iter(rows.values()))
  print(f"{args.case}: jax {jax.__version__}, {args.rounds} rounds")
  for name, row in rows.items():
    ratios = [
      a / b for a, b in zip(base["seconds"], row["seconds"], strict=True)
    ]
    row["speedup"] = statistics.median(ratios)
    print(
      f"{name:18s} step {1e3 * row['median']:7.0f} ms"
      f" ({1e3 * min(row['seconds']):.0f}..{1e3 * max(row['seconds']):.0f})"
      f"  {row['speedup']:.2f}x  trace {row['trace_seconds']:.1f} s"
      f"  compile {row['compile_seconds']:.1f} s  temp"
      f" {row['temp_mib']:.0f} MiB  loss {row['first_loss']:.6f}"
    )
  if args.output:
    with open(args.output, "w") as file:
      json.dump({"case": args.case, "rows": rows}, file, indent=2)


if __name__ == "__main__":
  main()
