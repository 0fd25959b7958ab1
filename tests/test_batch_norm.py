"""BatchNorm against Flax's, whose gradient JAX finds: values, moments, all."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import layers

SHAPE = (6, 4, 3, 5)  # of each device


@pytest.fixture(params=["of CPUs", "of GPUs"])
def form(request, monkeypatch):
  """The form of the gradient that a CPU takes, and that of GPUs."""
  if request.param == "of GPUs":
    monkeypatch.setattr(layers, "_on_gpus", lambda fn, default, *a: fn(*a))


def arrays(seed=0, lead=()):
  """(x, shortcut, gradient) of other means and widths in each channel."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(*lead, *SHAPE)) * np.arange(1, 6) + np.arange(-2, 3)
  return x, *rng.normal(size=(2, *lead, *SHAPE))


def variables():
  rng = np.random.default_rng(3)
  scale = rng.normal(size=5)  # negative ones and a zero too
  scale[2] = 0
  return {
    "params": {"scale": scale, "bias": rng.normal(size=5)},
    "batch_stats": {"mean": rng.normal(size=5), "var": rng.uniform(size=5)},
  }


def flax_norm(variables, x, shortcut, relu, **axis):
  """What layers.BatchNorm must give, and its batch_stats."""
  norm = nn.BatchNorm(
    use_running_average=False,
    momentum=0.9,
    epsilon=1e-5,
    param_dtype=jnp.float64,
    force_float32_reductions=False,
    **axis,
  )
  y, updated = norm.apply(variables, x, mutable=["batch_stats"])
  if shortcut is not None:
    y = y + shortcut
  return nn.relu(y) if relu else y, updated


def our_norm(variables, x, shortcut, relu, **options):
  norm = layers.batch_norm(train=True, dtype=x.dtype, **options)()
  return norm.apply(variables, x, shortcut, relu=relu, mutable=["batch_stats"])


def all_of(norm, relu, with_shortcut, params, x, shortcut, gradient):
  """(y, moving averages, gradients of scale and bias, x and the shortcut)."""

  def fn(params, x, shortcut):
    used = shortcut if with_shortcut else None
    return norm(variables() | {"params": params}, x, used, relu)

  y, vjp, updated = jax.vjp(fn, params, x, shortcut, has_aux=True)
  return y, updated, vjp(gradient)


def check(got, want, rtol=1e-9):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-11),
    got,
    want,
  )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_equals_flax(relu, with_shortcut, form, x64):
  args = variables()["params"], *arrays()
  want = all_of(flax_norm, relu, with_shortcut, *args)
  check(all_of(our_norm, relu, with_shortcut, *args), want)
  if relu:
    assert 0.2 < (want[0] == 0).mean() < 0.8


@pytest.mark.parametrize("group_size", [0, 2])
def test_equals_flax_over_devices(group_size, form, x64):
  groups = [[0, 1], [2, 3]] if group_size else None
  axis = {"axis_name": "batch", "axis_index_groups": groups}
  norms = (
    functools.partial(our_norm, axis_name="batch", group_size=group_size),
    functools.partial(flax_norm, **axis),
  )
  params = jax.tree.map(lambda p: np.stack([p] * 4), variables()["params"])
  got, want = (
    jax.pmap(
      functools.partial(all_of, norm, True, True),
      axis_name="batch",
      devices=jax.devices()[:4],
    )(params, *arrays(lead=(4,)))
    for norm in norms
  )
  y, updated, grads = want
  # Flax leaves each group its own: a checkpoint would keep one of them.
  updated = jax.tree.map(lambda v: 0 * v + v.mean(0), updated)
  check(got, (y, updated, grads))


def test_the_gradient_is_that_of_the_global_batch(form, x64):
  """Four devices' rows as one batch of one device."""
  x, shortcut, gradient = arrays(lead=(4,))
  params = variables()["params"]
  norm = functools.partial(our_norm, axis_name="batch")
  got = jax.pmap(
    functools.partial(all_of, norm, True, True, params),
    axis_name="batch",
    devices=jax.devices()[:4],
  )(x, shortcut, gradient)
  rows = [a.reshape(-1, *SHAPE[1:]) for a in (x, shortcut, gradient)]
  y, updated, (d_params, *d_rows) = all_of(our_norm, True, True, params, *rows)
  check(got[0].reshape(y.shape), y)
  check(jax.tree.map(lambda v: v[3], got[1]), updated)
  check(jax.tree.map(lambda d: d.sum(0), got[2][0]), d_params)
  for ours, one in zip(got[2][1:], d_rows, strict=True):
    check(ours.reshape(one.shape), one)


def test_without_bias(form, x64):
  x, _, gradient = arrays()

  def fn(scale, x):
    norm = layers.batch_norm(train=True, dtype=x.dtype)(use_bias=False)
    stats = variables()["batch_stats"]
    given = {"params": {"scale": scale}, "batch_stats": stats}
    return norm.apply(given, x, mutable=["batch_stats"])[0]

  scale = variables()["params"]["scale"]
  got = jax.vjp(fn, scale, x)[1](gradient)
  params = {"scale": scale, "bias": np.zeros(5)}
  want = all_of(flax_norm, False, False, params, *arrays())[2]
  check(got, (want[0]["scale"], want[1]))


def test_bfloat16_keeps_wide_moments(form):
  x, shortcut, gradient = (jnp.asarray(a, jnp.bfloat16) for a in arrays())
  params = jax.tree.map(np.float32, variables())
  y, vjp, updated = jax.vjp(
    lambda params, x, shortcut: our_norm(params, x, shortcut, True),
    params,
    x,
    shortcut,
    has_aux=True,
  )
  grads = vjp(gradient)
  assert y.dtype == grads[1].dtype == grads[2].dtype == jnp.bfloat16
  wide = [np.asarray(a, np.float32) for a in (x, shortcut, gradient)]
  moments = updated["batch_stats"]
  mean = 0.9 * params["batch_stats"]["mean"] + 0.1 * wide[0].mean((0, 1, 2))
  np.testing.assert_allclose(moments["mean"], mean, rtol=1e-5, atol=1e-6)
  want = jax.vjp(
    lambda params, x, s: our_norm(params, x, s, True)[0], params, *wide[:2]
  )[1](wide[2])
  for got, exact in zip(
    jax.tree.leaves(grads), jax.tree.leaves(want), strict=True
  ):
    got, exact = np.asarray(got, np.float32), np.asarray(exact)
    # A value of y near 0 may be cut in one and not in the other.
    assert np.abs(got - exact).mean() < 0.02 * np.abs(exact).mean() + 1e-6


def test_one_value_far_from_0_has_no_variance():
  """In float32 the difference of two large squares may be below 0."""
  x = np.broadcast_to(np.linspace(90, 1000, 50, dtype=np.float32), (6, 4, 50))
  norm = layers.batch_norm(train=True, dtype=x.dtype)()
  state = {"mean": np.zeros(50, np.float32), "var": np.zeros(50, np.float32)}
  ones = {"scale": np.ones(50, np.float32), "bias": np.zeros(50, np.float32)}
  y, updated = norm.apply(
    {"params": ones, "batch_stats": state}, x, mutable=["batch_stats"]
  )
  assert np.isfinite(y).all()
  assert updated["batch_stats"]["var"].min() == 0


def test_not_a_number_is_passed_on(form):
  x = arrays()[0].astype(np.float32)
  x[0, 0, 0, 1] = np.nan
  y, _ = our_norm(jax.tree.map(np.float32, variables()), x, None, True)
  assert np.isnan(y[..., 1]).all() and np.isfinite(y[..., 0]).all()


@pytest.mark.parametrize("platform, apart", [("cpu", False), ("cuda", True)])
def test_each_platform_gets_its_gradient(platform, apart):
  def gradient(params, x):
    return jax.grad(lambda x: our_norm(params, x, None, True)[0].sum())(x)

  x = arrays()[0].astype(np.float32)
  lowered = jax.jit(gradient).trace(variables(), x)
  text = lowered.lower(lowering_platforms=(platform,)).as_text()
  assert ("optimization_barrier" in text) == apart
