"""Recipes and their checks: the arguments of a recipe, derived fields, errors.

A config is a locked `ml_collections.ConfigDict` in which every field is
present. The sentinels 0, "" and "auto" mean "derived"; `resolve` and the stages
replace them, and `config.json` of a run holds the resolved values.
"""

import json
from collections.abc import Mapping, Sequence

import ml_collections

from simclr_jax import fields
from simclr_jax.errors import Diverged as Diverged  # for all others
from simclr_jax.errors import UserError, nearest


def parse_arg(
  arg: str, *, recipes: Sequence[str], **options
) -> tuple[str, ml_collections.ConfigDict]:
  """Splits "recipe,key=value,flag" into the recipe and its typed options.

  Args:
    arg: what follows the colon of `--config`; a bare boolean key means true.
    recipes: allowed for the first part; the first one is the default.
    **options: name -> default; values are cast to the type of the default.

  Returns:
    The recipe's name and a ConfigDict with every option.

  Raises:
    UserError: an unknown recipe or option, or a value of the wrong type.

  >>> parse_arg("cifar10,labels=10", recipes=["digits", "cifar10"], labels=1.0)
  ('cifar10', labels: 10.0
  )
  """
  recipe, *parts = arg.split(",") if arg else [recipes[0]]
  if recipe not in recipes:
    raise UserError(
      f'unknown recipe "{recipe}"{nearest(recipe, recipes)} '
      f"Recipes: {', '.join(recipes)}."
    )
  values = dict(options)
  for part in parts:
    name, equals, text = part.partition("=")
    if name not in options:
      raise UserError(
        f'recipe "{recipe}" has no option "{name}"'
        f"{nearest(name, list(options))} Options: {', '.join(options)}."
      )
    default = options[name]
    if not equals and isinstance(default, bool):
      values[name] = True
      continue
    try:
      values[name] = (
        {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if isinstance(default, bool)
        else type(default)(text)
      )
    except (KeyError, ValueError):
      raise UserError(
        f'recipe option {name} takes {type(default).__name__}, got "{text}".'
      ) from None
  return recipe, ml_collections.ConfigDict(values)


def flat(config: Mapping) -> dict:
  """Returns {"optim.name": value, ...} for a nested config.

  >>> flat({"optim": {"name": "lars"}, "seed": 0})
  {'optim.name': 'lars', 'seed': 0}
  """
  items = {}
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      items |= {f"{key}.{k}": v for k, v in flat(value).items()}
    else:
      items[key] = value
  return items


def to_json(config: ml_collections.ConfigDict) -> str:
  """Returns the config as indented JSON text (tuples become lists).

  >>> print(to_json(ml_collections.ConfigDict({"seed": 0})), end="")
  {
    "seed": 0
  }
  """
  return json.dumps(config.to_dict(), indent=2) + "\n"


_ADDED = {"data.label_ids": "", "data.eval_fraction": 0.0, "head.width": 1.0}
_ADDED_TO_PRETRAIN = {"loss.name": "nt_xent"}


def from_json_tree(tree: Mapping) -> ml_collections.ConfigDict:
  """Rebuilds a locked config from JSON values (lists become tuples).

  Fields that earlier versions did not store get what was then the only value.

  >>> from_json_tree({"augment": {"area_range": [0.3, 1.0]}}).augment.area_range
  (0.3, 1.0)
  """

  def tuples(value):
    if isinstance(value, Mapping):
      return {k: tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value

  config = tuples(tree)
  is_pretrain = ("stage", "pretrain") in tree.items()
  added = _ADDED | (_ADDED_TO_PRETRAIN if is_pretrain else {})
  for name, value in added.items():
    section, leaf = name.split(".")
    if section in config:
      config[section].setdefault(leaf, value)
  return ml_collections.ConfigDict(config).lock()


def num_steps(config: ml_collections.ConfigDict, num_examples: int) -> int:
  """Steps of a run: `config.num_steps`, or the official N * E // B + 1.

  Where both are 0 (the folder recipe), `config.num_epochs` is set first.
  Source: google-research/simclr, model_util.get_train_steps.

  >>> config = dict(num_steps=0, num_epochs=800.0, batch_size=4096)
  >>> num_steps(ml_collections.ConfigDict(config), 1_281_167)
  250228
  """
  if not config.num_steps and not config.num_epochs:
    set_field(
      config, "num_epochs", epochs_for(num_examples, stage=config.stage)
    )
  steps = config.num_steps
  if not steps:
    steps = int(num_examples * config.num_epochs // config.batch_size) + 1
  if steps >= 2**31:
    raise UserError(
      f"{steps} steps are more than a run can count; lower config.num_steps or "
      "config.num_epochs."
    )
  return steps


def epochs_for(num_examples: int, *, stage: str) -> float:
  """How many epochs suit a dataset of this size.

  Without labels: 10 million images seen, within 100 epochs (the least that is
  published for ImageNet) and 1000 (what is published for CIFAR-10). With
  labels: the published 60 epochs of few and 30 of many, 20,000 images at least.

  >>> epochs_for(50_000, stage="pretrain")
  200.0
  """
  if stage == "finetune":
    epochs = 60 if num_examples <= 20_000 else 30
    return float(max(epochs, -(-20_000 // num_examples)))
  return float(min(max(round(10e6 / num_examples), 100), 1000))


def warmup_steps(config: ml_collections.ConfigDict, num_examples: int) -> int:
  """Warm-up steps: int(round(epochs * N // B)), as in model_util.py.

  >>> config = {"optim": {"warmup_epochs": 10.0}, "batch_size": 512}
  >>> warmup_steps(ml_collections.ConfigDict(config), 50_000)
  976
  """
  return round(config.optim.warmup_epochs * num_examples // config.batch_size)


def check(config: ml_collections.ConfigDict, *, num_devices: int) -> None:
  """Checks every field that can be checked before data is read.

  Raises:
    UserError: the first mistake found.

  >>> from simclr_jax import cli
  >>> check(cli.load_recipe("digits", stage="pretrain"), num_devices=3)
  Traceback (most recent call last):
    ...
  simclr_jax.errors.UserError: config.batch_size is 256, which 3 devices ...
  """
  fields.check(flat(config))
  derived = config.recipe == "folder"  # from the number of images
  if config.num_epochs <= 0 and config.num_steps <= 0 and not derived:
    raise UserError("config.num_epochs or config.num_steps must be above 0.")
  if config.data.eval_fraction >= 1:
    raise UserError(
      "config.data.eval_fraction must be below 1, got "
      f"{config.data.eval_fraction:g}; 0.2 holds out a fifth."
    )
  if config.batch_size % num_devices:
    divisible = max(config.batch_size // num_devices, 1) * num_devices
    raise UserError(
      f"config.batch_size is {config.batch_size}, which {num_devices} devices "
      f"do not divide; take {divisible}, for example."
    )
  first, last = config.profile_steps
  whole = all(isinstance(step, int) for step in config.profile_steps)
  if (first, last) != (0, 0) and not (whole and 1 <= first <= last):
    raise UserError(
      f"config.profile_steps is {config.profile_steps}; expected the first and "
      "the last step, counted from 1, such as (10,12), or (0,0) for none."
    )
  if config.stage == "pretrain":
    if not config.data.image_size:
      raise UserError("config.data.image_size must be above 0, got 0.")
    _check_loss(config)


def _check_loss(config) -> None:
  size, batch = config.memory.size, config.batch_size
  if batch < 2 and not size:
    raise UserError(
      "config.batch_size is 1, which has no other image to tell apart; take 2 "
      "or more."
    )
  if size % batch:
    raise UserError(
      f"config.memory.size is {size}, no multiple of config.batch_size, which "
      f"is {batch}; take {-(-size // batch) * batch}, for example."
    )
  if config.memory.momentum >= 1:
    raise UserError(
      f"config.memory.momentum must be below 1, got {config.memory.momentum:g}."
    )
  if size and not config.head.num_layers:
    raise UserError("config.memory.size needs a projection head; it has none.")
  for name in ("memory.size", "loss.block_size"):
    if config.loss.name == "supcon" and flat(config)[name]:
      raise UserError(
        f"config.loss.name=supcon does not go with config.{name}; leave it 0."
      )


# No selective kernels, no head, and h itself: their sentinel is -1 alone.
_ZERO_IS_NONE = ("model.sk_ratio", "head.num_layers", "head_layer")


def fill(config: ml_collections.ConfigDict, values: Mapping, names) -> None:
  """Sets those of the fields `names` that still hold their sentinel.

  Args:
    config: changed in place.
    values: flat fields, "model.depth" -> value.
    names: the fields to resolve.

  >>> config = ml_collections.ConfigDict({"model": {"depth": 0}})
  >>> fill(config, {"model.depth": 50}, ["model.depth"])
  >>> config.model.depth
  50
  """
  mine = flat(config)
  for name in names:
    if is_derived(name, mine[name]):
      set_field(config, name, values[name])


def inherit(
  config: ml_collections.ConfigDict, values: Mapping, names, *, where: str
) -> None:
  """Like `fill`, but fields that were given must agree with `values`.

  Raises:
    UserError: one differs; `where` says in the message whose values they are.

  >>> config = ml_collections.ConfigDict({"model": {"depth": 18}})
  >>> inherit(config, {"model.depth": 50}, ["model.depth"], where="runs/mine")
  Traceback (most recent call last):
    ...
  simclr_jax.errors.UserError: config.model.depth is 18, but runs/mine has ...
  """
  fill(config, values, names)
  mine = flat(config)
  for name in names:
    if mine[name] != values[name]:
      raise UserError(
        f"config.{name} is {mine[name]}, but {where} has {values[name]}; "
        "leave the field out, it comes from there."
      )


def is_derived(name: str, value) -> bool:
  """Whether the field `name` holds a sentinel: its value comes from elsewhere.

  >>> is_derived("model.width", 0.0), is_derived("model.sk_ratio", 0.0)
  (True, False)
  """
  if isinstance(value, bool):
    return False
  return value in (-1, "", "auto") or (value == 0 and name not in _ZERO_IS_NONE)


def set_field(config: ml_collections.ConfigDict, name: str, value) -> None:
  """Sets the field with a dotted name, also in a locked config.

  >>> config = ml_collections.ConfigDict({"model": {"depth": 18}}).lock()
  >>> set_field(config, "model.depth", 50)
  >>> config.model.depth
  50
  """
  *parents, leaf = name.split(".")
  for parent in parents:
    config = config[parent]
  with config.unlocked():
    config[leaf] = value
