"""Kills a small run again and again; it must end as if it had been left alone.

  python benchmarks/kills.py --kills=100

A third of the kills (SIGKILL) hits a save, a third any moment since the start
of the process, a third the training. Between two of them the same program
starts again. At the end parameters, optimizer, BatchNorm, metrics.jsonl and
result.json are compared bit by bit with those of a run that nobody killed;
timings are left out. The loop, log and checkpoints are the project's, the
network is one matrix.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
import test_loop  # noqa: E402

from simclr_jax import loop  # noqa: E402

STEPS_PER_KILL = 60
STEP_SECONDS = 0.005  # at least, so that kills meet different steps
TIMINGS = ("images_per_second", "seconds")


def train(workdir: pathlib.Path, num_steps: int, *, sleep: float) -> None:
  """One life of the run, as a stage would start it."""

  def batches(start):
    cycle = itertools.cycle(itertools.islice(test_loop.batches(0), 64))
    for batch in itertools.islice(cycle, start % 64, None):
      time.sleep(sleep)
      yield batch

  config = test_loop.make_config(
    checkpoint_every_steps=7, eval_every_steps=11, num_steps=num_steps
  )
  loop.claim(config, workdir)
  if loop.finished(workdir, num_steps):
    return
  state, metrics = test_loop.train(
    workdir, num_steps, batches=batches, config=config
  )
  leaves = {
    f"leaf{i}": leaf
    for i, leaf in enumerate(test_loop.jax.tree.leaves(vars(state)))
  }
  np.savez(workdir / "final.npz", **leaves)
  loop.write_result(workdir, {"num_steps": num_steps} | metrics)


def live(workdir: pathlib.Path, num_steps: int, *, sleep: float) -> int:
  """Starts a life and returns its process id; JAX must not have begun here."""
  child = os.fork()
  if child:
    return child
  try:
    with open(workdir.with_suffix(".log"), "a") as log:
      os.dup2(log.fileno(), 1)
      os.dup2(log.fileno(), 2)
      train(workdir, num_steps, sleep=sleep)
      os._exit(0)
  except BaseException:
    import traceback

    traceback.print_exc()
    os._exit(1)


def wait_for(child: int, happened) -> None:
  """Waits until `happened()`; an end before it is a fault."""
  while not happened():
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
      sys.exit(f"error: the run ended by itself, status {status}")
    time.sleep(0.001)


def saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint is being written."""
  try:
    return any("tmp" in p.name for p in (workdir / "checkpoints").iterdir())
  except FileNotFoundError:
    return False


def trained(workdir: pathlib.Path) -> int:
  file = workdir / "metrics.jsonl"
  return file.stat().st_size if file.exists() else 0


def kill_once(workdir, num_steps, kind: str, rng: random.Random) -> None:
  """One life, ended by SIGKILL."""
  before = trained(workdir)
  child = live(workdir, num_steps, sleep=STEP_SECONDS)
  if kind != "any moment":
    # The restart cuts the file first, then it grows.
    smallest = [before]

    def grows():
      smallest[0] = min(smallest[0], trained(workdir))
      return trained(workdir) > smallest[0]

    wait_for(child, grows)
  if kind == "save":
    for _ in range(rng.randint(1, 3)):
      wait_for(child, lambda: not saving(workdir))
      wait_for(child, lambda: saving(workdir))
    time.sleep(rng.uniform(0, 0.01))
  else:
    time.sleep(rng.uniform(0, 1.5 if kind == "any moment" else 0.2))
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  if not os.WIFSIGNALED(status):
    sys.exit(f"error: the run ended before the kill, status {status}")


def complete(workdir: pathlib.Path, num_steps: int) -> None:
  _, status = os.waitpid(live(workdir, num_steps, sleep=0), 0)
  if status:
    sys.exit(workdir.with_suffix(".log").read_text()[-3000:])


def outcome(workdir: pathlib.Path) -> dict:
  """Everything that must be the same, by name."""
  with np.load(workdir / "final.npz") as file:
    state = {name: file[name].tobytes() for name in file.files}
  result = json.loads((workdir / "result.json").read_text())
  for name in TIMINGS:
    result.pop(name, None)
  return state | {"metrics": test_loop.lines(workdir), "result": result}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  rng = random.Random(options.seed)
  num_steps = STEPS_PER_KILL * options.kills
  folder = pathlib.Path(tempfile.mkdtemp(prefix="simclr_jax_kills_"))
  kinds = ("save", "any moment", "training")
  hits = dict.fromkeys(kinds, 0)
  in_save = 0
  start = time.monotonic()
  for i in range(options.kills):
    kind = kinds[i % 3]
    kill_once(folder / "killed", num_steps, kind, rng)
    hits[kind] += 1
    in_save += saving(folder / "killed")
  complete(folder / "killed", num_steps)
  complete(folder / "whole", num_steps)
  mine, whole = outcome(folder / "killed"), outcome(folder / "whole")
  differ = [k for k in mine.keys() | whole.keys() if mine.get(k) != whole[k]]
  print(
    f"{options.kills} kills ({', '.join(f'{n} {k}' for k, n in hits.items())}; "
    f"{in_save} left a save half written) of a run of {num_steps} steps in "
    f"{time.monotonic() - start:.0f} s: "
    + (f"DIFFERENT in {', '.join(sorted(differ))}" if differ else "identical")
  )
  if differ:
    sys.exit(f"error: see {folder}")
  shutil.rmtree(folder)


if __name__ == "__main__":
  main()
