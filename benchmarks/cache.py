"""The first and the second start of one run: seconds to the first step.

  python benchmarks/cache.py --rounds=2 --output=cache.json

ResNet-50 at 224 pixels with the official recipe, in new processes that share an
empty cache of compiled programs, the second after the first. Counted from after
the imports: network, state, compilation and the first step of a small batch.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import rounds

from simclr_jax import cli


def first_step(batch_size: int) -> float:
  """Seconds to the end of step 1, in this process."""
  begin = time.perf_counter()
  cli.setup()
  config = cli.load_recipe("imagenet", stage="pretrain")
  config.batch_size = batch_size * jax.device_count()
  step, state, key = rounds.pretraining(config)
  jax.block_until_ready(step(state, rounds.batch_of(config), key))
  return time.perf_counter() - begin


def main():
  parser = rounds.parser(__doc__)
  parser.add_argument("--batch_size", type=int, default=2, help="a device's")
  parser.add_argument("--child", action="store_true", help="one start")
  args = parser.parse_args()
  if args.child:
    print(json.dumps(first_step(args.batch_size)))
    return
  command = [sys.executable, __file__, "--child"]
  command.append(f"--batch_size={args.batch_size}")
  seconds = {"first": [], "second": []}
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as folder:
      env = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
      for name in seconds:
        done = subprocess.run(
          command, env=env, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds[name].append(float(done.stdout.splitlines()[-1]))
  ratio = statistics.median(
    b / a for a, b in zip(seconds["first"], seconds["second"], strict=True)
  )
  title = "start to first step, ResNet-50 at 224 pixels"
  print(f"\n{title}")
  for name, taken in seconds.items():
    shown = ", ".join(f"{s:.1f}" for s in taken)
    print(f"  {name:8}{statistics.median(taken):7.1f} s  ({shown})")
  print(f"  second over first {ratio:.2f}, wanted at most 0.33")
  line = {"title": title, "seconds": seconds, "ratio": ratio, "at_most": 1 / 3}
  rounds.write([line], args)


if __name__ == "__main__":
  main()
