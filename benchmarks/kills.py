"""Kills a small run again and again; it must end as one left alone does.

  python benchmarks/kills.py [--kills=100] [--seed=0]

Each life of the run is a forked process with two CPU devices that is ended by
SIGKILL: two of three at a random time, one of three while a checkpoint is being
written. A run that is complete is compared with one that was left alone (state,
metrics.jsonl, result.json but for its times), and the next one begins. Exit
code 1 where anything differs. The run is the toy of tests/test_loop.py.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import test_loop  # noqa: E402

from simclr_jax import logs, rundir  # noqa: E402

NUM_STEPS = 60
_TIMES = (*logs.TIMING, "seconds")


def life(workdir, sleep):
  """What one process does: the whole command of a run."""

  def batches(start):
    for batch in test_loop.batches(start):
      time.sleep(sleep)
      yield batch

  config = test_loop.make_config()
  rundir.claim(config, workdir)
  if rundir.finished(workdir, NUM_STEPS):
    return
  state, metrics = test_loop.train(
    workdir, NUM_STEPS, batches=batches, config=config
  )
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(state):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  rundir.write_result(
    workdir,
    dict(metrics, num_steps=NUM_STEPS, state=digest.hexdigest()),
  )


def start(workdir, *, sleep=0.01):
  """Forks a life; imports are done, so it trains within half a second."""
  if pid := os.fork():
    return pid
  code = 1
  try:
    with (workdir.parent / "output.txt").open("a") as file:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
    life(workdir, sleep)
    code = 0
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)


def half_written(workdir):
  """Names of the checkpoints that are not complete."""
  names = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")
  return {path.name for path in names}


def kill(pid, workdir, rng, *, during_save):
  """Returns (the exit code or None where it was killed, killed in a save)."""
  # What an earlier kill left, until the new life has cleaned it up.
  stale = half_written(workdir)
  end = time.monotonic() + (5 if during_save else rng.uniform(0.02, 1.5))
  while time.monotonic() < end:
    time.sleep(0.001)
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status), False
    names = half_written(workdir)
    stale &= names
    if during_save and names - stale:
      time.sleep(rng.uniform(0, 0.02))
      break
  os.kill(pid, signal.SIGKILL)
  _, status = os.waitpid(pid, 0)
  code = os.waitstatus_to_exitcode(status)
  if code != -signal.SIGKILL:  # it had ended before
    return code, False
  return None, bool(half_written(workdir) - stale)


def outcome(workdir):
  """All that a run leaves, but for times."""
  result = json.loads((workdir / "result.json").read_text())
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  kept = [
    {k: v for k, v in json.loads(row).items() if k not in _TIMES}
    for row in rows
  ]
  return {k: v for k, v in result.items() if k not in _TIMES}, kept


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  rng = random.Random(options.seed)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _, status = os.waitpid(start(folder / "whole", sleep=0), 0)
    if status:
      sys.exit((folder / "output.txt").read_text())
    expected = outcome(folder / "whole")
    steps = [(row["step"], "eval_top1" in row) for row in expected[1]]
    if len(set(steps)) != len(steps) or max(steps)[0] != NUM_STEPS:
      sys.exit(f"the run left alone has the lines {steps}")
    kills = in_save = runs = lives = 0
    code = None
    while kills < options.kills or code is None:
      workdir = folder / f"run{runs}"
      lives += 1
      pid = start(workdir)
      if kills >= options.kills:  # let the last run end
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        killed_in_save = False
      else:
        during_save = lives % 3 == 0
        code, killed_in_save = kill(pid, workdir, rng, during_save=during_save)
      if code is None:
        kills += 1
        in_save += killed_in_save
        continue
      if code:
        sys.exit((folder / "output.txt").read_text())
      if outcome(workdir) != expected:
        sys.exit(f"run {runs} differs: {outcome(workdir)}, not {expected}")
      runs += 1
    print(
      f"{kills} kills, {in_save} of them during a save: all continued, {runs} "
      "runs ended with the bits and lines of one left alone"
    )


if __name__ == "__main__":
  main()
