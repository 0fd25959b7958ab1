"""Recipes, their options, derived fields and checks."""

import json
import math

import ml_collections
import pytest

from simclr_jax import cli
from simclr_jax import config as config_lib
from simclr_jax.config import UserError


def recipe(stage, arg):
  config = cli.load_recipe(arg, stage=stage)
  config.unlock()
  return config


def test_options_are_cast_to_the_type_of_their_default():
  name, options = config_lib.parse_arg(
    "b,rate=2,flag,count=3,off=false",
    recipes=("a", "b"),
    rate=0.5,
    flag=False,
    count=1,
    off=True,
  )
  assert name == "b"
  assert options.to_dict() == dict(rate=2.0, flag=True, count=3, off=False)


@pytest.mark.parametrize(
  "arg, message",
  [
    ("digit", 'unknown recipe "digit"; did you mean "digits"?'),
    ("digits,labls=1", 'no option "labls"; did you mean "labels"?'),
    ("digits,labels=few", 'labels takes float, got "few"'),
    ("digits,linear=maybe", 'linear takes bool, got "maybe"'),
  ],
)
def test_mistakes_in_the_argument_are_named(arg, message):
  with pytest.raises(UserError, match=r"recipe|option") as error:
    config_lib.parse_arg(arg, recipes=("digits",), labels=100.0, linear=False)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


STAGES = ("pretrain", "finetune", "distill")


def test_configs_of_earlier_versions_are_read():
  tree = json.loads(config_lib.to_json(recipe("pretrain", "digits")))
  del tree["head"]["width"], tree["data"]["label_ids"]
  config = config_lib.from_json_tree(tree)
  assert config.head.width == 1.0
  assert config.data.label_ids == ""
  assert "head" not in config_lib.from_json_tree({"seed": 0})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet"])
def test_every_recipe_passes_its_own_check(stage, name):
  config = recipe(stage, name)
  config_lib.check(config, num_devices=1)
  assert config.stage == stage
  assert config.recipe == name


@pytest.mark.parametrize("stage", STAGES)
def test_a_config_survives_json(stage):
  config = recipe(stage, "digits")
  stored = config_lib.from_json_tree(json.loads(config_lib.to_json(config)))
  assert stored.to_dict() == config.to_dict()
  assert isinstance(stored.augment.area_range, tuple)


# Steps, warm-up steps and the step numbers inside the released checkpoints.
@pytest.mark.parametrize(
  "num_examples, batch, epochs, steps",
  [
    (1281167, 4096, 800.0, 250228),
    (1281167, 1024, 30.0, 37535),
    (128116, 1024, 30.0, 3754),
    (12811, 1024, 60.0, 751),
    (1281167, 4096, 90.0, 28151),
    (50000, 512, 1000.0, 97657),
  ],
)
def test_num_steps_is_the_official_count(num_examples, batch, epochs, steps):
  config = ml_collections.ConfigDict(
    dict(num_steps=0, num_epochs=epochs, batch_size=batch)
  )
  assert config_lib.num_steps(config, num_examples) == steps
  config.num_steps = 7
  assert config_lib.num_steps(config, num_examples) == 7


def test_warmup_steps_are_the_official_count():
  config = recipe("pretrain", "imagenet")
  config.optim.warmup_epochs = 10.0
  assert config_lib.warmup_steps(config, 1281167) == 3127


@pytest.mark.parametrize("field", ["num_steps", "num_epochs"])
def test_more_steps_than_32_bits_are_refused(field):
  config = recipe("pretrain", "digits")
  config_lib.set_field(config, field, 2**31)
  with pytest.raises(UserError, match="steps are more than a run can count"):
    config_lib.num_steps(config, num_examples=1437)


def test_a_batch_of_one_needs_a_memory():
  config = recipe("pretrain", "digits")
  config_lib.set_field(config, "batch_size", 1)
  with pytest.raises(UserError, match="no other image to tell apart; take 2"):
    config_lib.check(config, num_devices=1)
  config_lib.set_field(config, "memory.size", 64)
  config_lib.check(config, num_devices=1)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("batch_size", 0, "config.batch_size must be above 0, got 0"),
    ("batch_size", 100, "which 8 devices do not divide; take 96"),
    ("optim.learning_rate", -1.0, "config.optim.learning_rate must not be"),
    ("optim.name", "larz", 'got "larz"; did you mean "lars"?'),
    ("model.dtype", "float16", "config.model.dtype must be one of auto, "),
    ("loss.temperature", 0.0, "config.loss.temperature must be above 0"),
    ("num_epochs", 0.0, "config.num_epochs or config.num_steps"),
    ("loss.block_size", -3, "config.loss.block_size must not be negative"),
    ("profile_steps", (5, 2), "config.profile_steps is (5, 2); expected the"),
    ("profile_steps", (-1, 3), "config.profile_steps is (-1, 3); expected the"),
    ("profile_steps", (0, 3), "config.profile_steps is (0, 3); expected the"),
    ("profile_steps", (3,), "config.profile_steps must be two numbers, got"),
    ("augment.area_range", (0.1, 0.2, 0.3), "area_range must be two numbers"),
    ("augment.area_range", ("a", "b"), "area_range must be two numbers, got"),
    ("augment.area_range", (0.1, math.nan), "area_range must be a finite"),
    ("optim.learning_rate", math.nan, "learning_rate must be a finite number"),
    ("loss.temperature", math.inf, "config.loss.temperature must be a finite"),
    ("model.width", math.inf, "config.model.width must be a finite number"),
    ("data.image_size", 0, "config.data.image_size must be above 0, got 0."),
    ("seed", 2**32, "config.seed must be below 2**32: 4294967296."),
    ("model.width", 1e30, "config.model.width must be at most 1000, got 1e+30"),
    ("head.num_layers", 10**6, "head.num_layers must be at most 100, got"),
    ("head.dim", 2**40, "config.head.dim must be at most 1048576, got 109951"),
    ("data.canvas_size", 10**5, "data.canvas_size must be at most 16384, got"),
    ("batch_size", 2**40, "config.batch_size must be at most 16777216, got"),
    ("optim.warmup_epochs", 1e30, "warmup_epochs must be at most 1000000, got"),
    ("num_epochs", 1e308, "config.num_epochs must be at most 1000000, got"),
    ("profile_steps", (1.5, 2.5), "config.profile_steps is (1.5, 2.5); expect"),
  ],
)
def test_wrong_values_are_named(field, value, message):
  config = recipe("pretrain", "digits")
  config_lib.set_field(config, field, value)
  with pytest.raises(UserError) as error:
    config_lib.check(config, num_devices=8)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("canvas_size", -2, "canvas_size must not be negative: -2."),
    ("image_size", -1, "image_size must be above 0, got -1."),
    ("head_width", -1.0, "head_width must be above 0, got -1.0."),
    ("dim", 0, "dim must be above 0, got 0."),
    ("width", 1e9, "width must be at most 1000, got 1000000000.0."),
    ("stem", "x", 'stem must be one of auto, imagenet, cifar; got "x".'),
    ("pool_padding", "x", "pool_padding must be one of auto, same, torch; got"),
  ],
)
def test_a_network_from_scratch_is_named_as_it_is_given(field, value, message):
  config = recipe("finetune", "digits")
  config_lib.set_field(config, f"scratch.{field}", value)
  with pytest.raises(UserError) as error:
    config_lib.check(config, num_devices=1)
  assert str(error.value).startswith(f"config.scratch.{message}")


@pytest.mark.parametrize(
  "name", ["model.sk_ratio", "head.num_layers", "head_layer"]
)
def test_a_zero_that_means_none_is_kept(name):
  config = recipe("distill", "imagenet")
  config_lib.fill(config, {name: 2}, [name])
  assert config_lib.flat(config)[name] == 2  # it held its sentinel
  config_lib.set_field(config, name, 0)
  config_lib.fill(config, {name: 2}, [name])
  assert config_lib.flat(config)[name] == 0


@pytest.mark.parametrize("name", ["cifar10", "digits", "folder", "imagenet"])
def test_a_small_student_has_no_selective_kernels(name):
  """Whatever its teacher has; a ResNet-18 cannot have them."""
  config = recipe("distill", f"{name},small")
  config_lib.fill(config, {"model.sk_ratio": 0.0625}, ["model.sk_ratio"])
  assert config.model.sk_ratio == 0


def test_inherit_fills_sentinels_and_refuses_other_values():
  config = recipe("finetune", "digits").lock()
  stored = {"model.depth": 50, "model.sk_ratio": 0.0, "model.stem": "cifar"}
  config_lib.inherit(config, stored, stored, where="the run X")
  assert (config.model.depth, config.model.stem) == (50, "cifar")
  with pytest.raises(
    UserError, match=r"model.depth is 50, but the run X has 1"
  ):
    config_lib.inherit(
      config, {"model.depth": 18}, ["model.depth"], where="the run X"
    )
