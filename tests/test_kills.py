"""Kills at any moment leave no trace in a run's result."""

import os
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "kills.py"


def test_a_run_that_is_killed_ten_times_ends_as_if_left_alone():
  done = subprocess.run(
    [sys.executable, str(SCRIPT), "--kills=10", "--seed=1"],
    env=os.environ | {"XLA_FLAGS": ""},  # one device starts sooner
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.startswith("10 kills")
  assert " 0 of them during a save" not in done.stdout
  assert "ended with the bits and lines of one left alone" in done.stdout
