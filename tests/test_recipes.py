"""The recipes against the published table of SimCLRv2's settings.

Sources: google-research/simclr README and data_util/model_util defaults,
2006.10029 appendix, and the step numbers inside the released checkpoints.
"""

import pytest

from simclr_jax import cli, optimizers
from simclr_jax import config as config_lib

IMAGENET, CIFAR = 1281167, 50000

# stage, recipe, images: batch, epochs, steps, warm-up steps, optimizer, peak
# learning rate, weight decay.
TABLE = [
  ("pretrain", "imagenet", IMAGENET)
  + (4096, 800, 250228, 12511, "lars", 6.4, 1e-4),
  ("pretrain", "imagenet,short", IMAGENET)
  + (4096, 100, 31279, 3127, "lars", 4.8, 1e-4),
  ("pretrain", "cifar10", CIFAR) + (512, 1000, 97657, 976, "lars", 2.0, 1e-4),
  ("finetune", "imagenet,linear", IMAGENET)
  + (4096, 90, 28151, 0, "momentum", 1.6, 1e-6),
  ("finetune", "cifar10,linear", CIFAR)
  + (512, 100, 9766, 0, "momentum", 0.2, 0),
  ("finetune", "imagenet,labels=1", 12811)
  + (1024, 60, 751, 0, "lars", 0.16, 0),
  ("finetune", "imagenet,labels=10", 128116)
  + (1024, 30, 3754, 0, "lars", 0.16, 0),
  ("finetune", "imagenet", IMAGENET) + (1024, 30, 37535, 0, "lars", 0.16, 0),
  ("finetune", "imagenet,supervised", IMAGENET)
  + (4096, 90, 28151, 0, "momentum", 1.6, 1e-4),
  ("distill", "imagenet", IMAGENET)
  + (4096, 400, 125114, 6256, "lars", 6.4, 1e-4),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}:{row[1]}")
def test_numbers_are_the_published_ones(row):
  stage, recipe, images, batch, epochs, steps, warmup, name, peak, decay = row
  config = cli.load_recipe(recipe, stage=stage)
  assert config.batch_size == batch
  assert config.num_epochs == epochs
  assert config_lib.num_steps(config, images) == steps
  assert config_lib.warmup_steps(config, images) == pytest.approx(warmup, abs=1)
  assert config.optim.name == name
  assert config.optim.weight_decay == decay
  rate = optimizers.peak_learning_rate(
    learning_rate=config.optim.learning_rate,
    batch_size=batch,
    scaling=config.optim.scaling,
  )
  assert rate == pytest.approx(peak)


def test_where_fine_tuning_starts():
  """From the head's first layer with few labels, its input with all."""

  def layer(recipe):
    return cli.load_recipe(recipe, stage="finetune").head_layer

  assert layer("imagenet,labels=1") == 1
  assert layer("imagenet,labels=10") == 1
  assert layer("imagenet") == 0
  linear = cli.load_recipe("imagenet,linear", stage="finetune")
  assert (linear.freeze_after_block, linear.head_layer) == (4, 0)


def test_pretraining_views_and_loss():
  imagenet = cli.load_recipe("imagenet", stage="pretrain")
  cifar = cli.load_recipe("cifar10", stage="pretrain")
  assert (imagenet.loss.temperature, cifar.loss.temperature) == (0.1, 0.5)
  assert (imagenet.head.num_layers, imagenet.head.dim) == (3, 128)
  assert (imagenet.model.depth, cifar.model.depth) == (50, 18)
  for config, strength, blur in ((imagenet, 1.0, 0.5), (cifar, 0.5, 0.0)):
    augment = config.augment
    assert augment.strength == strength
    assert augment.blur_probability == blur
    jitter = (augment.brightness, augment.contrast, augment.saturation)
    assert jitter == (0.8, 0.8, 0.8)
    assert augment.hue == 0.2
    assert augment.jitter_probability == 0.8
    assert augment.gray_probability == 0.2
    assert augment.area_range == (0.08, 1.0)


@pytest.mark.parametrize(
  "recipe, temperature", [("imagenet", 0.1), ("imagenet,small", 1.0)]
)
def test_distillation_temperature(recipe, temperature):
  config = cli.load_recipe(recipe, stage="distill")
  assert config.loss.temperature == temperature
  assert not config.loss.scale_by_temperature
  assert config.loss.label_weight == 0
