"""What a run will need, before it runs: memory, FLOPs, hours.

python -m simclr_jax.plan --config=pretrain.py:imagenet [--config.FIELD=VALUE]
    [--devices=8] [--memory_gib=80] [--peak_tflops=989] [--utilisation=0.4]
    [--images=1281167] [--output=plan.json]

The recipe may be of any stage. The step is compiled, not run; `needs.py` says
what a CPU's estimate of an accelerator's needs is.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from simclr_jax import (
  build,
  cli,
  data,
  diagnostics,
  distill,
  errors,
  finetune,
  pretrain,
  sources,
  storage,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError
from simclr_jax.needs import PREFETCHED, estimate

FLAGS: dict[str, Any] = {
  "devices": 0,  # of the run; 0: those of this machine
  "memory_gib": 0.0,  # of each; 0: not compared
  "peak_tflops": 0.0,  # of each, at the run's dtype; 0: from its name
  "utilisation": 0.4,  # the part of the peak that is reached
  "images": 0,  # 0: those of the dataset
  "output": "",  # a JSON file
}
# What a flag may be at most; JAX makes each of the devices on this machine.
_MOST = {
  "devices": 4096,
  "memory_gib": 10**6,
  "peak_tflops": 10**6,
  "images": 10**12,
}
BLOCK = 256  # pairs a time, where a blockwise loss is tried


def ways(config, *, num_devices: int) -> list[tuple[str, dict]]:
  """What may make a device's part smaller: (name, fields to set).

  >>> config = cli.load_recipe("digits", stage="pretrain")
  >>> [name for name, _ in ways(config, num_devices=1)]
  ['model.remat=true', '2 devices', '4 devices', '8 devices']
  """
  found: list[tuple[str, dict]] = []
  if config.model.dtype == "float32":
    found.append(("model.dtype=bfloat16", {"model.dtype": "bfloat16"}))
  pairs = config.batch_size // num_devices
  if not config_lib.flat(config).get("loss.block_size", 1) and pairs > BLOCK:
    found.append((f"loss.block_size={BLOCK}", {"loss.block_size": BLOCK}))
  if not config.model.remat:
    found.append(("model.remat=true", {"model.remat": True}))
  if len(found) > 1:
    fields = {k: v for _, each in found for k, v in each.items()}
    found.append(("all of these", fields))
  for factor in (2, 4, 8):
    # A smaller batch here costs a device what more devices would, but for the
    # columns of the logits.
    size, rest = divmod(config.batch_size, factor)
    if not rest and size % num_devices == 0:
      name = f"{num_devices * factor} devices"
      found.append((name, {"batch_size": size}))
  return found


def plan(
  config,
  *,
  devices: int = 0,
  memory_gib: float = 0.0,
  peak_tflops: float = 0.0,
  utilisation: float = 0.4,
  images: int = 0,
) -> dict:
  """Prints the plan of a run and returns it.

  Args:
    config: of a stage, as a recipe makes it.
    devices: how many JAX must have here, at most 4096; 0: any number.
    memory_gib: of each device, GiB, at most 1e6; 0: not compared.
    peak_tflops: of each device, at the run's dtype, at most 1e6; 0: from its
      name.
    utilisation: the part of the peak that training reaches, in (0, 1].
    images: of the dataset, where it cannot be opened, at most 1e12; 0: the
      dataset's own. What else is not known of it then (channels, classes) is
      assumed and said.

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
  options = {
    "devices": devices,
    "memory_gib": memory_gib,
    "peak_tflops": peak_tflops,
    "utilisation": utilisation,
    "images": images,
  }
  _check(options)
  _check_devices(devices)
  num_devices = jax.device_count()
  config = config.copy_and_resolve_references().lock()
  on_cpu = jax.default_backend() == "cpu"
  if config.model.dtype == "auto" and on_cpu:
    config_lib.set_field(config, "model.dtype", "bfloat16")
  config_lib.check(config, num_devices=num_devices)
  stored = _resolve_network(config)
  build.resolve(config)
  images, described = _images(config, images)
  described |= stored
  assumed = {"channels": 3, "num_classes": 1000}
  if missing := sorted(assumed.keys() - described.keys()):
    said = [f"{assumed[k]} {k.removeprefix('num_')}" for k in missing]
    print(
      f"plan: assuming {' and '.join(said)}, as {config.data.name} cannot be "
      "opened"
    )
  described = assumed | described
  num_steps = config.num_steps
  if images:
    num_steps = config_lib.num_steps(config, images)
  found = estimate(config, num_devices=num_devices, **described)
  peak = peak_tflops or diagnostics.peak_tflops(jax.devices()[0].device_kind)
  hours = None
  if peak and num_steps:
    rate = peak * 1e12 * utilisation
    hours = found["flops"] * num_steps / rate / 3600
  result = found | {"num_steps": num_steps, "hours": hours, "fits": None}
  _show(result, utilisation, peak, on_cpu)
  if limit := memory_gib * 2**30:
    result["fits"] = found["total"] <= limit
    result["ways"] = {}
    print(f"  fits {memory_gib:g} GiB: {_yes(result['fits'])}")
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


def _resolve_network(config) -> dict:
  """Takes from another run what the stage does; returns what is known of it."""
  if config.stage == "distill":
    taught, variables, about = distill.load_teacher(config)
    distill.resolve_student(config, taught)
    return {
      "taught": taught,
      "num_classes": len(about["label_names"]),
      "channels": build.channels(variables),
    }
  stage = {"pretrain": pretrain, "finetune": finetune}[config.stage]
  loaded = stage.resolve_network(config)
  return {"channels": build.channels(loaded)} if loaded else {}


def _check(options: dict) -> None:
  """Before JAX starts, which many devices would keep busy for hours."""
  if not 0 < options["utilisation"] <= 1:
    raise UserError(
      f"--utilisation={options['utilisation']:g} must be above 0 and at most "
      "1: the part of the peak that training reaches, such as 0.4."
    )
  for name, most in _MOST.items():
    if not 0 <= options[name] <= most:  # nor nan
      raise UserError(f"--{name}={options[name]} must be from 0 to {most}.")


def _check_devices(want: int) -> None:
  have = jax.device_count()
  if want and want != have:
    raise UserError(
      f"--devices={want}, but JAX has {have} here: compile for a machine of "
      "your choice with JAX_PLATFORMS=cpu before the command, and without "
      "--xla_force_host_platform_device_count in XLA_FLAGS."
    )


def _images(config, given: int) -> tuple[int, dict]:
  """(number of images that train or 0, what is known of all)."""
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
    if config.data.name == "folder:" and not given:  # Of the bare recipe.
      raise UserError(
        'config.data.name is "folder:"; name the folder of the images '
        "(--config.data.name=folder:PATH), or say how many: --images=N."
      ) from None
    if not given and not config.num_steps:
      print(
        f"plan: {config.data.name} cannot be opened, so the number of steps is "
        f"not known; give --images=N. ({error})"
      )
    return _training(config, given, None), {}
  return _training(config, given or len(source), source), {
    "num_classes": source.num_classes,
    "channels": source.channels,
  }


def _training(config, images: int, source) -> int:
  """How many of the dataset's images train."""
  if config.stage != "finetune" or not images:
    return images
  if source is not None and source.labels is not None:
    return len(data.label_subset(source.labels, **build.label_choice(config)))
  if config.labels_per_class:
    classes = source.num_classes if source is not None else 0
    return min(config.labels_per_class * classes, images)
  return max(int(images * config.label_percent / 100), 1)


def _show(result: dict, utilisation: float, peak: float | None, on_cpu: bool):
  where = jax.devices()[0].device_kind
  note = ": an estimate of what an accelerator needs" if on_cpu else ""
  print(f"plan: compiled for {where} in {result['seconds']:.0f} s{note}")
  print("  on each device")
  for name, text in (
    ("state", "parameters, moving averages, optimizer (and teacher)"),
    ("input", f"the batch and {PREFETCHED} more that wait"),
    ("activations", "everything between, at its most"),
    ("total", ""),
  ):
    print(f"    {name:12}{result[name] / 2**30:9.2f} GiB  {text}".rstrip())
  print(f"    a step      {result['flops'] / 1e12:9.3f} TFLOP")
  if result["hours"] is not None:
    print(
      f"  {result['num_steps']} steps take {result['hours']:.3g} hours at "
      f"{utilisation:.0%} of {peak:g} TFLOP/s"
    )
  elif not peak:
    print(
      "  hours: give --peak_tflops of a device, such as 312 (A100), 989 (H100)"
    )


def _yes(value: bool) -> str:
  return "yes" if value else "no"


def main(argv=None) -> None:
  """The command; see the top of this file."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if {"--help", "-h"} & set(argv):
    print(__doc__.strip())
    return
  with errors.ending():
    options, rest = _flags(argv)
    output = options.pop("output")
    _check(options)
    given = [a.partition("=")[2] for a in rest if a.startswith("--config=")]
    if not given:
      raise UserError(
        "--config is missing; such as --config=pretrain.py:digits."
      )
    argv = [*rest, "--workdir=none"]
    config, _ = cli.parse(argv, stage=cli.stage_of(given[-1]))
    if options["devices"] > 0:
      jax.config.update("jax_num_cpu_devices", options["devices"])
    file = Path(output).expanduser()
    if output and not file.absolute().parent.is_dir():
      raise UserError(f"--output={output}: there is no such folder.")
    if output and file.is_dir():
      raise UserError(f"--output={output} is a folder; give a file's name.")
    result = plan(config, **options)
    if output:
      with storage.writable(output, "--output"):
        storage.write_whole(file, json.dumps(result, indent=2) + "\n")


def _flags(argv: list[str]) -> tuple[dict, list[str]]:
  """(values of FLAGS, the other arguments)."""
  options, rest = dict(FLAGS), []
  for arg in argv:
    name, _, text = arg.lstrip("-").partition("=")
    if name not in FLAGS:
      if arg.startswith("-") and name.partition(".")[0] != "config":
        hint = config_lib.nearest(name, list(FLAGS))
        raise UserError(
          f"unknown flag --{name}{hint} Flags: --config, --config.FIELD, "
          f"{', '.join(f'--{flag}' for flag in FLAGS)}."
        )
      rest.append(arg)
      continue
    try:
      options[name] = type(FLAGS[name])(text)
    except ValueError:
      kind = type(FLAGS[name]).__name__
      raise UserError(
        f'--{name} takes {kind}, as --{name}=N; got "{text}".'
      ) from None
  return options, rest


if __name__ == "__main__":
  main()
