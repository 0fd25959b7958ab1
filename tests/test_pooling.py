"""Pooling against Flax's: values, and where the gradient goes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import pooling

PADDINGS = (((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (1, 0)))


def both(x, padding):
  """[(value, gradient)] of ours and Flax's."""
  results = []
  for pool in (
    pooling.max_pool,
    lambda x, padding: nn.max_pool(x, (3, 3), (2, 2), padding),
  ):
    y, vjp = jax.vjp(lambda x, pool=pool: pool(x, padding), x)
    gradient = np.random.default_rng(1).normal(size=y.shape)
    results.append((y, vjp(jnp.asarray(gradient, x.dtype))[0]))
  return results


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (12, 5), (3, 4)])
def test_equals_flax(size, padding, x64):
  """Of whole numbers, so that many pixels are equal."""
  x = np.random.default_rng(0).integers(0, 4, (2, *size, 3))
  (got, d_got), (want, d_want) = both(jnp.asarray(x, jnp.float64), padding)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_allclose(d_got, d_want, rtol=1e-12, atol=1e-12)
  assert (d_want == 0).any() and (d_want != 0).any()


def test_the_first_of_equal_pixels_gets_it():
  y, vjp = jax.vjp(
    lambda x: pooling.max_pool(x, ((0, 0), (0, 0))), jnp.ones((1, 5, 5, 1))
  )
  (gradient,) = vjp(jnp.asarray([[1.0, 2], [3, 4]]).reshape(y.shape))
  want = np.zeros((5, 5))
  want[::2, ::2][:2, :2] = [[1, 2], [3, 4]]
  np.testing.assert_array_equal(gradient[0, :, :, 0], want)


def test_bfloat16_is_added_up_wide():
  """1 + 2^-8 + 2^-8 is 1 in bfloat16, added one by one."""
  x = jnp.zeros((1, 5, 5, 1), jnp.bfloat16).at[0, 2, 2, 0].set(1)
  _, vjp = jax.vjp(lambda x: pooling.max_pool(x, ((0, 0), (0, 0))), x)
  given = jnp.asarray([0, 2**-8, 2**-8, 1], jnp.bfloat16)
  (gradient,) = vjp(given.reshape(1, 2, 2, 1))
  assert gradient.dtype == jnp.bfloat16
  assert gradient[0, 2, 2, 0] == 1 + 2**-7


def test_not_a_number_is_passed_on():
  x = jnp.zeros((1, 8, 8, 1)).at[0, 3, 3, 0].set(jnp.nan)
  y = pooling.max_pool(x, ((1, 1), (1, 1)))[0, :, :, 0]
  assert np.isnan(y[1:3, 1:3]).sum() == np.isnan(y).sum() == 4


@pytest.mark.parametrize(
  "platform, scatters", [("cuda", False), ("cpu", False), ("tpu", True)]
)
def test_only_tpus_scatter(platform, scatters):
  """Atomic additions come in any order: runs would not repeat on a GPU."""
  x = jnp.zeros((1, 8, 8, 1))
  gradient = jax.grad(lambda x: pooling.max_pool(x, ((1, 1), (1, 1))).sum())
  lowered = jax.jit(gradient).trace(x).lower(lowering_platforms=(platform,))
  assert ("select_and_scatter" in lowered.as_text()) == scatters


def test_tpus_get_the_same(monkeypatch, x64):
  """The form that they take, on a CPU."""
  x = jnp.asarray(np.random.default_rng(0).integers(0, 4, (2, 9, 8, 3)), float)
  want = both(x, PADDINGS[0])[1]

  def of_tpus(*args, tpu, default):
    return tpu(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", of_tpus)
  for got, exact in zip(both(x, PADDINGS[0])[0], want, strict=True):
    np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 6), (8, 5)])
def test_mean_pool_equals_flax(size, stride, x64):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)))

  def by_flax(x):
    padding = ((0, 1), (0, 1))
    return nn.avg_pool(
      x, (2, 2), (stride, stride), padding, count_include_pad=stride == 2
    )

  (got, got_vjp), (want, want_vjp) = (
    jax.vjp(pool, x)
    for pool in (lambda x: pooling.mean_pool(x, stride), by_flax)
  )
  np.testing.assert_allclose(got, want, rtol=1e-12)
  gradient = jnp.asarray(np.random.default_rng(1).normal(size=want.shape))
  (got,), (want,) = got_vjp(gradient), want_vjp(gradient)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_map_of_one_pixel_is_read_once():
  """XLA's window reads it four times on CPUs, where there are many."""
  x = np.random.default_rng(0).normal(size=(64, 1, 1, 128)).astype(np.float32)
  pooled = jax.jit(lambda x: pooling.mean_pool(x, 2))(x)
  np.testing.assert_allclose(pooled, x / 4, rtol=1e-6)
