"""Runs without training: the directory of a network with random weights."""

import jax
import numpy as np

from simclr_jax import build, checkpoint, cli, config, models


def make_run(
  workdir, *, stage="finetune", channels=3, num_classes=None, names=(), **fields
):
  """Writes a run; `fields` are of its config, with __ for a dot."""
  settings = cli.load_recipe("digits", stage=stage)
  defaults = {
    "model.depth": 18,
    "model.width": 0.0625,
    "model.sk_ratio": 0.0,
    "model.stem": "cifar",
    "model.pool_padding": "same",
    "model.dtype": "float32",
    "head.num_layers": 2,
    "head.dim": 8,
    "head.width": 1.0,
    "data.image_size": 8,
    "data.canvas_size": 8,
  }
  if stage == "finetune":
    defaults["head_layer"] = 1
  given = {name.replace("__", "."): value for name, value in fields.items()}
  for name, value in (defaults | given).items():
    config.set_field(settings, name, value)
  head_layer = 0 if stage == "pretrain" else settings.head_layer
  model = build.make_model(
    settings, num_classes=num_classes, head_layer=head_layer
  )
  size = settings.data.image_size
  shape = jax.ShapeDtypeStruct((2, size, size, channels), np.float32)
  variables = models.init(model, jax.random.key(0), shape)
  rng = np.random.default_rng(1)

  def spread(path, x):
    """BatchNorm and classifier that are not those of a new network."""
    leaf = path[-1].key
    ranges = {"scale": (0.8, 1.2), "var": (0.3, 0.6)}
    low, high = ranges.get(leaf, (-0.1, 0.1))
    if leaf == "scale" and not x.any():  # the last of a block
      low, high = 0.1, 0.3
    if leaf == "kernel" and path[1].key != "classifier":
      return x
    return rng.uniform(low, high, x.shape).astype(x.dtype)

  variables = jax.tree_util.tree_map_with_path(spread, variables)
  with checkpoint.open_manager(workdir, keep=1) as manager:
    checkpoint.save(
      manager,
      {"step": np.asarray(7, np.int32), "opt_state": {}, **variables},
      settings,
      extra={
        "label_names": list(names),
        "labels_used": {"percent": 100.0, "seed": 0},
      },
    )
  return settings, variables


def apply(settings, variables, images, *, num_classes=None):
  """Outputs of that network for float images, on one device by lax."""
  config.set_field(settings, "model.conv", "xla")
  head_layer = 0 if settings.stage == "pretrain" else settings.head_layer
  model = build.make_model(
    settings, num_classes=num_classes, head_layer=head_layer
  )
  outputs = jax.jit(model.apply)(variables, images)
  return jax.tree.map(np.asarray, outputs)
