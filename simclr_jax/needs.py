"""What one step of a stage needs: memory and FLOPs of its compiled program.

The step is compiled, not run, and nothing of its size is allocated. On a CPU
that is an estimate of what an accelerator needs: XLA's own convolution is
compiled instead of this package's, and bfloat16, which CPUs compute in float32,
counts as half of the float32 program.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax import (
  build,
  distill,
  finetune,
  flops,
  memory,
  parallel,
  pretrain,
)
from simclr_jax import config as config_lib
from simclr_jax.train_state import TrainState

PREFETCHED = 2  # batches that wait on the device beside the one in use


def estimate(
  config, *, num_devices: int, num_classes=1000, channels=3, taught=None
) -> dict:
  """Compiles the step of `config` and reads what it needs.

  Args:
    config: of a stage, resolved.
    num_devices: of this process, all of them.
    num_classes: of the classifier; in pretraining of the probe, where
      config.probe says that there is one.
    channels: of the images.
    taught: the teacher's config, to distil.

  Returns:
    For each device, in bytes: "state" (with the teacher's network), "input"
    (the batch in use and those prefetched), "activations" (all that the step
    needs in between), "total"; "flops" of a step; "seconds" that compiling
    took.

  >>> from simclr_jax import cli
  >>> config = cli.load_recipe("digits,width=0.0625", stage="pretrain")
  >>> build.resolve(config)
  pretrain: ResNet-18 ...
  >>> found = estimate(config, num_devices=jax.device_count(), channels=1)
  >>> found["total"] > found["state"] > 0
  True
  """
  size, canvas = config.data.image_size, config.data.canvas_size
  compiled_as = _for_this_backend(config)
  images = jax.ShapeDtypeStruct(
    (2, size, size, channels), compiled_as.model.dtype
  )

  def variables_of(model):
    return jax.eval_shape(model.init, jax.random.key(0), images)

  step, model, optimizer = _step(
    compiled_as, num_classes, taught and _for_this_backend(taught)
  )
  constants = ()
  if config.stage == "distill":
    constants = (variables_of(step.keywords["teacher"]),)

  def init(variables):
    state = TrainState(
      step=jnp.int32(0),
      opt_state=optimizer.init(variables["params"]),
      **variables,
    )
    if config.stage != "pretrain" or not config.memory.size:
      return state
    return memory.remember(
      state,
      size=config.memory.size,
      dim=config.head.dim,
      dtype=build.view_dtype(config),
    )

  state = jax.eval_shape(init, variables_of(model))
  n = config.batch_size // num_devices
  batch = {
    "image": jax.ShapeDtypeStruct((n, canvas, canvas, channels), jnp.uint8),
    "size": jax.ShapeDtypeStruct((n, 2), jnp.int32),
    "label": jax.ShapeDtypeStruct((n,), jnp.int32),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((num_devices, *x.shape), x.dtype),
    (state, batch, key, *constants),
  )
  begin = time.perf_counter()
  mapped = parallel.pmap(step, donate_argnums=0)
  compiled = mapped.lower(*shapes).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  halved = compiled_as.model.dtype != config.model.dtype
  found = {
    "state": _bytes((state, constants)),
    "input": _bytes(batch) * (1 + PREFETCHED),
    "activations": temporary // 2 if halved else temporary,
  }
  return found | {
    "total": sum(found.values()),
    "flops": flops.count(mapped, *shapes),
    "seconds": time.perf_counter() - begin,
  }


def _for_this_backend(config):
  """A copy with what this backend can compile in place of `config.model`."""
  config = config.copy_and_resolve_references()
  if jax.default_backend() == "cpu":
    if config.model.dtype == "bfloat16":
      config_lib.set_field(config, "model.dtype", "float32")
    if config.model.conv == "auto":
      config_lib.set_field(config, "model.conv", "xla")
  return config


def _step(config, num_classes: int, taught) -> tuple[Any, Any, Any]:
  """(step, model, optimizer) as the stage makes them."""

  def schedule(_):
    return 0.1

  if config.stage == "pretrain":
    model = pretrain.make_model(config, num_classes=num_classes)
    optimizer = build.make_optimizer(config, schedule)
    probe = bool(config.probe and num_classes)
    step = pretrain.make_step(config, model, optimizer, probe=probe)
  elif config.stage == "finetune":
    model = finetune.make_model(config, num_classes=num_classes)
    optimizer = build.make_optimizer(
      config, schedule, trainable=finetune.make_trainable(config)
    )
    step = finetune.make_step(config, model, optimizer)
  else:
    model = distill.make_model(config, num_classes=num_classes)
    optimizer = build.make_optimizer(config, schedule)
    teacher = distill.make_model(taught, num_classes=num_classes)
    step = distill.make_step(config, model, optimizer, teacher=teacher)
  return step, model, optimizer


def _bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
