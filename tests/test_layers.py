"""The layers of DESIGN section 2, read from the imports, and quiet imports."""

import ast
import importlib
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import simclr_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "simclr_jax"

# A module imports only from the layers above its own, never from a sibling.
# A package (augment, sources) counts as one module. `config` is for all.
LAYERS = (
  ("errors", {"errors"}),
  ("fields", {"fields"}),
  ("base", {"config"}),
  ("places", {"storage"}),
  ("parts", {"layers", "pooling", "train_state", "weights"}),
  (
    "leaves",
    {
      "augment",
      "checkpoint",
      "cpu_backend",
      "cpu_conv",
      "feature_file",
      "flops",
      "gpu_conv",
      "hosts",
      "logs",
      "losses",
      "malloc",
      "metrics",
      "optimizers",
      "parallel",
      "provenance",
      "resnet",
      "signals",
      "sources",
      "tf_bundle",
      "watchdog",
    },
  ),
  ("of a run", {"diagnostics", "lineage", "overview", "rundir"}),
  (
    "middle",
    {
      "cli",
      "data",
      "loop",
      "memory",
      "models",
      "probes",
      "supcon",
      "tf_names",
      "torchvision_names",
    },
  ),
  ("inference", {"predict", "report"}),
  ("assembly", {"build", "snapshots"}),
  ("trained", {"network"}),
  ("written", {"model_card"}),
  ("stages", {"pretrain", "finetune", "distill"}),
  ("compiled", {"needs"}),
  (
    "tools",
    {
      "convert",
      "datasets",
      "embed",
      "evaluate",
      "export",
      "plan",
      "selftest",
      "sweep",
    },
  ),
  ("list of commands", {"__main__"}),
)
LAYER_OF = {name: i for i, (_, names) in enumerate(LAYERS) for name in names}


def sources_of(folder):
  return sorted(folder.rglob("*.py"))


def unit_of(file):
  """simclr_jax/augment/crop.py -> augment, simclr_jax/data.py -> data."""
  return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(text, *, package="simclr_jax"):
  """All modules that a text imports, those within functions too."""
  found = set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:  # relative: of the package, as there is one level only
        base = f"{package}.{base}".rstrip(".")
      if base == package:
        found |= {f"{base}.{alias.name}" for alias in node.names}
      else:
        found.add(base)
  return found


def own_imports(text):
  """The units of the package that a text imports."""
  return {
    name.split(".")[1]
    for name in imports_of(text)
    if name.startswith("simclr_jax.")
  }


UNITS = sorted({unit_of(file) for file in sources_of(PACKAGE)} - {"__init__"})


def test_imports_of_sees_every_form():
  text = (
    "import simclr_jax.a\nfrom simclr_jax import b, c\n"
    "def f():\n  from simclr_jax.d.e import g\n  from . import h\n"
    "  from .i import j\n"
  )
  assert own_imports(text) == set("abcdhi")


def test_every_module_has_a_layer():
  assert set(UNITS) == set(LAYER_OF), "mend the table of this test"


@pytest.mark.parametrize("unit", UNITS)
def test_imports_come_from_layers_above(unit):
  for file in sources_of(PACKAGE):
    if unit_of(file) != unit:
      continue
    for name in own_imports(file.read_text()) - {unit}:
      assert LAYER_OF[name] < LAYER_OF[unit], f"{file.name} imports {name}"


def test_the_package_itself_imports_nothing_of_its_own():
  text = (PACKAGE / "__init__.py").read_text()
  top = {name.partition(".")[0] for name in imports_of(text)}
  assert top <= sys.stdlib_module_names


def test_recipes_import_no_stage():
  for file in sources_of(ROOT / "configs"):
    text = file.read_text()
    assert own_imports(text) <= {"config"}, file.name
    outside = {name.split(".")[0] for name in imports_of(text)}
    assert outside <= sys.stdlib_module_names | {"ml_collections", "simclr_jax"}


def test_only_parallel_names_pmap():
  for file in sources_of(PACKAGE):
    if file.name != "parallel.py":
      names = re.findall(r"\bjax\.pmap\b|\bshard_map\b", file.read_text())
      assert not names, file.name


def test_third_party_imports_are_declared():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  required = list(project["dependencies"])
  for extra in ("export", "fast", "tensorboard"):  # imported where installed
    required += project["optional-dependencies"][extra]
  declared = {
    re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-")
    for line in required
  }
  provides = importlib.metadata.packages_distributions()
  for file in sources_of(PACKAGE) + sources_of(ROOT / "configs"):
    for name in imports_of(file.read_text()):
      name = name.split(".")[0]
      if name in sys.stdlib_module_names or name == "simclr_jax":
        continue
      dists = {d.lower().replace("_", "-") for d in provides.get(name, [name])}
      assert dists & declared, f"{file.name} imports {name}, of {dists}"


def test_public_names_exist_and_import_lazily():
  assert set(simclr_jax.__all__) <= set(UNITS)
  assert set(simclr_jax.__all__) <= set(dir(simclr_jax))
  for name in simclr_jax.__all__:
    module = getattr(simclr_jax, name)
    assert module is importlib.import_module(f"simclr_jax.{name}")
  assert simclr_jax.parallel.AXIS  # other modules too
  with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
    _ = simclr_jax.pretrian


def run_python(code, *args):
  """A fresh interpreter's last line, read as JSON."""
  done = subprocess.run(
    [sys.executable, "-c", code, *args],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_is_cheap():
  code = (
    "import json, sys; before = set(sys.modules); import simclr_jax\n"
    "print(json.dumps(sorted(set(sys.modules) - before)))"
  )
  new = {name.split(".")[0] for name in run_python(code)}
  assert new - sys.stdlib_module_names == {"simclr_jax"}


def test_importing_modules_has_no_side_effect():
  """No flag, no device, no TensorFlow; one process for all of them."""
  code = """
import importlib, json, sys
import absl.flags, absl.logging, jax, jax._src.xla_bridge as bridge
import ml_collections.config_flags, orbax.checkpoint
before = set(absl.flags.FLAGS)
seen = {}
for name in sys.argv[1:]:
  importlib.import_module("simclr_jax." + name)
  seen[name] = [
    "flag " + flag for flag in sorted(set(absl.flags.FLAGS) - before)
  ] + ["device"] * bridge.backends_are_initialized() + [
    heavy for heavy in ("tensorflow", "matplotlib") if heavy in sys.modules
  ]
print(json.dumps(seen))
"""
  assert run_python(code, *UNITS) == {name: [] for name in UNITS}
