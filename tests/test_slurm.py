"""launch/slurm.sbatch on a real Slurm, as a user would run it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_STEPS = 120
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """Runs a command of Slurm and returns what it prints."""
  path = f"{os.environ['PATH']}:/usr/sbin"
  missing = [name for name in NEEDED if not shutil.which(name, path=path)]
  if missing or os.getuid():
    why = f"needs {', '.join(missing)}" if missing else "needs root"
    pytest.skip(f"{why} (Debian: apt-get install slurm-wlm munge)")
  folder = tmp_path_factory.mktemp("slurm")
  env = os.environ | {
    "SLURM_CONF": str(folder / "slurm.conf"),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(ROOT),
  }

  def run(*command, code=0):
    done = subprocess.run(
      command, cwd=folder, env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout

  cluster = ["bash", ROOT / "tests" / "slurm_cluster.sh"]
  with (folder / "log").open("w") as log:  # the daemons would hold a pipe
    code = subprocess.call([*cluster, "start", folder], stdout=log, stderr=log)
  try:
    assert code == 0, (folder / "log").read_text()
    yield run
  finally:
    subprocess.call([*cluster, "stop", folder])


def submit(slurm, output, *command):
  return slurm(
    "sbatch",
    "--parsable",
    "--nodes=1",
    "--ntasks-per-node=2",
    "--cpus-per-task=1",
    "--gres=none",
    f"--output={output}",
    ROOT / "launch" / "slurm.sbatch",
    sys.executable,
    "-m",
    *command,
  ).strip()


def job(slurm, number):
  """The fields of `scontrol show job`."""
  shown = slurm("scontrol", "show", "job", "--oneliner", number)
  return dict(re.findall(r"(\w+)=(\S*)", shown))


def wait_until(true, output, seconds=240):
  end = time.monotonic() + seconds
  while not true():
    said = output.read_text() if output.exists() else "no output"
    assert time.monotonic() < end, said[-3000:]
    time.sleep(0.2)


def wait_for(slurm, number, output, **expected):
  """Waits until these fields of the job have these values."""

  def reached():
    return expected.items() <= job(slurm, number).items()

  wait_until(reached, output)


def test_a_stopped_job_is_requeued_and_ends(slurm, tmp_path):
  output, workdir = tmp_path / "output", tmp_path / "run"
  metrics = workdir / "metrics.jsonl"
  number = submit(
    slurm,
    output,
    "simclr_jax.pretrain",
    "--config=pretrain.py:digits",
    f"--workdir={workdir}",
    "--config.model.width=0.0625",
    "--config.batch_size=64",
    f"--config.num_steps={NUM_STEPS}",
    "--config.log_every_steps=1",
    "--config.checkpoint_every_steps=1000",
  )

  def steps():
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row["step"] for row in rows if "loss" in row]

  wait_until(lambda: len(steps()) > 3, output)
  slurm("scancel", "--signal=TERM", number)
  wait_for(slurm, number, output, Restarts="1", Reason="BeginTime")
  said = output.read_text()
  step = int(re.search(r"stopped by a signal at step (\d+), saved", said)[1])
  assert 3 < step < NUM_STEPS
  assert said.count(f"at step {step}, saved") == 2  # both tasks, at one step
  assert "back into the queue" in said
  assert steps() == list(range(1, step + 1))

  # Slurm waits two minutes before it starts a requeued job again. Seconds it
  # does need: a credential of the second in which the last was revoked is void,
  # and the job would be killed.
  time.sleep(5)
  slurm("scontrol", "update", f"job={number}", "StartTime=now")
  wait_for(slurm, number, output, JobState="COMPLETED")
  assert output.read_text().count(f"continuing from step {step}") == 2
  assert steps() == list(range(1, NUM_STEPS + 1))
  result = json.loads((workdir / "result.json").read_text())
  assert result["num_steps"] == NUM_STEPS
  assert result["device"] == "4 x cpu"


def test_a_mistake_is_not_requeued(slurm, tmp_path):
  output = tmp_path / "output"
  number = submit(slurm, output, "simclr_jax.pretrain", "--config=digit")
  wait_for(slurm, number, output, JobState="FAILED")
  found = job(slurm, number)
  assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
  assert "error: " in output.read_text()
