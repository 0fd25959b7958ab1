"""XLA's flag for CPUs, and when a CPU is expected."""

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
