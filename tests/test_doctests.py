"""Every public function has an example, and every example runs.

The examples may use np, jnp and jax, and find two runs with random weights in
the current folder: runs/pretrained, and runs/finetuned of the digits.
"""

import contextlib
import doctest
import importlib
import inspect
import io
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_run import make_run

import simclr_jax
from simclr_jax import cli, config

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
MODULES = sorted(
  info.name
  for info in pkgutil.walk_packages(simclr_jax.__path__, "simclr_jax.")
  if not info.name.endswith("__main__") and ".configs" not in info.name
)
# Each of their examples compiles a training step.
SLOW = ("distill", "finetune", "needs", "plan", "pretrain")
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public(module):
  """name -> function or class that a module offers as its own."""
  names = getattr(module, "__all__", None) or [
    name for name in vars(module) if not name.startswith("_")
  ]
  things = {name: getattr(module, name) for name in names}
  return {
    name: thing
    for name, thing in things.items()
    if callable(thing)
    and getattr(thing, "__module__", "").startswith(module.__name__)
    and name != "main"  # the command; the top of its file describes it
  }


def without_example(module):
  """The public functions of a module that show no example."""
  return [
    name
    for name, thing in public(module).items()
    if not inspect.isclass(thing) and ">>> " not in (thing.__doc__ or "")
  ]


@pytest.mark.parametrize("name", simclr_jax.__all__)
def test_every_public_function_has_an_example(name):
  module = importlib.import_module(f"simclr_jax.{name}")
  assert module.__doc__
  assert all(inspect.getdoc(thing) for thing in public(module).values())
  assert without_example(module) == []


def test_a_function_without_an_example_is_noticed(monkeypatch):
  from simclr_jax import data, metrics

  assert {"Dataset", "load", "train_batches"} <= set(public(data))
  assert "nearest" not in public(metrics)  # of another module
  monkeypatch.setattr(metrics.alignment, "__doc__", "Says nothing.")
  assert without_example(metrics) == ["alignment"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with runs/pretrained and runs/finetuned, which came from it."""
  folder = tmp_path_factory.mktemp("doctests")
  names = [str(digit) for digit in range(10)]
  for run, options in {
    "pretrained": {"stage": "pretrain"},
    "finetuned": {
      "num_classes": 10,
      "names": names,
      "pretrained": "runs/pretrained",
    },
  }.items():
    workdir = folder / "runs" / run
    settings, _ = make_run(workdir, channels=1, **options)
    (workdir / "config.json").write_text(config.to_json(settings))
  return folder


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      name,
      marks=[pytest.mark.slow] if name.split(".")[1] in SLOW else [],
    )
    for name in MODULES
  ],
)
def test_examples(name, folder, monkeypatch):
  monkeypatch.chdir(folder)
  module = importlib.import_module(name)
  names = {"jax": jax, "jnp": jnp, "np": np} | vars(module)
  runner = doctest.DocTestRunner(optionflags=OPTIONS)
  text = io.StringIO()
  with jax_config_restored():
    for test in doctest.DocTestFinder().find(module, globs=names):
      runner.run(test, out=text.write)
  assert runner.failures == 0, text.getvalue()


@contextlib.contextmanager
def jax_config_restored():
  """What an example sets of JAX (cli.setup) is for the example alone."""
  cache = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update("jax_compilation_cache_dir", cache)


def test_the_table_of_flags_names_fields_that_exist():
  fields = set()
  for stage in ("pretrain", "finetune", "distill"):
    fields |= set(config.flat(cli.load_recipe("digits", stage=stage)))
  named = re.findall(r"`config\.([\w.]+)`", (DOCS / "flags.md").read_text())
  assert len(named) > 30
  assert set(named) <= fields
