"""gpu_conv against jax.lax, on a CPU: the same sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import gpu_conv, models

NHWC = ("NHWC", "HWIO", "NHWC")

# (h, w), c, kernel, padding
FOLDED = {
  "stem": ((16, 16), 3, (7, 7), ((3, 3), (3, 3))),
  "gray": ((10, 12), 1, (7, 7), ((3, 3), (3, 3))),
  "four": ((8, 8), 4, (5, 5), ((2, 2), (2, 2))),
  "odd": ((9, 13), 3, (7, 5), ((3, 2), (1, 2))),
  "even": ((9, 8), 2, (4, 6), ((1, 2), (0, 3))),
  "bare": ((11, 7), 3, (7, 7), ((0, 0), (0, 0))),
}
# c, kernel, strides, padding
PASSED = {
  "3x3": (3, (3, 3), (2, 2), ((1, 1), (1, 1))),
  "stride 1": (3, (7, 7), (1, 1), ((3, 3), (3, 3))),
  "channels": (5, (7, 7), (2, 2), ((3, 3), (3, 3))),
  "same": (3, (7, 7), (2, 2), "SAME"),
}


def operands(size, c, kernel, dtype):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(2, *size, c)), rng.normal(size=(*kernel, c, 5))
  return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def of(conv, x, w, strides, padding, **options):
  return conv(x, w, strides, padding, dimension_numbers=NHWC, **options)


def convolutions(x, w, strides, padding, **options):
  """Shapes of the kernels that are traced."""
  traced = jax.make_jaxpr(
    lambda x, w: of(
      gpu_conv.conv_general_dilated, x, w, strides, padding, **options
    )
  )(x, w)
  return [
    e.invars[1].aval.shape
    for e in traced.eqns
    if e.primitive.name == "conv_general_dilated"
  ]


@pytest.mark.parametrize("name", FOLDED)
def test_equals_lax(name, x64):
  size, c, kernel, padding = FOLDED[name]
  x, w = operands(size, c, kernel, jnp.float64)
  results = []
  for conv in (gpu_conv.conv_general_dilated, jax.lax.conv_general_dilated):
    y, vjp = jax.vjp(
      lambda x, w, conv=conv: of(conv, x, w, (2, 2), padding), x, w
    )
    results.append((y, *vjp(jnp.cos(jnp.arange(y.size)).reshape(y.shape))))
  for got, want in zip(*results, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-11)
  halves = tuple(-(-k // 2) for k in kernel)
  assert convolutions(x, w, (2, 2), padding) == [(*halves, 16, 5)]


@pytest.mark.parametrize("name", PASSED)
def test_passes_others_through(name):
  c, kernel, strides, padding = PASSED[name]
  x, w = operands((16, 16), c, kernel, jnp.float32)
  assert convolutions(x, w, strides, padding) == [w.shape]
  got, want = (
    of(conv, x, w, strides, padding)
    for conv in (gpu_conv.conv_general_dilated, jax.lax.conv_general_dilated)
  )
  np.testing.assert_array_equal(got, want)


def test_passes_dilated_kernels_through():
  x, w = operands((16, 16), 3, (4, 4), jnp.float32)
  options = {"rhs_dilation": (2, 2)}
  assert convolutions(x, w, (2, 2), ((3, 3), (3, 3)), **options) == [w.shape]


@pytest.mark.parametrize(
  "conv, backend, folded",
  [
    ("auto", "gpu", True),
    ("auto", "tpu", False),
    ("gpu", "cpu", True),
    ("xla", "gpu", False),
  ],
)
def test_which_devices_get_it(conv, backend, folded, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  model = models.make_model(depth=18, width=0.125, stem="imagenet", conv=conv)
  fn = model.encoder.conv_general_dilated
  assert (fn is gpu_conv.conv_general_dilated) == folded
  assert folded or fn is jax.lax.conv_general_dilated
