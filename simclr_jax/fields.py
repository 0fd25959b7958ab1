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
  "scratch.width",
  "scratch.dim",
  "scratch.head_width",
  "scratch.image_size",
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
  "scratch.canvas_size",
)
# Far above what is meant, and below what only fails after a while.
_AT_MOST = {
  "batch_size": 2**24,
  "num_epochs": 1e6,
  "label_percent": 100,
  "data.image_size": 2**14,
  "data.canvas_size": 2**14,
  "model.width": 1000,
  "head.width": 1000,
  "head.dim": 2**20,
  "head.num_layers": 100,
  "loss.label_weight": 1,
  "optim.warmup_epochs": 1e6,
  "scratch.width": 1000,
  "scratch.head_width": 1000,
  "scratch.dim": 2**20,
  "scratch.num_layers": 100,
  "scratch.image_size": 2**14,
  "scratch.canvas_size": 2**14,
}
_STEMS = ("auto", "imagenet", "cifar")
_POOL_PADDINGS = ("auto", "same", "torch")
_CHOICES = {
  "data.on_error": ("raise", "skip"),
  "model.dtype": ("auto", "float32", "bfloat16", "float64"),
  "model.stem": _STEMS,
  "model.conv": ("auto", "xla", "cpu", "gpu"),
  "model.pool_padding": _POOL_PADDINGS,
  "loss.name": ("nt_xent", "supcon"),
  "optim.name": ("lars", "momentum", "adam"),
  "optim.scaling": ("linear", "sqrt", "none"),
  "scratch.stem": _STEMS,
  "scratch.pool_padding": _POOL_PADDINGS,
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
  for name, most in _AT_MOST.items():
    if name in fields and fields[name] > most:
      raise UserError(
        f"config.{name} must be at most {most:.12g}, got {fields[name]}."
      )
  for name, allowed in _CHOICES.items():
    if name in fields and fields[name] not in allowed:
      raise UserError(
        f"config.{name} must be one of {', '.join(allowed)}; got "
        f'"{fields[name]}"{nearest(str(fields[name]), allowed)}'
      )
  if fields.get("seed", 0) >= 2**32:  # JAX takes 32 bits of it
    raise UserError(f"config.seed must be below 2**32: {fields['seed']}.")
