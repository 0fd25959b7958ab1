"""XLA's flag for CPUs, and memory that malloc keeps; each in a new process."""

import json
import os
import statistics
import subprocess
import sys

import jax
import pytest

from simclr_jax import cpu_backend

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
  "flags, version, want",
  [
    (None, (0, 12, 0), [f"{FLAG}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"]),
    (f"{FLAG}=", (0, 12, 0), [f"{FLAG}="]),  # the user's wins
    ("--xla_a=1", (0, 13, 0), ["--xla_a=1"]),  # would end the process
    (None, (1, 0, 0), None),
  ],
)
def test_the_flag(flags, version, want):
  environ = {} if flags is None else {"XLA_FLAGS": flags}
  cpu_backend.set_flags(environ, version=version)
  got = environ.get("XLA_FLAGS")
  assert (None if got is None else got.split()) == want


def test_an_accelerator_is_left_alone(monkeypatch):
  none = {"JAX_PLATFORMS": ""}
  monkeypatch.setattr(
    cpu_backend.importlib.metadata, "entry_points", lambda group: []
  )
  found = set()
  monkeypatch.setattr(
    cpu_backend.importlib.util, "find_spec", lambda name: name in found
  )
  assert cpu_backend.is_expected(none)
  assert cpu_backend.is_expected({})
  for name in ("libtpu", "jax_plugins"):
    found = {name}
    assert not cpu_backend.is_expected(none)
    assert not cpu_backend.is_expected({"JAX_PLATFORMS": "cuda,cpu"})
    assert cpu_backend.is_expected({"JAX_PLATFORMS": "cpu"})


def test_a_plugin_is_found(monkeypatch):
  """As pip installs jax-cuda13-plugin: an entry point of this group."""
  monkeypatch.setattr(
    cpu_backend.importlib.metadata,
    "entry_points",
    lambda group: {"jax_plugins": ["xla_cuda13"]}[group],
  )
  assert not cpu_backend.is_expected({})


CHILD = """
import json, resource, sys
from simclr_jax import cli
if sys.argv[1] == "setup":
  cli.setup()
import jax, jax.numpy as jnp

@jax.jit
def fn(x):
  return x + 1  # 64 MiB, which XLA allocates

faults = []
x = jnp.ones((2**14, 2**10))
for _ in range(60):  # the first ones fill the heap
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  fn(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_asks_for_no_new_memory():
  faults = {}
  env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  for name in ("setup", "nothing"):
    done = subprocess.run(
      [sys.executable, "-c", CHILD, name],
      env=env,
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    faults[name] = statistics.median(json.loads(done.stdout)[-30:])
  # 64 MiB are 16,384 pages of 4 KiB.
  assert faults["nothing"] > 10_000
  assert faults["setup"] < 1_000


HOLES = """
import ctypes, json, re
from simclr_jax import cpu_backend
cpu_backend.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
sizes = [2000 + 16 * (i % 3000) for i in range(9000)]
pieces = [libc.malloc(ctypes.c_size_t(size)) for size in sizes]
for piece in pieces[::2]:
  libc.free(piece)
print(json.dumps([cpu_backend.fill_holes(), cpu_backend.fill_holes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_holes_are_filled():
  done = subprocess.run(
    [sys.executable, "-c", HOLES],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  first, second = json.loads(done.stdout)
  assert first >= 4000
  assert second < first / 10


LARGE = """
import ctypes
from simclr_jax import cpu_backend
cpu_backend.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.sbrk.restype = ctypes.c_void_p
piece = libc.malloc(ctypes.c_size_t(3 * 2**30))  # not touched
assert piece
end = libc.sbrk(0)
libc.free(piece)
print(end - libc.sbrk(0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_beyond_2_gib_is_kept_too():
  done = subprocess.run(
    [sys.executable, "-c", LARGE],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  assert int(done.stdout) == 0


def test_no_other_malloc_is_touched(monkeypatch):
  class Other:
    """A C library without glibc's functions."""

  monkeypatch.setattr(cpu_backend.ctypes, "CDLL", lambda name: Other())
  assert cpu_backend.fill_holes() == 0


def test_only_long_compilations_are_followed_by_it(monkeypatch):
  filled, listeners = [], []
  monkeypatch.setattr(cpu_backend, "fill_holes", lambda: filled.append(1))
  monkeypatch.setattr(
    jax.monitoring,
    "register_event_duration_secs_listener",
    listeners.append,
  )
  fresh = cpu_backend.fill_holes_after_compiling.__wrapped__
  fresh()
  (listen,) = listeners
  listen("/jax/core/compile/backend_compile_duration", 0.2)
  listen("/jax/core/compile/jaxpr_trace_duration", 20.0)
  assert not filled
  listen("/jax/core/compile/backend_compile_duration", 2.0, fun_name="step")
  assert len(filled) == 1
  for _ in range(50):  # it costs memory each time
    listen("/jax/core/compile/backend_compile_duration", 2.0)
  assert len(filled) == 8


def test_a_run_goes_on_without_it(monkeypatch):
  def full():
    raise OSError("too many open files")

  listeners = []
  monkeypatch.setattr(cpu_backend, "fill_holes", full)
  monkeypatch.setattr(
    jax.monitoring, "register_event_duration_secs_listener", listeners.append
  )
  cpu_backend.fill_holes_after_compiling.__wrapped__()
  listeners[0]("/jax/core/compile/backend_compile_duration", 2.0)


def test_jax_still_tells_of_compiling():
  """By the event that the listener waits for."""
  told = []

  def listen(event, seconds, **_):
    told.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.jit(lambda x: x + len(told))(1.0)
  assert any(event.endswith("/backend_compile_duration") for event in told)
