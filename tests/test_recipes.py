"""The recipes against the published table of SimCLRv2's settings.

Sources: google-research/simclr README and data_util/model_util defaults,
2006.10029 appendix, and the step numbers inside the released checkpoints.
"""

import pytest

from simclr_jax import build, cli, optimizers
from simclr_jax import config as config_lib

HEADER = "stage recipe images batch epochs steps warmup optimizer peak decay"
TABLE = """
pretrain  imagenet             1281167  4096   800  250228  12511  lars      6.4   1e-4
pretrain  imagenet,short       1281167  4096   100   31279   3127  lars      4.8   1e-4
pretrain  cifar10                50000   512  1000   97657    976  lars      2.0   1e-4
finetune  imagenet,linear      1281167  4096    90   28151      0  momentum  1.6   1e-6
finetune  cifar10,linear         50000   512   100    9766      0  momentum  0.2   0
finetune  imagenet,labels=1      12811  1024    60     751      0  lars      0.16  0
finetune  imagenet,labels=10    128116  1024    30    3754      0  lars      0.16  0
finetune  imagenet,labels=1,big  12811  1024    60     751      0  lars      0.064 0
finetune  imagenet,labels=10,big 128116 1024    30    3754      0  lars      0.064 0
finetune  imagenet,big         1281167  1024    30   37535      0  lars      0.064 0
finetune  imagenet             1281167  1024    30   37535      0  lars      0.16  0
finetune  imagenet,supervised  1281167  4096    90   28151      0  momentum  1.6   1e-4
distill   imagenet             1281167  4096   400  125114   6256  lars      6.4   1e-4
distill   imagenet,small       1281167  4096   400  125114   6256  lars      6.4   1e-4
"""  # noqa: E501
ROWS = [
  dict(zip(HEADER.split(), line.split(), strict=True))
  for line in TABLE.strip().splitlines()
]


@pytest.mark.parametrize(
  "row", ROWS, ids=lambda r: f"{r['stage']}:{r['recipe']}"
)
def test_numbers_are_the_published_ones(row, capsys):
  config = cli.load_recipe(row["recipe"], stage=row["stage"])
  images = int(row["images"])
  assert config.batch_size == int(row["batch"])
  assert config.num_epochs == float(row["epochs"])
  assert config_lib.num_steps(config, images) == int(row["steps"])
  warmup = config_lib.warmup_steps(config, images)
  assert warmup == pytest.approx(int(row["warmup"]), abs=1)
  assert config.optim.name == row["optimizer"]
  assert config.optim.weight_decay == float(row["decay"])
  peak = optimizers.peak_learning_rate(
    learning_rate=config.optim.learning_rate,
    batch_size=config.batch_size,
    scaling=config.optim.scaling,
  )
  assert peak == pytest.approx(float(row["peak"]))
  schedule = build.make_schedule(config, images, int(row["steps"]))
  assert schedule(warmup) == pytest.approx(peak)
  assert (
    f"{row['stage']}: {images} images, {row['steps']} steps "
    f"({int(row['epochs'])}" in (printed := capsys.readouterr().out)
  )
  assert (
    f"{row['optimizer']}, peak learning rate {float(row['peak']):g} after "
    f"{warmup} steps, weight decay {float(row['decay']):g}" in printed
  )


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


def test_the_recipe_for_small_batches():
  """google-research/simclr issue 166: 0.2 √B, 0.2, a head 2x and 64 outputs."""
  config = cli.load_recipe("cifar10,sqrt", stage="pretrain")
  peak = optimizers.peak_learning_rate(
    learning_rate=config.optim.learning_rate,
    batch_size=256,
    scaling=config.optim.scaling,
  )
  assert peak == pytest.approx(0.2 * 16)
  assert config.loss.temperature == 0.2
  assert (config.head.dim, config.head.width) == (64, 2.0)


@pytest.mark.parametrize(
  "size, stem",
  [(32, "cifar"), (64, "cifar"), (65, "imagenet"), (96, "imagenet")],
)
def test_stem_by_image_size(size, stem):
  config = cli.load_recipe("imagenet", stage="pretrain")
  config.data.image_size = size
  build.resolve(config)
  assert config.model.stem == stem
  config.model.stem = "cifar"  # what is given stays
  build.resolve(config)
  assert config.model.stem == "cifar"
