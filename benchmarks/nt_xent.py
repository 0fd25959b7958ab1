"""NT-Xent, value and gradient: all logits at once against blocks of them.

Memory is read off the compiled programs and needs none itself; time is measured
in one process, the forms alternating. Prints a table with medians and the
spread, and writes JSON.

  python benchmarks/nt_xent.py --pairs=2048 --rounds=9 --output=nt_xent.json
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import rounds

from simclr_jax import cli, losses


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


def main():
  cli.setup()
  parser = rounds.parser(__doc__)
  parser.set_defaults(rounds=9)
  parser.add_argument("--dim", type=int, default=128)
  parser.add_argument("--memory_pairs", type=int, default=16384)
  parser.add_argument("--pairs", type=int, default=2048, help="for the time")
  parser.add_argument(
    "--block_sizes", type=int, nargs="+", default=[64, 128, 256]
  )
  args = parser.parse_args()

  z = jax.random.normal(jax.random.key(0), (2, args.pairs, args.dim))

  def form(block_size):
    step = make_step(block_size)
    return lambda: rounds.seconds_of(lambda: jax.block_until_ready(step(z)))

  sizes = [0, *args.block_sizes]  # 0 is the plain form
  seconds = rounds.alternate({size: form(size) for size in sizes}, args.rounds)
  device = jax.devices()[0].device_kind
  print(f"jax {jax.__version__} on {device}, D = {args.dim}")
  print(
    f"{'block':>6}  {'MiB at ' + str(args.memory_pairs):>12}  {'1/plain':>8}  "
    f"{'ms at ' + str(args.pairs):>11}  {'min..max':>15}  {'/plain':>6}"
  )
  plain_bytes = temporary_bytes(args.memory_pairs, args.dim, 0)
  lines = []
  for size in sizes:
    memory = temporary_bytes(args.memory_pairs, args.dim, size)
    median = statistics.median(seconds[size])
    # Of each round, because the machine's speed drifts.
    ratio = statistics.median(
      a / b for a, b in zip(seconds[size], seconds[0], strict=True)
    )
    spread = f"{1e3 * min(seconds[size]):.0f}..{1e3 * max(seconds[size]):.0f}"
    print(
      f"{size or 'plain':>6}  {memory / 2**20:>12.0f}  "
      f"{plain_bytes / memory:>8.1f}  {1e3 * median:>11.1f}  {spread:>15}  "
      f"{ratio:>6.2f}"
    )
    if size:
      title = f"NT-Xent in blocks of {size} over plain"
      lines += [
        {
          "title": f"{title}: bytes at {args.memory_pairs} pairs",
          "bytes": memory,
          "ratio": memory / plain_bytes,
          "at_most": 1 / 20,
        },
        {
          "title": f"{title}: time at {args.pairs} pairs",
          "seconds": seconds[size],
          "seconds_plain": seconds[0],
          "ratio": ratio,
          "at_most": 1.4,
        },
      ]
  rounds.write(lines, args)


if __name__ == "__main__":
  main()
