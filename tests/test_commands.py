"""python -m simclr_jax, which lists the commands."""

import pathlib
import subprocess
import sys

import pytest

import simclr_jax
from simclr_jax import __main__ as commands

PACKAGE = pathlib.Path(simclr_jax.__file__).parent


def test_every_command_is_listed():
  found = {file.parent.name for file in PACKAGE.glob("*/__main__.py")}
  for file in PACKAGE.glob("*.py"):
    if '\nif __name__ == "__main__":\n' in file.read_text():
      found.add(file.stem)
  assert set(commands.COMMANDS) == found - {"__main__"}


@pytest.mark.parametrize("flags", [[], ["--help"], ["-h"]])
def test_the_list(flags, capsys):
  commands.main(flags)
  lines = capsys.readouterr().out.splitlines()
  for name in commands.COMMANDS:
    (line,) = [line for line in lines if line.startswith(f"  {name} ")]
    assert len(line.split()) > 3


def test_a_mistake(capsys):
  with pytest.raises(SystemExit) as ended:
    commands.main(["pretrain"])
  assert ended.value.code == 2
  assert "python -m simclr_jax.COMMAND" in capsys.readouterr().err


def test_it_is_listed_without_jax():
  code = (
    "import runpy, sys; sys.argv = ['']\n"
    "runpy.run_module('simclr_jax', run_name='__main__')\n"
    "assert 'jax' not in sys.modules"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "  pretrain  Pretraining: two views" in done.stdout
