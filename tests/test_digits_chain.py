"""launch/digits_chain.py, with stages that train nothing."""

import importlib.util
import pathlib
import shlex

import pytest

from simclr_jax import cli

FILE = pathlib.Path(__file__).resolve().parents[1] / "launch/digits_chain.py"


@pytest.fixture
def chain():
  spec = importlib.util.spec_from_file_location("digits_chain", FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_printed_commands_are_what_is_run(
  chain, tmp_path, monkeypatch, capsys
):
  runs = []

  class Stage:
    def __init__(self, name):
      self.name = name

    def train_and_evaluate(self, config, workdir):
      runs.append((self.name, config, str(workdir)))

  stages = {name: Stage(name) for name in chain.STAGES}
  monkeypatch.setattr(chain, "STAGES", stages)
  results = chain.run_chain(tmp_path)
  lines = capsys.readouterr().out.splitlines()
  commands = [shlex.split(line) for line in lines if line.startswith("$ ")]
  assert len(commands) == len(runs) == len(results) == 13
  for command, (stage, config, workdir) in zip(commands, runs, strict=True):
    assert command[:3] == ["$", "python", "-m"]
    assert command[3] == f"simclr_jax.{stage}"
    parsed = cli.parse(command[4:], stage=stage)
    assert parsed[0].to_dict() == config.to_dict()
    assert parsed[1] == workdir

  reported = [pathlib.Path(w).name for _, config, w in runs if config.report]
  assert reported == [
    "pretrain",
    "linear",
    "finetune_1_seed0",
    "finetune_10",
    "self_distilled",
    "small_distilled",
  ]
