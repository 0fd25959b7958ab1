"""The command line of a stage: flags in, exit code out.

  python -m simclr_jax.pretrain --config=pretrain.py:digits --workdir=DIR
      [--config.optim.learning_rate=0.1 ...]

Exit codes: 0 done, 1 a fault (with its traceback), 2 the user's mistake (one
line), 143 or 130 stopped by SIGTERM or SIGINT with the state saved.
"""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from simclr_jax import config as config_lib
from simclr_jax import cpu_backend, errors, hosts, malloc
from simclr_jax.config import UserError

STAGES = ("pretrain", "finetune", "distill")
_SHORTEST_CACHED = "jax_persistent_cache_min_compile_time_secs"
_USAGE = """usage: python -m simclr_jax.{stage} --config=RECIPE --workdir=DIR

  --config    configs/{stage}.py:RECIPE, {stage}.py:RECIPE or RECIPE alone,
              such as {stage}.py:digits; recipes and options are described at
              the top of {file}
  --config.FIELD=VALUE    sets any field of the recipe
  --workdir   where the run is kept; the same command continues it
"""


def run(train_and_evaluate, *, stage: str, argv=None) -> None:
  """Parses flags, trains, and ends the process with an exit code.

  Args:
    train_and_evaluate: (config, workdir) -> result.
    stage: the name of its recipes' file.
    argv: arguments without the program's name; None is sys.argv's.

  >>> run(print, stage="pretrain", argv=["--workdri=runs/new"])
  Traceback (most recent call last):
    ...
  SystemExit: 2
  """
  with errors.ending():
    config, workdir = parse(sys.argv[1:] if argv is None else argv, stage=stage)
    setup()
    with hosts.together():
      result = train_and_evaluate(config, workdir)
  shown = ", ".join(
    f"{name} {result[name]:.2%}"
    for name in ("top1", "top5")
    if result[name] is not None
  )
  if shown:
    print(f"{stage} ({result['protocol']}): {shown}; see {workdir}")
  else:
    print(f"{stage}: done, nothing was evaluated; see {workdir}")


def setup() -> None:
  """Joins the other hosts, keeps compiled programs, looks at the devices.

  To be called before anything runs on a device.

  >>> setup()
  """
  if cpu_backend.is_expected():
    cpu_backend.set_flags()
    if malloc.keep_freed_memory():
      malloc.fill_holes_after_compiling()
  hosts.initialize()
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = Path.home() / ".cache" / "simclr_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if not os.environ.get(_SHORTEST_CACHED.upper()):
    jax.config.update(_SHORTEST_CACHED, 0.1)  # JAX's 1 s leaves out many
  if hint := hosts.unused_accelerator():
    print(f"warning: {hint}", file=sys.stderr, flush=True)


def parse(argv: list[str], *, stage: str):
  """Returns (config, workdir) for the arguments of a stage's command.

  Raises:
    UserError: an unknown flag, recipe or field, or a value of a wrong type.
    SystemExit: after printing the help that was asked for.

  >>> argv = ["--config=digits", "--workdir=runs/new", "--config.seed=3"]
  >>> config, workdir = parse(argv, stage="pretrain")
  >>> config.seed, workdir
  (3, 'runs/new')
  """
  argv = _joined(argv)
  if {"--help", "-h", "-help"} & set(argv):
    print(_USAGE.format(stage=stage, file=_recipe_files(stage)[0]))
    sys.exit(0)
  values = dict(arg[2:].partition("=")[::2] for arg in argv)
  fields = {k: v for k, v in values.items() if k.startswith("config.")}
  allowed = ("config", "workdir", "help")
  for name in values.keys() - fields.keys() - set(allowed):
    raise UserError(
      f"unknown flag --{name}{config_lib.nearest(name, allowed)} Flags: "
      "--config, --config.FIELD, --workdir."
    )
  for name in ("config", "workdir"):
    if not values.get(name):
      raise UserError(
        f"--{name} is missing; for example: python -m simclr_jax.{stage} "
        f"--config={stage}.py:digits --workdir=runs/{stage}"
      )
  config = load_recipe(values["config"], stage=stage)
  known = config_lib.flat(config)
  for field in fields:
    name = field.removeprefix("config.")
    if name in ("stage", "recipe"):
      raise UserError(
        f"--{field} cannot be given; it is part of --config, such as "
        f"--config={stage}.py:{config.recipe}."
      )
    if name not in known:  # ml_collections would only say it is unknown
      raise UserError(
        f"unknown field --{field}{config_lib.nearest(name, list(known))} "
        f"All of them are in {find_recipe(values['config'], stage=stage)[0]}."
      )
  argv = [stage, *(f"--{name}={value}" for name, value in fields.items())]
  flag_values = flags.FlagValues()
  holder = config_flags.DEFINE_config_dict(
    "config", config, flag_values=flag_values, sys_argv=argv
  )
  try:
    flag_values(argv)
  except (flags.Error, TypeError, ValueError, SyntaxError) as error:
    raise UserError(" ".join(str(error).split())) from None
  return holder.value, values["workdir"]


def _joined(argv: list[str]) -> list[str]:
  """Turns "--flag value" and "-flag" into "--flag=value" and "--flag"."""
  joined = []
  for arg in argv:
    if arg.startswith("-") and not arg[1:2].isdigit():  # -1 is a value
      joined.append("--" + arg.lstrip("-"))
    elif joined and "=" not in joined[-1]:
      joined[-1] += f"={arg}"
    else:
      raise UserError(f'"{arg}" is not a flag; flags begin with --.')
  return joined


def _recipe_files(stage: str) -> list[Path]:
  package = Path(__file__).resolve().parent
  # The wheel has them inside, a checkout beside the package.
  folders = (package / "configs", package.parent / "configs")
  return [d / f"{stage}.py" for d in folders if (d / f"{stage}.py").exists()]


def find_recipe(text: str, *, stage: str) -> tuple[str, str]:
  """Splits --config into the file and the recipe.

  "pretrain.py" and "configs/pretrain.py" are the package's own where no such
  file is there; a name without ".py" is a recipe of the stage's file.

  Raises:
    UserError: there is no such file.

  >>> file, recipe = find_recipe("digits,labels=10", stage="finetune")
  >>> Path(file).name, recipe
  ('finetune.py', 'digits,labels=10')
  """
  file, _, recipe = text.partition(":")
  if not file.endswith(".py"):
    return str(_recipe_files(stage)[0]), text
  path = Path(file).expanduser()
  if path.exists():
    return str(path), recipe
  if str(path.parent) in (".", "configs", "simclr_jax/configs"):
    for own in _recipe_files(path.stem):
      return str(own), recipe
  raise UserError(
    f"--config: there is no file {file}; the package's own are pretrain.py, "
    "finetune.py and distill.py, such as --config="
    f"{stage}.py:digits."
  )


def load_recipe(text: str, *, stage: str) -> ml_collections.ConfigDict:
  """Returns the locked config that --config=`text` means.

  Args:
    text: a file with a recipe, or a recipe's name; see `find_recipe`.
    stage: "pretrain", "finetune" or "distill".

  Raises:
    UserError: no such stage, file or recipe, or a file of another stage.

  >>> load_recipe("digits,labels=10", stage="finetune").label_percent
  10.0
  """
  if stage not in STAGES:
    raise UserError(f'stage is "{stage}"; expected one of {", ".join(STAGES)}.')
  path, recipe = find_recipe(text, stage=stage)
  config = _get_config(path, recipe)
  if config.stage != stage:
    raise UserError(
      f"--config: {path} is for simclr_jax.{config.stage}, this is "
      f"simclr_jax.{stage}."
    )
  return config.lock()


def stage_of(text: str) -> str:
  """The stage that --config=`text` is for; a recipe's name: "pretrain".

  Raises:
    UserError: no such file or recipe.

  >>> stage_of("finetune.py:digits,labels=10")
  'finetune'
  """
  return _get_config(*find_recipe(text, stage="pretrain")).stage


def _get_config(path: str, recipe: str) -> ml_collections.ConfigDict:
  """Runs a file of recipes, which may be the user's own."""
  spec = importlib.util.spec_from_file_location("recipes", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(recipe) if recipe else module.get_config()
    assert config.stage in STAGES, f"config.stage is {config.stage}"
  except UserError:
    raise
  except Exception as error:  # whatever is wrong in it
    lines = traceback.extract_tb(error.__traceback__)
    line = [str(at.lineno) for at in lines if at.filename == str(path)][-1:]
    where = f", line {line[0]}" if line else ""
    text = " ".join(str(error).split())
    raise UserError(
      f"--config: {path}{where}: {type(error).__name__}: {text}"
    ) from None
  return config
