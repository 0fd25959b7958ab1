"""A 2-D convolution for XLA's CPU backend, with gradients of its own.

XLA is slow at maps no larger than the kernel, at 1x1 kernels and at input
gradients with strides on small maps; these are matrix products here. XLA's
filter gradient is slow when it has to transpose an operand that it is still
computing; here the operand is computed first (`benchmarks/cpu_conv.py`).
Accelerators never see this file. The choice depends on static shapes only.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def conv_general_dilated(
  lhs,
  rhs,
  window_strides,
  padding,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count=1,
  precision=None,
  **kwargs,
):
  """`jax.lax.conv_general_dilated`, faster on CPUs; for `nn.Conv`'s attribute.

  Covers NHWC images [n, h, w, c] with HWIO kernels [kh, kw, c, o] in float32 or
  float64, one group, no dilation, any strides and padding; all else is passed
  on to lax. Kernels larger than 1x1 have reverse-mode gradients only.

  >>> x, w = jnp.ones((2, 2, 2, 3)), jnp.ones((3, 3, 3, 4))
  >>> numbers = ("NHWC", "HWIO", "NHWC")
  >>> y = conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
  >>> y.shape
  (2, 2, 2, 4)
  """

  def fallback():
    return lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      dimension_numbers=dimension_numbers,
      feature_group_count=feature_group_count,
      precision=precision,
      **kwargs,
    )

  if lhs.ndim != 4 or lhs.dtype != rhs.dtype:
    return fallback()
  numbers = [
    lax.conv_dimension_numbers(lhs.shape, rhs.shape, d)
    for d in (dimension_numbers, ("NHWC", "HWIO", "NHWC"))
  ]
  dilations = (*(lhs_dilation or (1,)), *(rhs_dilation or (1,)))
  if (
    numbers[0] != numbers[1]
    or lhs.dtype not in (jnp.float32, jnp.float64)
    or lhs.shape[3] != rhs.shape[2]
    or feature_group_count != 1
    or any(d != 1 for d in dilations)
    or precision is not None
    or any(v is not None and v != 1 for v in kwargs.values())
  ):
    return fallback()
  strides, kernel, size = tuple(window_strides), rhs.shape[:2], lhs.shape[1:3]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(size, kernel, strides, padding)
  pads = tuple((int(low), int(high)) for low, high in padding)
  out = tuple(
    (n + sum(p) - k) // s + 1
    for n, k, s, p in zip(size, kernel, strides, pads, strict=True)
  )
  if min(*lhs.shape, *rhs.shape, *out) < 1:
    return fallback()
  if kernel == (1, 1) and pads == ((0, 0), (0, 0)):
    # Two-axis operands: for more axes XLA transposes images in the gradient.
    pixels = lhs[:, :: strides[0], :: strides[1]].reshape(-1, rhs.shape[2])
    return (pixels @ rhs[0, 0]).reshape(len(lhs), *out, -1)
  area = size[0] * size[1]
  taps = kernel[0] * kernel[1]
  # On a map no larger than the kernel most taps fall on padding; a full matrix
  # from pixels to pixels skips them, where it is smaller than the patches.
  if area <= taps and area * rhs.shape[3] <= taps * lhs.shape[0]:
    return _as_one_matrix(lhs, rhs, strides, pads, out)
  return _conv(lhs, rhs, strides, pads)


def _as_one_matrix(x, w, strides, pads, out):
  """All pixels times all pixels."""
  size, kernel = x.shape[1:3], w.shape[:2]
  hits = []  # per side, [pixel, output, tap] -> 1 where the tap joins the two
  for n, o, k, s, p in zip(size, out, kernel, strides, pads, strict=True):
    tap = np.arange(n)[:, None] + p[0] - s * np.arange(o)
    hits.append((tap[..., None] == np.arange(k)).astype(x.dtype))
  matrix = jnp.einsum("hpa,wqb,abco->hwcpqo", *hits, w)
  y = x.reshape(len(x), -1) @ matrix.reshape(x[0].size, -1)
  return y.reshape(len(x), *out, -1)


def _lax(x, w, strides, pads, **kwargs):
  return lax.conv_general_dilated(
    x, w, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
  )


_conv = jax.custom_vjp(_lax, nondiff_argnums=(2, 3))


def _conv_bwd(strides, pads, residuals, dy):
  x, w = residuals
  if strides != (1, 1) and min(dy.shape[1:3]) < max(w.shape[:2]):
    dx = _strided_input_gradient(dy, w, x.shape, strides, pads)
  else:
    (dx,) = jax.vjp(lambda x: _lax(x, w, strides, pads), x)[1](dy)
  return dx, _filter_gradient(x, dy, w.shape, strides, pads)


_conv.defvjp(
  lambda x, w, strides, pads: (_lax(x, w, strides, pads), (x, w)), _conv_bwd
)


def _strided_input_gradient(dy, w, shape, strides, pads):
  """One product gives all taps; each is spread by the strides, then added."""
  taps = (dy @ w.reshape(-1, w.shape[3]).T).reshape(
    *dy.shape[:3], -1, w.shape[2]
  )
  zero, spread = jnp.zeros((), dy.dtype), []
  for index, tap in enumerate(np.ndindex(*w.shape[:2])):
    around = [(0, 0, 0)]
    for t, p, n, o, s in zip(
      tap, pads, shape[1:3], dy.shape[1:3], strides, strict=True
    ):
      first = t - p[0]  # the pixel that the first output's tap falls on
      around.append((first, n - first - (o - 1) * s - 1, s - 1))
    spread.append(lax.pad(taps[:, :, :, index], zero, [*around, (0, 0, 0)]))
  return functools.reduce(operator.add, spread)


def _filter_gradient(x, dy, shape, strides, pads):
  """XLA's own convolution, of operands that are in memory before transposing.

  It sums over the images, so these take the place of the channels. Where an
  operand is still to be computed (a normalisation, say), XLA's transposing of
  it takes up to ten times as long as computing it and transposing the result. A
  call that is not inlined keeps the two apart; an optimization barrier does
  not, because on CPUs XLA removes it before it fuses operations.
  """
  with set_xla_metadata(inlineable="false"):
    x = _transpose(x, (3, 1, 2, 0))  # [c, h, w, n]
    kernel = _transpose(dy, (1, 2, 0, 3))  # [oh, ow, n, o]
  around = [
    (p[0], k + (o - 1) * s - n - p[0])
    for p, k, o, s, n in zip(
      pads, shape[:2], dy.shape[1:3], strides, x.shape[1:3], strict=True
    )
  ]
  dw = _lax(x, kernel, (1, 1), around, rhs_dilation=strides)
  return dw.transpose(1, 2, 0, 3)


@functools.partial(jax.jit, static_argnums=1)
def _transpose(x, axes):
  return x.transpose(axes)
