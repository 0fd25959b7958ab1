"""Memory that malloc keeps, and the holes that are filled."""

import json
import os
import statistics
import subprocess
import sys

import jax
import pytest

from simclr_jax import malloc

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


def printed_by(code):
  """What a process prints whose malloc is as it starts."""
  done = subprocess.run(
    [sys.executable, "-c", code],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return done.stdout


HOLES = """
import ctypes, json, re
from simclr_jax import malloc
malloc.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
sizes = [2000 + 16 * (i % 3000) for i in range(9000)]
pieces = [libc.malloc(ctypes.c_size_t(size)) for size in sizes]
for piece in pieces[::2]:
  libc.free(piece)
print(json.dumps([malloc.fill_holes(), malloc.fill_holes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_holes_are_filled():
  first, second = json.loads(printed_by(HOLES))
  assert first >= 4000
  assert second < first / 10


LARGE = """
import ctypes
from simclr_jax import malloc
malloc.keep_freed_memory()
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
  assert int(printed_by(LARGE)) == 0


def test_no_other_malloc_is_touched(monkeypatch):
  class Other:
    """A C library without glibc's functions."""

  monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: Other())
  assert malloc.fill_holes() == 0


def test_only_long_compilations_are_followed_by_it(monkeypatch):
  filled, listeners = [], []
  monkeypatch.setattr(malloc, "fill_holes", lambda: filled.append(1))
  monkeypatch.setattr(
    jax.monitoring,
    "register_event_duration_secs_listener",
    listeners.append,
  )
  fresh = malloc.fill_holes_after_compiling.__wrapped__
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
  monkeypatch.setattr(malloc, "fill_holes", full)
  monkeypatch.setattr(
    jax.monitoring, "register_event_duration_secs_listener", listeners.append
  )
  malloc.fill_holes_after_compiling.__wrapped__()
  listeners[0]("/jax/core/compile/backend_compile_duration", 2.0)


def test_jax_still_tells_of_compiling():
  """By the event that the listener waits for."""
  told = []

  def listen(event, seconds, **_):
    told.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.jit(lambda x: x + len(told))(1.0)
  assert any(event.endswith("/backend_compile_duration") for event in told)
