"""What a single field of a config may hold, whatever the others hold."""

import math
from collections.abc import Mapping

from simclr_jax.errors import UserError, nearest

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
  "model.conv": ("auto", "xla", "cpu", "gpu"),
  "model.pool_padding": ("auto", "same", "torch"),
  "loss.name": ("nt_xent", "supcon"),
  "optim.name": ("lars", "momentum", "adam"),
  "optim.scaling": ("linear", "sqrt", "none"),
}


def check(fields: Mapping) -> None:
  """Checks each of the flat `fields`, {"optim.name": value, ...}.

  Raises:
    UserError: the first one that is wrong.

  >>> check({"optim.learning_rate": float("nan")})
  Traceback (most recent call last):
    ...
  simclr_jax.errors.UserError: config.optim.learning_rate must be a finite ...
  """
  for name, value in fields.items():
    pair = value if isinstance(value, tuple) else ()
    if isinstance(value, tuple) and (
      len(pair) != 2 or not all(isinstance(x, int | float) for x in pair)
    ):
      raise UserError(f"config.{name} must be two numbers, got {value}.")
    for number in pair or (value,):
      if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"config.{name} must be a finite number, got {value}.")
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
  if fields.get("seed", 0) >= 2**32:  # JAX takes 32 bits of it
    raise UserError(f"config.seed must be below 2**32: {fields['seed']}.")
