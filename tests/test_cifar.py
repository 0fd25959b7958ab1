"""The CIFAR-10 recipe on its real records, as JPEG from a prepared folder."""

import json

import pytest

from simclr_jax import cli, pretrain
from simclr_jax.config import set_field
from simclr_jax.metrics import uniform_loss


@pytest.mark.slow
def test_sixty_steps_learn(shared, tmp_path):
  """The official recipe at batch 64; narrow, to take a minute on two cores."""
  config = cli.load_recipe("cifar10", stage="pretrain")
  for name, value in {
    "data.data_dir": str(shared / "tensorflow_datasets"),
    "data.split": "train[:10%]",
    "data.eval_split": "",
    "model.width": 0.25,
    "batch_size": 64,
    "num_steps": 60,
    "optim.warmup_epochs": 0.1,
    "log_every_steps": 10,
    "report": False,
  }.items():
    set_field(config, name, value)
  pretrain.train_and_evaluate(config, tmp_path)
  text = (tmp_path / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  last = rows[-3:]
  mean_loss = sum(row["loss"] for row in last) / len(last)
  assert mean_loss < uniform_loss(64) - 0.5
  assert sum(row["contrastive_accuracy"] for row in last) / 3 > 4 / 64
  assert sum(row["probe_accuracy"] for row in last) / 3 > 0.14  # chance 0.1
