"""Fixtures shared by all tests; the environment is set before JAX starts."""

import gc
import os
import pathlib
import tempfile

_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
  _flags += " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = _flags.strip()
os.environ["JAX_PLATFORMS"] = "cpu"
_cache = pathlib.Path(tempfile.gettempdir()) / f"simclr_jax_xla_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import pytest  # noqa: E402

from simclr_jax import cpu_backend  # noqa: E402

cpu_backend.set_flags()

ROOT = pathlib.Path(__file__).resolve().parents[1]


def mappings():
  """(memory mappings of this process, how many Linux allows it) or (0, 1)."""
  try:
    limit = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n"), limit
  except OSError:  # not Linux
    return 0, 1


@pytest.fixture(scope="module", autouse=True)
def _room_for_compiled_functions():
  """XLA maps every function that it compiles for the CPU several times, and
  aborts the process where Linux allows no more: all tests together get there.
  """
  yield
  used, limit = mappings()
  if used > limit / 2:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def golden():
  """A small file of reference numbers that is kept with the tests."""

  def path(name):
    file = ROOT / "tests" / "golden" / name
    assert file.exists(), f"{file} belongs to the tests"
    return file

  return path


@pytest.fixture(scope="session")
def shared():
  """The folder with big reference data, which users do not have."""
  path = pathlib.Path(os.environ.get("SIMCLR_SHARED", ROOT.parent / "shared"))
  if not path.is_dir():
    pytest.skip(f"no reference data at {path} (set SIMCLR_SHARED)")
  return path


@pytest.fixture
def x64():
  """float64 inside one test."""
  with jax.enable_x64(True):
    yield
