"""NT-Xent, value and gradient: all logits at once against blocks of them.

Memory is read off the compiled programs and needs none itself; time is measured
in one process, the forms alternating. Prints a table with medians and the
spread, and writes JSON.

  python benchmarks/nt_xent.py --pairs=2048 --rounds=9 --output=nt_xent.json
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp

from simclr_jax import losses


def make_step(block_size):
  """Views [2, N, D] -> ((loss, metrics), gradient)."""

  def loss_fn(z):
    return losses.nt_xent(
      z[0], z[1], temperature=0.1, block_size=block_size or None
    )

  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@functools.cache
def temporary_bytes(num_pairs, dim, block_size):
  shape = jax.ShapeDtypeStruct((2, num_pairs, dim), jnp.float32)
  compiled = make_step(block_size).lower(shape).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def measure_seconds(num_pairs, dim, block_sizes, rounds):
  """{block size: seconds of each round}; every round runs every form once."""
  z = jax.random.normal(jax.random.key(0), (2, num_pairs, dim))
  steps = {size: make_step(size) for size in block_sizes}
  for step in steps.values():
    jax.block_until_ready(step(z))
  seconds = {size: [] for size in block_sizes}
  for _ in range(rounds):
    for size, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(z))
      seconds[size].append(time.perf_counter() - start)
  return seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--dim", type=int, default=128)
  parser.add_argument("--memory_pairs", type=int, default=16384)
  parser.add_argument("--pairs", type=int, default=2048, help="for the time")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument(
    "--block_sizes", type=int, nargs="+", default=[64, 128, 256]
  )
  parser.add_argument("--output", help="a JSON file")
  args = parser.parse_args()

  sizes = [0, *args.block_sizes]  # 0 is the plain form
  seconds = measure_seconds(args.pairs, args.dim, sizes, args.rounds)
  device = jax.devices()[0].device_kind
  print(f"jax {jax.__version__} on {device}, D = {args.dim}")
  print(
    f"{'block':>6}  {'MiB at ' + str(args.memory_pairs):>12}  {'1/plain':>8}  "
    f"{'ms at ' + str(args.pairs):>11}  {'min..max':>15}  {'/plain':>6}"
  )
  plain_bytes = temporary_bytes(args.memory_pairs, args.dim, 0)
  plain_seconds = seconds[0]
  rows = []
  for size in sizes:
    memory = temporary_bytes(args.memory_pairs, args.dim, size)
    median = statistics.median(seconds[size])
    # Of each round, because the machine's speed drifts.
    ratio = statistics.median(
      a / b for a, b in zip(seconds[size], plain_seconds, strict=True)
    )
    spread = f"{1e3 * min(seconds[size]):.0f}..{1e3 * max(seconds[size]):.0f}"
    print(
      f"{size or 'plain':>6}  {memory / 2**20:>12.0f}  "
      f"{plain_bytes / memory:>8.1f}  {1e3 * median:>11.1f}  {spread:>15}  "
      f"{ratio:>6.2f}"
    )
    rows.append(
      {
        "block_size": size,
        "temporary_bytes": memory,
        "seconds": seconds[size],
        "time_ratio": ratio,
      }
    )
  if args.output:
    with open(args.output, "w") as file:
      json.dump(
        {"device": device, "jax": jax.__version__, **vars(args), "rows": rows},
        file,
        indent=2,
      )


if __name__ == "__main__":
  main()
