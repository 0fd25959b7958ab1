"""Recipes and their checks: the arguments of a recipe, derived fields, errors.

A config is a locked `ml_collections.ConfigDict` in which every field is
present. The sentinels 0, "" and "auto" mean "derived"; `resolve` and the stages
replace them, and `config.json` of a run holds the resolved values.
"""

import difflib
import json
from collections.abc import Mapping, Sequence

import ml_collections


class UserError(ValueError):
  """A mistake of the user's: shown as one line, the process exits with 2."""


class Diverged(RuntimeError):
  """The loss is not finite: shown as one line, the process exits with 1."""


def nearest(name: str, allowed: Sequence[str]) -> str:
  """Returns '; did you mean "x"?' for a close match of `name`, else "".

  >>> nearest("digts", ["digits", "cifar10"])
  '; did you mean "digits"?'
  """
  close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
  return f'; did you mean "{close[0]}"?' if close else ""


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


_ADDED = {"data.label_ids": "", "head.width": 1.0}


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
  for name, value in _ADDED.items():
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
  if config.num_steps:
    return config.num_steps
  return int(num_examples * config.num_epochs // config.batch_size) + 1


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


_POSITIVE = (
  "batch_size",
  "loss.temperature",
  "log_every_steps",
  "checkpoint_every_steps",
  "eval_every_steps",
  "keep_checkpoints",
  "knn.num_neighbors",
)
_NOT_NEGATIVE = (
  "seed",
  "num_epochs",
  "num_steps",
  "data.image_size",
  "data.canvas_size",
  "data.eval_fraction",
  "data.memory_gib",
  "head.width",
  "optim.learning_rate",
  "optim.warmup_epochs",
  "optim.weight_decay",
  "label_percent",
  "labels_per_class",
  "knn.bank_size",
  "loss.label_weight",
  "loss.block_size",
  "memory.size",
  "memory.momentum",
)
_CHOICES = {
  "data.on_error": ("raise", "skip"),
  "model.dtype": ("auto", "float32", "bfloat16", "float64"),
  "model.stem": ("auto", "imagenet", "cifar"),
  "model.conv": ("auto", "xla", "cpu"),
  "model.pool_padding": ("auto", "same", "torch"),
  "loss.name": ("nt_xent", "supcon"),
  "optim.name": ("lars", "momentum", "adam"),
  "optim.scaling": ("linear", "sqrt", "none"),
}


def check(config: ml_collections.ConfigDict, *, num_devices: int) -> None:
  """Checks every field that can be checked before data is read.

  Raises:
    UserError: the first mistake found.

  >>> from simclr_jax import cli
  >>> check(cli.load_recipe("digits", stage="pretrain"), num_devices=3)
  Traceback (most recent call last):
    ...
  simclr_jax.config.UserError: config.batch_size is 256, which 3 devices ...
  """
  fields = flat(config)
  for name in _POSITIVE:
    if name in fields and not fields[name] > 0:
      raise UserError(f"config.{name} must be above 0, got {fields[name]}.")
  for name in _NOT_NEGATIVE:
    if name in fields and fields[name] < 0:
      raise UserError(f"config.{name} must not be negative: {fields[name]}.")
  for name, allowed in _CHOICES.items():
    if name in fields and fields[name] not in allowed:
      raise UserError(
        f"config.{name} must be one of {', '.join(allowed)}; got "
        f'"{fields[name]}"{nearest(str(fields[name]), allowed)}'
      )
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
  if config.profile_steps[0] > config.profile_steps[1]:
    raise UserError(f"config.profile_steps ends early: {config.profile_steps}.")
  if config.stage == "pretrain":
    _check_loss(config)


def _check_loss(config) -> None:
  size, batch = config.memory.size, config.batch_size
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
    if is_derived(mine[name]):
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
  simclr_jax.config.UserError: config.model.depth is 18, but runs/mine has ...
  """
  fill(config, values, names)
  mine = flat(config)
  for name in names:
    if mine[name] != values[name]:
      raise UserError(
        f"config.{name} is {mine[name]}, but {where} has {values[name]}; "
        "leave the field out, it comes from there."
      )


def is_derived(value) -> bool:
  """Whether a field holds a sentinel: its value comes from elsewhere.

  >>> is_derived("auto"), is_derived(50)
  (True, False)
  """
  return not isinstance(value, bool) and value in (0, -1, "", "auto")


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
