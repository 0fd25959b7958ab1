"""Compiles the pretraining step for a TPU slice, on a machine without a TPU.

  pip install "simclr_jax[tpu,test]"
  python benchmarks/tpu_aot.py [--topology=v4:4x4x4] [--recipe=imagenet]
      [--batch_size=4096]

The step is that of `python -m simclr_jax.pretrain`, mapped by pmap over the
slice's devices. Prints what XLA's TPU compiler says of its memory on each
device, and its collectives: number and bytes of their results. Takes minutes.
"""

import argparse
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is in no cloud

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from test_collectives import collectives  # noqa: E402

from simclr_jax import (  # noqa: E402
  build,
  cli,
  optimizers,
  parallel,
  pretrain,
)
from simclr_jax.train_state import TrainState  # noqa: E402


def make_step(config):
  """(step, abstract state of one device), as `pretrain` makes them."""
  model = build.make_model(config, num_classes=1000, head_layer=0, probe=True)
  optimizer = optimizers.make_optimizer(
    config.optim.name,
    learning_rate=lambda step: 0.1,
    weight_decay=config.optim.weight_decay,
  )
  size = config.data.image_size

  def make_state():
    images = jnp.zeros((2, size, size, 3), config.model.dtype)
    variables = model.init(jax.random.key(0), images)
    return TrainState(
      step=jnp.int32(0),
      opt_state=optimizer.init(variables["params"]),
      **variables,
    )

  step = pretrain.make_step(config, model, optimizer, probe=True)
  return step, jax.eval_shape(make_state)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v4:4x4x4")
  parser.add_argument("--recipe", default="imagenet")
  parser.add_argument("--batch_size", type=int, default=4096)
  options = parser.parse_args()
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=options.topology
  ).devices
  count = len(devices)
  config = cli.load_recipe(options.recipe, stage="pretrain")
  config.model.update(stem="imagenet", dtype="bfloat16", conv="xla")
  canvas = config.data.image_size * 3 // 2
  step, state = make_step(config)
  n = options.batch_size // count
  batch = {
    "image": jax.ShapeDtypeStruct((n, canvas, canvas, 3), jnp.uint8),
    "size": jax.ShapeDtypeStruct((n, 2), jnp.int32),
    "label": jax.ShapeDtypeStruct((n,), jnp.int32),
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype),
    (state, batch, key),
  )
  begin = time.perf_counter()
  compiled = (
    jax.pmap(step, axis_name=parallel.AXIS, donate_argnums=0, devices=devices)
    .lower(*args)
    .compile()
  )
  print(
    f"{count} x {devices[0].device_kind}, batch {options.batch_size}, "
    f"ResNet-{config.model.depth} at {config.data.image_size} pixels, compiled "
    f"in {time.perf_counter() - begin:.0f} s"
  )
  memory = compiled.memory_analysis()
  for name in ("argument", "output", "alias", "temp", "generated_code"):
    size = getattr(memory, f"{name}_size_in_bytes")
    print(f"{name:16}{size / 2**20:12.1f} MiB a device")
  found = collectives(compiled.as_text())
  for kind in sorted({kind for kind, _ in found}):
    sizes = [size for name, size in found if name == kind]
    print(f"{kind:20}{len(sizes):5}{sum(sizes) / 2**20:12.2f} MiB")
  print(f"parameters: {sum(x.size for x in jax.tree.leaves(state.params))}")


if __name__ == "__main__":
  main()
