"""cpu_conv against jax.lax: the value and both gradients of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import cpu_conv

NHWC = ("NHWC", "HWIO", "NHWC")

# n, (h, w), c, o, (kh, kw), strides, padding
CASES = {
  "1x1": (3, (6, 6), 5, 4, (1, 1), (1, 1), "SAME"),
  "1x1 strided": (3, (7, 6), 5, 4, (1, 1), (2, 2), "VALID"),
  "1x1 padded": (3, (4, 4), 5, 4, (1, 1), (1, 1), [(1, 0), (0, 2)]),
  "narrow": (2, (8, 8), 6, 4, (3, 3), (1, 1), "SAME"),
  "one channel": (2, (8, 8), 1, 4, (3, 3), (1, 1), [(1, 1), (1, 1)]),
  "wide": (2, (8, 8), 12, 13, (3, 3), (1, 1), "SAME"),
  "odd": (2, (7, 5), 6, 5, (3, 3), (1, 1), "SAME"),
  "cropped": (2, (9, 8), 6, 5, (3, 3), (1, 1), [(-1, 2), (0, -2)]),
  "strided": (2, (8, 8), 4, 6, (3, 3), (2, 2), [(1, 1), (1, 1)]),
  "strided same": (2, (8, 8), 4, 6, (3, 3), (2, 2), "SAME"),
  "strided odd": (2, (9, 7), 4, 6, (3, 3), (2, 2), [(0, 1), (2, 0)]),
  "uneven": (2, (9, 10), 4, 6, (3, 2), (1, 3), [(2, 1), (0, 1)]),
  "7x7": (2, (12, 11), 3, 4, (7, 7), (2, 2), [(3, 3), (3, 3)]),
  "5x5": (2, (8, 8), 6, 4, (5, 5), (1, 1), "SAME"),
  "2x2 map": (8, (2, 2), 5, 4, (3, 3), (1, 1), "SAME"),
  "3x2 map strided": (8, (3, 2), 5, 4, (3, 3), (2, 2), [(1, 1), (0, 2)]),
  "5x4 map strided": (8, (5, 4), 5, 4, (3, 3), (2, 2), [(0, 1), (2, 0)]),
  "1x1 map": (8, (1, 1), 5, 4, (3, 3), (1, 1), [(1, 1), (1, 1)]),
  "2x2 map, small batch": (1, (2, 2), 5, 40, (3, 3), (1, 1), "SAME"),
}


def both(case, dtype):
  """(value, dx, dw) of lax and of cpu_conv, on asymmetric data."""
  n, size, c, o, kernel, strides, padding = case
  random = np.random.default_rng(0)
  x = jnp.asarray(random.standard_normal((n, *size, c)), dtype)
  w = jnp.asarray(random.standard_normal((*kernel, c, o)), dtype)
  results = []
  for conv in (jax.lax.conv_general_dilated, cpu_conv.conv_general_dilated):

    def fn(x, w, conv=conv):
      return conv(x, w, strides, padding, dimension_numbers=NHWC)

    @jax.jit
    def all_three(x, w, dy, fn=fn):
      y, vjp = jax.vjp(fn, x, w)
      return y, *vjp(dy)

    shape = jax.eval_shape(fn, x, w).shape
    dy = np.random.default_rng(1).standard_normal(shape)
    results.append(all_three(x, w, jnp.asarray(dy, dtype)))
  return results


def check(case, dtype, tolerance):
  for want, got in zip(*both(case, dtype), strict=True):
    assert got.shape == want.shape
    assert got.dtype == want.dtype == dtype
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_equals_lax(name, x64):
  check(CASES[name], jnp.float64, 1e-12)


@pytest.mark.parametrize("name", ["wide", "strided", "2x2 map", "7x7"])
def test_equals_lax_in_float32(name):
  check(CASES[name], jnp.float32, 1e-5)


@pytest.mark.parametrize(
  "case",
  [
    {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    {"feature_group_count": 2, "shape": (3, 3, 2, 4)},
    {"rhs_dilation": (2, 2)},
    {"lhs_dilation": (1, 2)},
    {"precision": "highest"},
    {"preferred_element_type": jnp.float32},
    {"dtype": jnp.bfloat16},
  ],
  ids=lambda case: next(iter(case)),
)
def test_passes_the_rest_on_to_lax(case, monkeypatch):
  case = {"dimension_numbers": NHWC} | case
  shape = case.pop("shape", (3, 3, 4, 4))
  dtype = case.pop("dtype", jnp.float32)
  x = jnp.arange(64.0).reshape(4, 2, 2, 4).astype(dtype)
  w = jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)
  if case["dimension_numbers"] != NHWC:
    x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
  pads = [(2, 2), (1, 2)]
  want = jax.lax.conv_general_dilated(x, w, (1, 1), pads, **case)

  def refuse(*_):
    raise AssertionError("not a case of its own")

  monkeypatch.setattr(cpu_conv, "_as_one_matrix", refuse)
  monkeypatch.setattr(cpu_conv, "_conv", refuse)
  got = cpu_conv.conv_general_dilated(x, w, (1, 1), pads, **case)
  assert got.dtype == want.dtype
  np.testing.assert_array_equal(got, want)


def test_what_is_transposed_is_in_memory():
  """XLA otherwise computes the cosine and the tanh while it transposes."""

  def loss(w, x):
    y = cpu_conv.conv_general_dilated(
      jnp.tanh(x), w, (1, 1), "SAME", dimension_numbers=NHWC
    )
    return jnp.sin(y).sum()

  x, w = jnp.ones((8, 8, 8, 4)), jnp.ones((3, 3, 4, 5))
  text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
  computations = text.split("\n}\n")
  for computing in (" tanh(", " cosine("):
    (found,) = (c for c in computations if computing in c)
    assert " copy(" not in found
    assert " transpose(" not in found


def test_under_pmap_and_flax():
  import flax.linen as nn

  x = jax.random.normal(jax.random.key(0), (2, 8, 2, 2, 8))
  make = lambda conv: nn.Conv(  # noqa: E731
    6, (3, 3), strides=2, use_bias=False, conv_general_dilated=conv
  )
  own, lax = make(cpu_conv.conv_general_dilated), make(None)
  variables = lax.init(jax.random.key(1), x[0])

  def gradient(module):
    def loss(variables, x):
      return (module.apply(variables, x) ** 3).mean()

    def step(variables, x):
      return jax.lax.pmean(jax.grad(loss)(variables, x), "devices")

    mapped = jax.pmap(step, axis_name="devices", in_axes=(None, 0))
    return mapped(variables, x)["params"]["kernel"][0]

  want = gradient(lax)
  scale = np.abs(want).max()
  np.testing.assert_allclose(gradient(own), want, rtol=0, atol=1e-5 * scale)


def test_refuses_what_lax_refuses():
  x, w = jnp.ones((2, 4, 4, 4)), jnp.ones((3, 3, 4, 4))
  with pytest.raises(ValueError, match="feature_group_count"):
    cpu_conv.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2
    )
