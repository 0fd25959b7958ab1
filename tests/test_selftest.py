"""The self-test passes here, and fails for each fault that it is there for."""

import functools

import jax
import jax.numpy as jnp
import pytest

from simclr_jax import augment, data, layers, losses, parallel, selftest


def test_all_checks_pass(capsys):
  assert selftest.main() == 0
  out = capsys.readouterr().out
  assert out.count("  ok") == len(selftest.CHECKS) == 6
  assert "8 x cpu of 1 process(es)" in out


def without_axis(function):
  def wrapped(*args, axis_name, **options):
    return function(*args, **options)

  return wrapped


def two_batches_late(function):
  def wrapped(*args, start_step, num_steps, **options):
    return function(
      *args, start_step=start_step + 2, num_steps=num_steps + 2, **options
    )

  return wrapped


def by_place(key, images, *, index=None, size):
  return REAL_VIEWS(key, images, size=size)


def on_each_device(num):
  return jnp.arange(num)


def summed(x, axis):
  return jax.tree.map(lambda leaf: jax.lax.psum(leaf, axis), x)


REAL_VIEWS = augment.two_views


@pytest.mark.parametrize(
  "check, module, name, mistake",
  [
    ("gathering order", parallel, "global_index", on_each_device),
    ("mean over devices", jax.lax, "pmean", summed),
    ("NT-Xent, gradient", losses, "nt_xent", without_axis(losses.nt_xent)),
    ("NT-Xent, gradient", jax.lax, "pmean", summed),
    (
      "BatchNorm moments",
      layers,
      "batch_norm",
      without_axis(layers.batch_norm),
    ),
    (
      "data slices",
      data,
      "train_batches",
      two_batches_late(data.train_batches),
    ),
    (
      "data slices",
      data,
      "eval_batches",
      functools.partial(data.train_batches, seed=0, start_step=0, num_steps=3),
    ),
    ("views of images", augment, "two_views", by_place),
  ],
)
def test_each_fault_is_seen(monkeypatch, capsys, check, module, name, mistake):
  monkeypatch.setattr(module, name, mistake)
  monkeypatch.setattr(selftest, "CHECKS", {check: selftest.CHECKS[check]})
  assert selftest.main() == 1
  assert f"{check:20}" in capsys.readouterr().out
