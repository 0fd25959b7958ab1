"""Watches the memory and the compilations of a run of many small steps.

  python benchmarks/memory_flat.py [--steps=5000]

Pretrains a tiny network on the digits by its own command on two CPU devices,
with its lines, evaluations and saves. Prints the resident memory of the process
along the way and the programs compiled so far. Exit code 1 where memory after
step 500 grows by more than 2%, or anything is compiled after it.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST = 500  # by then all has happened once: a line, an evaluation, two saves
LIMIT = 0.02


def command(workdir, steps):
  return [
    sys.executable,
    "-m",
    "simclr_jax.pretrain",
    "--config=pretrain.py:digits",
    f"--workdir={workdir}",
    f"--config.num_steps={steps}",
    "--config.batch_size=16",
    "--config.data.image_size=8",
    "--config.model.width=0.0625",
    "--config.log_every_steps=10",
    "--config.eval_every_steps=450",
    "--config.checkpoint_every_steps=200",
  ]


def last_step(workdir):
  file = workdir / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True) if file.exists() else []
  whole = [line for line in lines if line.endswith("\n")]
  return json.loads(whole[-1])["step"] if whole else 0


def resident_mib(pid):
  text = pathlib.Path(f"/proc/{pid}/status").read_text()
  found = re.search(r"VmRSS:\s+(\d+) kB", text)
  return int(found[1]) / 1024 if found else None  # None: it has ended


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=5000)
  steps = parser.parse_args().steps
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_LOG_COMPILES": "1",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  samples = []  # (step, MiB, compiled programs)
  with tempfile.TemporaryDirectory() as folder:
    workdir, log = pathlib.Path(folder) / "run", pathlib.Path(folder) / "log"
    with log.open("w") as file:
      process = subprocess.Popen(
        command(workdir, steps), cwd=ROOT, env=env, stdout=file, stderr=file
      )
    try:
      while process.poll() is None:
        time.sleep(0.5)
        step, memory = last_step(workdir), resident_mib(process.pid)
        compiled = re.findall(
          r"Finished XLA compilation of (\S+)", log.read_text()
        )
        if memory and step:
          samples.append((step, memory, len(compiled)))
    finally:
      process.kill()
    if process.wait():
      sys.exit(log.read_text()[-3000:])
  print(f"{'step':>6}{'MiB':>8}{'compiled':>10}")
  shown = -steps
  for step, memory, count in samples:
    if step >= shown + steps / 20:
      shown = step
      print(f"{step:6}{memory:8.0f}{count:10}")
  # The last line is followed by what ends a run: its report, the result.
  later = [sample for sample in samples if FIRST <= sample[0] < steps]
  part = len(later) // 5 + 1  # medians: an evaluation takes some for a while
  first, last = (
    statistics.median(memory for _, memory, _ in samples)
    for samples in (later[:part], later[-part:])
  )
  growth, compiled = last / first - 1, later[-1][2] - later[0][2]
  print(
    f"after step {FIRST}: {compiled} compilations, memory {first:.0f} MiB in "
    f"the first fifth, {last:.0f} MiB in the last: {growth:+.2%}"
  )
  if growth > LIMIT or compiled:
    sys.exit(1)


if __name__ == "__main__":
  main()
