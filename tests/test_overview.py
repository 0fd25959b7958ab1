"""The table of what trains."""

import ml_collections
import numpy as np

from simclr_jax import models, overview

PARAMS = {
  "classifier": {"bias": np.zeros(3), "kernel": np.zeros((4, 3))},
  "encoder": {
    "stem": {"conv_1": {"kernel": np.zeros((3, 3, 1, 2))}, "bn_1": {}},
    "block_group1": {
      "bn_1": {"scale": np.zeros(2), "bias": np.zeros(2)},
      "conv_1": {"kernel": np.zeros((1, 1, 2, 2))},
    },
  },
  "projection_head": {"dense_1": {"kernel": np.zeros((4, 4))}},
}


def config(name="lars", weight_decay=1e-4):
  return ml_collections.ConfigDict(
    dict(
      batch_size=256,
      optim=dict(
        name=name,
        learning_rate=0.1,
        scaling="sqrt",
        weight_decay=weight_decay,
      ),
      model=dict(bn_group_size=0),
    )
  )


def cells(*args, **options):
  heading, *rows = overview.rows(*args, **options)
  return {row[0]: dict(zip(heading[1:], row[1:], strict=True)) for row in rows}


def test_lars_with_everything_new():
  table = cells(config(), PARAMS)
  assert list(table) == [
    "stem",
    "block_group1",
    "projection_head",
    "classifier",
  ]
  assert table["block_group1"] == {
    "values": "8",
    "trains": "yes",
    "weights": "new",
    "decayed": "4",  # without BatchNorm's scale and bias
    "adapted": "4",
    "peak rate": "1.6",
  }
  # Not adapted, and its kernel alone is decayed.
  assert table["classifier"]["decayed"] == "12"
  assert table["classifier"]["adapted"] == "0"


def test_other_optimizers_adapt_nothing_and_decay_biases():
  table = cells(config("momentum"), PARAMS)
  assert {row["adapted"] for row in table.values()} == {"0"}
  assert table["classifier"]["decayed"] == "15"
  table = cells(config("adam", weight_decay=0.0), PARAMS)
  assert {row["decayed"] for row in table.values()} == {"0"}


def test_frozen_and_loaded_parts():
  trainable = models.trainable(PARAMS, freeze_after_block=0)
  table = cells(config(), PARAMS, trainable=trainable, loaded=PARAMS)
  assert table["stem"]["trains"] == "frozen"
  assert table["stem"]["peak rate"] == "0"
  assert table["stem"]["decayed"] == table["stem"]["adapted"] == "0"
  assert table["block_group1"]["trains"] == "yes"
  assert table["block_group1"]["weights"] == "loaded"
  assert table["classifier"]["weights"] == "new"


def test_what_was_left_is_said(capsys):
  overview.show(config(), PARAMS, loaded=PARAMS)
  text = capsys.readouterr().out
  assert "left in the checkpoint: classifier" in text
  assert "57 values, 32 images a device" in text  # 256 on 8 devices
  overview.show(config(), PARAMS)
  assert "left" not in capsys.readouterr().out
