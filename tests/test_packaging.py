"""pyproject.toml, constraints.txt, and the wheel installed alone."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import simclr_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def pyproject():
  return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins():
  """Python -> {package: its version in constraints.txt}."""
  found = {python: {} for python in PYTHONS}
  for line in (ROOT / "constraints.txt").read_text().splitlines():
    if not line or line.startswith("#"):
      continue
    pin = Requirement(line)
    (specifier,) = pin.specifier
    assert specifier.operator == "==", line
    for python in PYTHONS:
      if not pin.marker or pin.marker.evaluate({"python_version": python}):
        name = canonicalize_name(pin.name)
        assert name not in found[python], f"{line}: twice for {python}"
        found[python][name] = specifier.version
  return found


def requirements(project, *extras):
  lines = list(project["dependencies"])
  for extra in extras:
    lines += project["optional-dependencies"][extra]
  return [
    r
    for r in map(Requirement, lines)
    if canonicalize_name(r.name) != "simclr-jax"
  ]


def test_every_requirement_is_a_range_and_pinned_within_it(pyproject, pins):
  extras = ("export", "fast", "tensorboard", "test")
  for requirement in requirements(pyproject["project"], *extras):
    assert ">=" in str(requirement.specifier), requirement
    for python in PYTHONS:
      version = pins[python].get(canonicalize_name(requirement.name))
      assert version, f"constraints.txt lacks {requirement.name} for {python}"
      assert requirement.specifier.contains(version), (requirement, python)


def test_python_311_keeps_the_last_jax_that_supports_it(pins):
  assert pins["3.11"]["jax"] == pins["3.11"]["jaxlib"] == "0.10.2"
  for python in ("3.12", "3.13"):
    assert pins[python]["jax"] == pins[python]["jaxlib"]
    assert Version(pins[python]["jax"]) >= Version("0.11")


def test_every_package_is_listed(pyproject):
  """The list is explicit for the sake of configs/; nothing may fall out."""
  folders = {
    ".".join(file.parent.relative_to(ROOT).parts)
    for file in (ROOT / "simclr_jax").rglob("*.py")
  }
  listed = set(pyproject["tool"]["setuptools"]["packages"])
  assert listed == folders | {"simclr_jax.configs"}


@pytest.mark.slow
def test_the_wheel_alone_pretrains_from_any_folder(tmp_path):
  """Built and installed with nothing of the checkout in reach.

  Its requirements come from the environment of the tests, so that no network
  is needed; the package itself can only come from the wheel.
  """
  checkout = tmp_path / "checkout"
  checkout.mkdir()  # a copy, as a build leaves files in it
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, checkout)
  for name in ("simclr_jax", "configs"):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
  pip = [sys.executable, "-m", "pip"]
  flags = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
  run([*pip, "wheel", *flags, "--wheel-dir", tmp_path, checkout])
  (wheel,) = tmp_path.glob("simclr_jax-*.whl")
  assert simclr_jax.__version__ in wheel.name
  with zipfile.ZipFile(wheel) as file:
    names = set(file.namelist())
  for stage in ("pretrain", "finetune", "distill"):
    assert f"simclr_jax/configs/{stage}.py" in names
  top = {name.split("/")[0] for name in names}
  assert top == {"simclr_jax", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
  shutil.rmtree(checkout)

  builder = venv.EnvBuilder(with_pip=False)
  builder.create(tmp_path / "env")
  python = tmp_path / "env" / "bin" / "python"
  run([*pip, "--python", python, "install", *flags[:2], "--quiet", wheel])
  (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
  # Last on the path; an editable install's hooks are not read from there.
  others = [p for p in sys.path if p.endswith("site-packages")]
  (packages / "others.pth").write_text("\n".join(others))

  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  where = "import simclr_jax; print(simclr_jax.__file__)"
  assert run([python, "-c", where], cwd=elsewhere).startswith(str(packages))
  recipe = "--config=pretrain.py:digits"
  fields = [
    "--config.num_steps=2",
    "--config.batch_size=16",
    "--config.model.width=0.125",
    "--config.data.eval_split=",  # a compilation less
  ]
  command = [python, "-m", "simclr_jax.pretrain", recipe, "--workdir=run"]
  run([*command, *fields], cwd=elsewhere)
  result = json.loads((elsewhere / "run" / "result.json").read_text())
  assert result["num_steps"] == 2


def run(command, *, cwd=None):
  """Runs a program without the environment that tests and shells set."""
  kept = ("PATH", "HOME", "TMPDIR", "JAX_COMPILATION_CACHE_DIR")
  env = {name: os.environ[name] for name in kept if name in os.environ}
  done = subprocess.run(
    [str(part) for part in command],
    cwd=cwd,
    env=env | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout
