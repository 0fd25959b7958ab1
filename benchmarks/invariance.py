"""Parameters after 20 steps on 1, 2, 4, 8 devices and 2 processes, in float64.

  python benchmarks/invariance.py [--steps=20] [--learning_rate=0.01]

Trains the digits recipe with a narrow ResNet-18 and a low learning rate by its
own command, each time on other devices of the CPU. Prints for each arrangement
the largest difference of a tensor from the run on one device, relative to that
tensor's largest value, after the first step whose learning rate is not 0 and at
the end. Exit code 1 where a parameter differs by more than 1e-9. Takes some
minutes.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

ROOT = pathlib.Path(__file__).resolve().parents[1]
# (processes, devices of each)
ARRANGEMENTS = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4)]
LIMIT = 1e-9


def train(workdir, processes, devices, steps, rate):
  """Runs the command; the last step is where checkpoint 2 and `steps` are."""
  command = [
    sys.executable,
    "-m",
    "simclr_jax.pretrain",
    "--config=pretrain.py:digits",
    f"--workdir={workdir}",
    "--config.model.dtype=float64",
    "--config.model.depth=18",
    "--config.model.width=0.0625",
    "--config.model.conv=xla",
    "--config.batch_size=64",
    f"--config.optim.learning_rate={rate}",
    f"--config.num_steps={steps}",
    "--config.checkpoint_every_steps=2",
    f"--config.keep_checkpoints={steps}",
    "--config.log_every_steps=1",
  ]
  if processes > 1:
    script = str(ROOT / "launch" / "multiprocess.sh")
    flags = [f"--processes={processes}", f"--devices={devices}"]
    command = ["bash", script, *flags, *command]
  flags = f"--xla_force_host_platform_device_count={devices}"
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "1",
    "XLA_FLAGS": "" if processes > 1 else flags,
  }
  done = subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def tensors(workdir, step):
  """{path: array} of the state saved at this step."""
  folder = (
    pathlib.Path(workdir).absolute() / "checkpoints" / str(step) / "state"
  )
  tree = ocp.StandardCheckpointer().restore(folder)
  parts = {k: tree[k] for k in ("params", "batch_stats")}
  return traverse_util.flatten_dict(parts, sep="/")


def difference(a, b):
  """The largest of all tensors, and which: (value, path)."""
  if a.keys() != b.keys():
    sys.exit("the runs have different tensors")
  scale = {k: max(np.max(np.abs(v)), 1e-12) for k, v in a.items()}
  return max(
    (float(np.max(np.abs(np.asarray(b[k]) - v)) / scale[k]), k)
    for k, v in a.items()
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--learning_rate", type=float, default=0.01)
  options = parser.parse_args()
  steps = options.steps
  worst = 0.0
  with tempfile.TemporaryDirectory() as folder:
    one = f"{folder}/1x1"
    print(
      f"{'processes x devices':20}{'step 2':>10}{f'step {steps}':>10}  worst"
    )
    for processes, devices in ARRANGEMENTS:
      workdir = f"{folder}/{processes}x{devices}"
      train(workdir, processes, devices, steps, options.learning_rate)
      found = [
        difference(tensors(one, step), tensors(workdir, step))
        for step in (2, steps)
      ]
      worst = max(worst, *(value for value, _ in found))
      print(
        f"{f'{processes} x {devices}':20}{found[0][0]:10.1e}{found[1][0]:10.1e}"
        f"  {found[1][1]}",
        flush=True,
      )
    moved, _ = difference(tensors(one, steps), tensors(one, 2))
    print(f"from step 2 to {steps} a tensor moved by {moved:.1e} at most")
  if not worst <= LIMIT:
    sys.exit(f"more than {LIMIT}")


if __name__ == "__main__":
  main()
