"""What a pretraining run will need, before it runs: memory, FLOPs, hours.

python -m simclr_jax.plan --config=pretrain.py:imagenet [--config.FIELD=VALUE]
    [--devices=8] [--memory_gib=80] [--peak_tflops=989] [--utilisation=0.4]
    [--images=1281167] [--output=plan.json]

The step is compiled, not run, and nothing of its size is allocated. On a CPU
that is an estimate of what an accelerator needs: XLA's own convolution is
compiled instead of this package's, and bfloat16, which CPUs compute in float32,
counts as half of the float32 program.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax import (
  build,
  cli,
  diagnostics,
  memory,
  optimizers,
  parallel,
  pretrain,
  sources,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError
from simclr_jax.train_state import TrainState

FLAGS: dict[str, Any] = {
  "devices": 0,  # of the run; 0: those of this machine
  "memory_gib": 0.0,  # of each; 0: not compared
  "peak_tflops": 0.0,  # of each, at the run's dtype; 0: from its name
  "utilisation": 0.4,  # the part of the peak that is reached
  "images": 0,  # 0: those of the dataset
  "output": "",  # a JSON file
}
BLOCK = 256  # pairs a time, where a blockwise loss is tried
PREFETCHED = 2  # batches that wait on the device beside the one in use


def estimate(config, *, num_devices: int, num_classes=1000, channels=3) -> dict:
  """Compiles the step of `config` and reads what it needs.

  Args:
    config: of pretraining, resolved.
    num_devices: of this process, all of them.
    num_classes: of the probe, where config.probe says that there is one.
    channels: of the images.

  Returns:
    For each device, in bytes: "state", "input" (the batch in use and those
    prefetched), "activations" (all that the step needs in between), "total";
    "flops" of a step; "seconds" that compiling took.

  >>> config = cli.load_recipe("digits,width=0.0625", stage="pretrain")
  >>> build.resolve(config)
  pretrain: ResNet-18 ...
  >>> found = estimate(config, num_devices=jax.device_count(), channels=1)
  >>> found["total"] > found["state"] > 0
  True
  """
  size, canvas = config.data.image_size, config.data.canvas_size
  on_cpu = jax.default_backend() == "cpu"
  halved = on_cpu and config.model.dtype == "bfloat16"
  compiled_as = config.copy_and_resolve_references()
  if halved:
    config_lib.set_field(compiled_as, "model.dtype", "float32")
  if on_cpu and config.model.conv == "auto":
    config_lib.set_field(compiled_as, "model.conv", "xla")
  probe = bool(config.probe and num_classes)
  model = build.make_model(
    compiled_as,
    num_classes=num_classes if probe else None,
    head_layer=0,
    probe=True,
  )
  optimizer = optimizers.make_optimizer(
    config.optim.name,
    learning_rate=lambda step: 0.1,
    weight_decay=config.optim.weight_decay,
  )

  def init():
    images = jnp.zeros((2, size, size, channels), compiled_as.model.dtype)
    variables = model.init(jax.random.key(0), images)
    state = TrainState(
      step=jnp.int32(0),
      opt_state=optimizer.init(variables["params"]),
      **variables,
    )
    if not config.memory.size:
      return state
    return memory.remember(
      state,
      size=config.memory.size,
      dim=config.head.dim,
      dtype=build.view_dtype(config),
    )

  state = jax.eval_shape(init)
  n = config.batch_size // num_devices
  batch = {
    "image": jax.ShapeDtypeStruct((n, canvas, canvas, channels), jnp.uint8),
    "size": jax.ShapeDtypeStruct((n, 2), jnp.int32),
    "label": jax.ShapeDtypeStruct((n,), jnp.int32),
  }
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((num_devices, *x.shape), x.dtype),
    (state, batch, jax.eval_shape(lambda: jax.random.key(0))),
  )
  step = pretrain.make_step(compiled_as, model, optimizer, probe=probe)
  begin = time.perf_counter()
  compiled = parallel.pmap(step, donate_argnums=0).lower(*shapes).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  found = {
    "state": _bytes(state),
    "input": _bytes(batch) * (1 + PREFETCHED),
    "activations": temporary // 2 if halved else temporary,
  }
  return found | {
    "total": sum(found.values()),
    "flops": compiled.cost_analysis()["flops"],
    "seconds": time.perf_counter() - begin,
  }


def _bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def ways(config, *, num_devices: int) -> list[tuple[str, dict]]:
  """What may make a device's part smaller: (name, fields to set).

  >>> config = cli.load_recipe("digits", stage="pretrain")
  >>> [name for name, _ in ways(config, num_devices=1)]
  ['model.remat=true', '2 devices', '4 devices', '8 devices']
  """
  found: list[tuple[str, dict]] = []
  if config.model.dtype == "float32":
    found.append(("model.dtype=bfloat16", {"model.dtype": "bfloat16"}))
  if not config.loss.block_size and config.batch_size // num_devices > BLOCK:
    found.append((f"loss.block_size={BLOCK}", {"loss.block_size": BLOCK}))
  if not config.model.remat:
    found.append(("model.remat=true", {"model.remat": True}))
  if len(found) > 1:
    fields = {k: v for _, each in found for k, v in each.items()}
    found.append(("all of these", fields))
  for factor in (2, 4, 8):
    # A device's part of it on more devices, but for the columns of the logits.
    size, rest = divmod(config.batch_size, factor)
    if not rest and size % num_devices == 0:
      name = f"{num_devices * factor} devices"
      found.append((name, {"batch_size": size}))
  return found


def plan(config, **options) -> dict:
  """Prints the plan of a run and returns it.

  Args:
    config: of pretraining, as a recipe makes it.
    **options: those of FLAGS, but for output.

  Returns:
    `estimate`'s dict and "num_steps", "hours" (None: not known), "fits" (None:
    not compared) and "ways", name -> bytes a device.

  Raises:
    UserError: a mistake in the config or an option.

  >>> found = plan(cli.load_recipe("digits,width=0.0625", stage="pretrain"))
  pretrain: ResNet-18 ...
  >>> found["num_steps"]
  197
  """
  options = FLAGS | options
  _check(options)
  num_devices = jax.device_count()
  config = config.copy_and_resolve_references().lock()
  on_cpu = jax.default_backend() == "cpu"
  if config.model.dtype == "auto" and on_cpu:
    config_lib.set_field(config, "model.dtype", "bfloat16")
  config_lib.check(config, num_devices=num_devices)
  pretrain.resolve_network(config)
  build.resolve(config)
  images, described = _images(config, options["images"])
  num_steps = config.num_steps
  if images:
    num_steps = config_lib.num_steps(config, images)
  found = estimate(config, num_devices=num_devices, **described)
  peak = options["peak_tflops"] or diagnostics.peak_tflops(
    jax.devices()[0].device_kind
  )
  hours = None
  if peak and num_steps:
    rate = peak * 1e12 * options["utilisation"]
    hours = found["flops"] * num_steps / rate / 3600
  result = found | {"num_steps": num_steps, "hours": hours, "fits": None}
  _show(result, options, peak, on_cpu)
  if limit := options["memory_gib"] * 2**30:
    result["fits"] = found["total"] <= limit
    result["ways"] = {}
    print(f"  fits {options['memory_gib']:g} GiB: {_yes(result['fits'])}")
    for name, fields in (
      () if result["fits"] else ways(config, num_devices=num_devices)
    ):
      other = config.copy_and_resolve_references()
      for field, value in fields.items():
        config_lib.set_field(other, field, value)
      total = estimate(other, num_devices=num_devices, **described)["total"]
      result["ways"][name] = total
      print(
        f"    {name:24}{total / 2**30:9.2f} GiB  {_yes(total <= limit)}",
        flush=True,
      )
  return result


def _check(options: dict) -> None:
  if not 0 < options["utilisation"] <= 1:
    raise UserError(
      f"--utilisation={options['utilisation']:g} must be above 0 and at most "
      "1: the part of the peak that training reaches, such as 0.4."
    )
  for name in ("memory_gib", "peak_tflops", "images", "devices"):
    if options[name] < 0:
      raise UserError(f"--{name}={options[name]:g} must not be negative.")
  have, want = jax.device_count(), options["devices"]
  if want and want != have:
    raise UserError(
      f"--devices={want}, but JAX has {have} here: compile for a machine of "
      "your choice with JAX_PLATFORMS=cpu before the command, and without "
      "--xla_force_host_platform_device_count in XLA_FLAGS."
    )


def _images(config, given: int) -> tuple[int, dict]:
  """(number of images or 0, what is known of them)."""
  try:
    source = sources.make_source(
      config.data.name,
      split=config.data.split,
      data_dir=config.data.data_dir,
      labels=config.data.labels,
      eval_fraction=config.data.eval_fraction,
      seed=config.seed,
    )
  except UserError as error:
    if not given and not config.num_steps:
      print(
        f"plan: {config.data.name} cannot be opened, so the number of steps is "
        f"not known; give --images=N. ({error})"
      )
    return given, {}
  return given or len(source), {
    "num_classes": source.num_classes,
    "channels": source.channels,
  }


def _show(result: dict, options: dict, peak: float | None, on_cpu: bool):
  where = jax.devices()[0].device_kind
  note = ": an estimate of what an accelerator needs" if on_cpu else ""
  print(f"plan: compiled for {where} in {result['seconds']:.0f} s{note}")
  print("  on each device")
  for name, text in (
    ("state", "parameters, moving averages, optimizer"),
    ("input", f"the batch and {PREFETCHED} more that wait"),
    ("activations", "everything between, at its most"),
    ("total", ""),
  ):
    print(f"    {name:12}{result[name] / 2**30:9.2f} GiB  {text}".rstrip())
  print(f"    a step      {result['flops'] / 1e12:9.3f} TFLOP")
  if result["hours"] is not None:
    print(
      f"  {result['num_steps']} steps take {result['hours']:.3g} hours at "
      f"{options['utilisation']:.0%} of {peak:g} TFLOP/s"
    )
  elif not peak:
    print("  hours: give --peak_tflops of a device, such as 312 (A100), 989")


def _yes(value: bool) -> str:
  return "yes" if value else "no"


def main(argv=None) -> None:
  """The command; see the top of this file."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if {"--help", "-h"} & set(argv):
    print(__doc__.strip())
    return
  try:
    options, rest = _flags(argv)
    output = options.pop("output")
    config, _ = cli.parse([*rest, "--workdir=none"], stage="pretrain")
    if options["devices"] > 0:
      jax.config.update("jax_num_cpu_devices", options["devices"])
    if output and not Path(output).resolve().parent.is_dir():
      raise UserError(f"--output={output}: there is no such folder.")
    if Path(output or "plan.json").is_dir():
      raise UserError(f"--output={output} is a folder; give a file's name.")
    result = plan(config, **options)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  if output:
    Path(output).write_text(json.dumps(result, indent=2) + "\n")


def _flags(argv: list[str]) -> tuple[dict, list[str]]:
  """(values of FLAGS, the other arguments)."""
  options, rest = dict(FLAGS), []
  for arg in argv:
    name, _, text = arg.lstrip("-").partition("=")
    if name not in FLAGS:
      rest.append(arg)
      continue
    try:
      options[name] = type(FLAGS[name])(text)
    except ValueError:
      kind = type(FLAGS[name]).__name__
      raise UserError(
        f'--{name} takes {kind}, as --{name}=N; got "{text}".'
      ) from (None)
  return options, rest


if __name__ == "__main__":
  main()
