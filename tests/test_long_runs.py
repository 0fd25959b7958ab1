"""What many steps must not do: take more memory, or compile again."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "memory_flat.py"


@pytest.mark.slow
def test_memory_is_flat_and_nothing_is_compiled_again():
  done = subprocess.run(
    [sys.executable, SCRIPT, "--steps=1500"],
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "after step 500: 0 compilations" in done.stdout
