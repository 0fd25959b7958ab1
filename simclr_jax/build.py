"""From a config to the things a stage trains with: data, network, state."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from simclr_jax import (
  augment,
  cli,
  data,
  models,
  optimizers,
  parallel,
  predict,
  probes,
  provenance,
  weights,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError
from simclr_jax.train_state import TrainState

# What a checkpoint says about the network that it holds.
ENCODER = (
  "model.depth",
  "model.width",
  "model.sk_ratio",
  "model.stem",
  "model.pool_padding",
)
HEAD = ("head.num_layers", "head.dim", "head.width")
VIEW = ("data.image_size", "data.canvas_size")


def start(config, *, stage: str) -> ml_collections.ConfigDict:
  """Returns a copy of `config` to resolve, checked as far as it can be.

  Raises:
    UserError: no config of this stage, a field that is not there, or out of its
      range.
  """
  found = f"a {type(config).__name__} without a stage"
  if isinstance(config, Mapping | ml_collections.ConfigDict) and (
    "stage" in config
  ):
    found = f"a config of {config['stage']}"
  if found != f"a config of {stage}":
    raise UserError(
      f"expected a config of {stage}, got {found}; cli.load_recipe"
      f'("digits", stage="{stage}") makes one.'
    )
  config = ml_collections.ConfigDict(config).lock()
  needed = config_lib.flat(cli.load_recipe("digits", stage=stage))
  if missing := sorted(needed.keys() - config_lib.flat(config).keys()):
    raise UserError(
      f"the config lacks {', '.join(missing[:5])}"
      f"{' and others' * (len(missing) > 5)}; configs/{stage}.py has every "
      "field."
    )
  config_lib.check(config, num_devices=jax.device_count())
  group = config.model.bn_group_size
  if group < 0 or (group and jax.device_count() % group):
    raise UserError(
      f"config.model.bn_group_size is {group}, which does not divide the "
      f"{jax.device_count()} devices; 0 is all of them."
    )
  return config


def resolve(config) -> None:
  """Replaces the sentinels that do not depend on another run."""
  size = config.data.image_size
  if config.model.stem == "auto":
    # At 64 pixels the ImageNet stem would leave maps of 2x2.
    config_lib.set_field(
      config, "model.stem", "cifar" if size <= 64 else "imagenet"
    )
  if config.model.dtype == "auto":
    config_lib.set_field(config, "model.dtype", _best_dtype())
  if not config.data.canvas_size:
    # Crops of a big image are enlarged less if the canvas exceeds the view.
    canvas = size if size <= 64 else size * 3 // 2
    config_lib.set_field(config, "data.canvas_size", canvas)
  if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
    raise UserError(
      "config.model.dtype=float64 needs the environment variable "
      "JAX_ENABLE_X64=1."
    )
  print(
    f"{config.stage}: ResNet-{config.model.depth} x{config.model.width:g}, "
    f"{config.model.stem} stem, {config.model.dtype}, {size} pixels; batch "
    f"{config.batch_size} over {jax.device_count()} "
    f"{jax.devices()[0].device_kind} device(s) of {jax.process_count()} "
    "process(es)",
    flush=True,
  )


def _best_dtype() -> str:
  device = jax.local_devices()[0]
  if device.platform == "tpu":
    return "bfloat16"
  if device.platform == "gpu":
    has_it = float(getattr(device, "compute_capability", "0") or 0) >= 8
    return "bfloat16" if has_it else "float32"
  return "float32"


def label_choice(config) -> dict:
  """Which labels may be used: the arguments of `data.label_subset`.

  Raises:
    UserError: percent and number a class were both given.
  """
  if config.labels_per_class and config.label_percent != 100:
    raise UserError(
      f"config.labels_per_class is {config.labels_per_class} and "
      f"config.label_percent {config.label_percent:g}; give one of the two."
    )
  if config.labels_per_class:
    return {"per_class": config.labels_per_class, "seed": config.seed}
  return {"percent": config.label_percent, "seed": config.seed}


def channels(variables: dict) -> int:
  """Of the images that a network with these variables takes."""
  return variables["params"]["encoder"]["stem"]["conv_1"]["kernel"].shape[2]


def refuse_few(config, train: data.Dataset) -> None:
  """Raises UserError where a batch would hold an image twice."""
  if len(train) < config.batch_size:
    raise UserError(
      f"{config.data.name} has {len(train)} images in split "
      f'"{config.data.split}", fewer than config.batch_size='
      f"{config.batch_size}; take a smaller batch."
    )


def make_model(config, *, num_classes: int | None, **options):
  """The network that `config.model` and `config.head` describe."""
  return models.make_model(
    depth=config.model.depth,
    width=config.model.width,
    sk_ratio=config.model.sk_ratio,
    stem=config.model.stem,
    pool_padding=config.model.pool_padding,
    remat=config.model.remat,
    conv=config.model.conv,
    bn_group_size=config.model.bn_group_size,
    num_layers=config.head.num_layers,
    dim=config.head.dim,
    head_width=config.head.width,
    num_classes=num_classes,
    dtype=jnp.dtype(config.model.dtype),
    axis_name=parallel.AXIS,
    **options,
  )


def init(
  config, model, train: data.Dataset, loaded: dict | None = None
) -> dict:
  """What training starts from, {"params", "batch_stats"} as numpy.

  Random, or those of `loaded`, which came from `config.pretrained`; the
  classifier is random always.
  """
  size, channels = config.data.image_size, train.channels
  shape = (1, size, size, channels)
  images = jax.ShapeDtypeStruct(shape, jnp.dtype(config.model.dtype))
  variables = models.init(model, jax.random.key(config.seed), images)
  if loaded is None:
    return variables
  return weights.merge(
    variables, loaded, new=("classifier",), where=config.pretrained
  )


def make_optimizer(config, schedule, **options):
  """The optimizer that `config.optim` describes; see `optimizers`."""
  return optimizers.make_optimizer(
    config.optim.name,
    learning_rate=schedule,
    weight_decay=config.optim.weight_decay,
    **options,
  )


def init_state(variables: dict, optimizer) -> TrainState:
  """The state before step 1, as numpy."""
  opt_state = jax.jit(optimizer.init)(variables["params"])
  return TrainState(
    step=np.asarray(0, np.int32),
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    opt_state=jax.tree.map(np.asarray, opt_state),
  )


def make_schedule(config, num_examples: int, num_steps: int):
  """The learning rate of each step; prints what the run will do."""
  options = {
    "learning_rate": config.optim.learning_rate,
    "batch_size": config.batch_size,
    "scaling": config.optim.scaling,
  }
  warmup = config_lib.warmup_steps(config, num_examples)
  peak = optimizers.peak_learning_rate(**options)
  epochs = num_steps * config.batch_size / num_examples
  print(
    f"{config.stage}: {num_examples} images, {num_steps} steps ({epochs:.4g} "
    f"epochs), {config.optim.name}, peak learning rate {peak:.4g} after "
    f"{warmup} steps, weight decay {config.optim.weight_decay:g}",
    flush=True,
  )
  return optimizers.learning_rate_schedule(
    **options, warmup_steps=warmup, num_steps=num_steps
  )


def host_batches(config, dataset: data.Dataset, num_steps: int):
  """Start step -> this host's part of the global batches from there on."""

  def batches(start_step: int):
    return data.train_batches(
      dataset,
      seed=config.seed,
      batch_size=config.batch_size,
      start_step=start_step,
      num_steps=num_steps,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  return batches


def result(config, *, protocol: str, metrics: dict, num_steps: int) -> dict:
  """What result.json holds; accuracies are fractions in [0, 1] or null."""
  return {
    "stage": config.stage,
    "dataset": config.data.name,
    "protocol": protocol,
    "top1": metrics.get("top1"),
    "top5": metrics.get("top5"),
    "num_steps": num_steps,
    "images_per_second": metrics["images_per_second"],
    "seconds": metrics["seconds"],
    "seed": config.seed,
    "metrics": {
      k: v
      for k, v in metrics.items()
      if k not in ("top1", "top5", "images_per_second", "seconds")
    },
    **provenance.provenance(),
  }


def make_views(config):
  """(key, images, index=, sizes=) -> the views that the stage trains on."""
  views_fn = (
    augment.two_views if config.stage == "pretrain" else augment.crop_flip
  )
  return functools.partial(
    views_fn,
    size=config.data.image_size,
    dtype=jnp.dtype(config.model.dtype),
    **config.augment,
  )


def check_views(config, dataset: data.Dataset) -> None:
  """Raises UserError where no view of `dataset` can be made; computes nothing.

  Before the run has written anything.
  """
  canvas = config.data.canvas_size
  images = jax.ShapeDtypeStruct(
    (2, canvas, canvas, dataset.channels), jnp.uint8
  )
  views_fn = make_views(config)
  jax.eval_shape(lambda x: views_fn(jax.random.key(0), x), images)


def view_dtype(config):
  """Of evaluation's views: float32, or float64 for a network in float64."""
  return jnp.promote_types(config.model.dtype, jnp.float32)


def make_evaluate(config, model, test: data.Dataset | None):
  """State -> top-1 and top-5 of the classifier, or None without images."""
  if test is None:
    return None
  predict_fn = predict.make_predict(
    model,
    size=config.data.image_size,
    dtype=view_dtype(config),
    outputs=("logits",),
  )

  def evaluate(state) -> dict:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs = predict_fn(variables, test, batch_size=config.batch_size)
    return probes.top_k(outputs["logits"], test.labels)

  return evaluate
