"""A 2-D convolution with its own gradients, for XLA's CPU backend alone.

That backend is slow at filter gradients, at maps smaller than the kernel and at
strided input gradients. Here each case is written as the matrix products that
were measured fastest (`benchmarks/cpu_conv.py`); accelerators never see this
file. The choice depends on static shapes only.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Elements of a block's patches: mostly the best of 2**18, 2**20 and 2**22.
PATCH_BLOCK = 2**20


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
  on to lax. The covered cases have reverse-mode gradients only.

  >>> x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
  >>> numbers = ("NHWC", "HWIO", "NHWC")
  >>> y = conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=numbers)
  >>> y.shape
  (2, 4, 4, 4)
  """
  fallback = functools.partial(
    lax.conv_general_dilated,
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
  out = _out_size(size, kernel, strides, pads)
  if min(*lhs.shape, *rhs.shape, *out) < 1:
    return fallback()
  if kernel == (1, 1) and pads == ((0, 0), (0, 0)):
    return _shifted(lhs, (0, 0), strides, out) @ rhs[0, 0]
  area = size[0] * size[1]
  taps = kernel[0] * kernel[1]
  # On a map no larger than the kernel most taps fall on padding; a full matrix
  # from pixels to pixels skips them, where it is smaller than the patches.
  if area <= taps and area * rhs.shape[3] <= taps * lhs.shape[0]:
    return _as_one_matrix(lhs, rhs, strides, pads, out)
  return _conv(lhs, rhs, strides, pads)


def _out_size(size, kernel, strides, pads):
  return tuple(
    (n + sum(p) - k) // s + 1
    for n, k, s, p in zip(size, kernel, strides, pads, strict=True)
  )


def _pad(x, pads, interior=(0, 0)):
  config = [(*p, i) for p, i in zip(pads, interior, strict=True)]
  zero = jnp.zeros((), x.dtype)
  return lax.pad(x, zero, ((0, 0, 0), *config, (0, 0, 0)))


def _shifted(x, start, strides, out):
  """The pixels of x that one tap of the kernel meets: [n, *out, c]."""
  limit = [a + s * (o - 1) + 1 for a, s, o in zip(start, strides, out)]  # noqa: B905
  return lax.slice(
    x, (0, *start, 0), (len(x), *limit, x.shape[3]), (1, *strides, 1)
  )


def _as_one_matrix(x, w, strides, pads, out):
  """All pixels times all pixels; plain operations, so JAX differentiates."""
  size, kernel = x.shape[1:3], w.shape[:2]
  hits = []  # per side, [pixel, output, tap] -> 1 where the tap joins the two
  for n, o, k, s, p in zip(size, out, kernel, strides, pads, strict=True):
    tap = np.arange(n)[:, None] + p[0] - s * np.arange(o)
    hits.append((tap[..., None] == np.arange(k)).astype(x.dtype))
  matrix = jnp.einsum("hpa,wqb,abco->hwcpqo", *hits, w)
  y = x.reshape(len(x), -1) @ matrix.reshape(x[0].size, -1)
  return y.reshape(len(x), *out, -1)


def _in_blocks(fn, images, elements, *, total=False):
  """Maps fn over slices of the batch, sized by elements an image.

  A batch that no fitting number of slices divides is filled up with zeros.
  Returns the rows joined, or with `total` the sum over the slices.
  """
  n = len(images[0])
  num = -(-n * elements // PATCH_BLOCK)
  num = next((d for d in range(num, 2 * num) if n % d == 0), min(num, n))
  if num == 1:
    return fn(*images)
  fill = -n % num
  blocks = [
    jnp.pad(x, ((0, fill), (0, 0), (0, 0), (0, 0))) if fill else x
    for x in images
  ]
  blocks = [x.reshape(num, -1, *x.shape[1:]) for x in blocks]
  if total:
    zero = jax.eval_shape(fn, *(x[0] for x in blocks))
    zero = jnp.zeros(zero.shape, zero.dtype)
    return lax.scan(lambda acc, xs: (acc + fn(*xs), None), zero, blocks)[0]
  y = lax.map(lambda xs: fn(*xs), blocks)
  return y.reshape(-1, *y.shape[2:])[:n]


def _patches(x, kernel, strides, pads, out):
  x = _pad(x, pads)
  taps = [_shifted(x, t, strides, out) for t in np.ndindex(*kernel)]
  return jnp.concatenate(taps, -1)


def _forward(x, w, strides, pads):
  kernel = w.shape[:2]
  out = _out_size(x.shape[1:3], kernel, strides, pads)
  if strides == (1, 1) and w.shape[2] > 4:
    return lax.conv_general_dilated(
      x, w, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
  matrix = w.reshape(-1, w.shape[3])
  return _in_blocks(
    lambda x: _patches(x, kernel, strides, pads, out) @ matrix,
    [x],
    out[0] * out[1] * len(matrix),
  )


def _input_gradient(dy, w, size, strides, pads):
  kernel, out = w.shape[:2], dy.shape[1:3]
  if strides == (1, 1):  # a forward convolution with the flipped kernel
    flipped = w[::-1, ::-1].swapaxes(2, 3)
    back = [(k - 1 - a, k - 1 - b) for k, (a, b) in zip(kernel, pads)]  # noqa: B905
    return _forward(dy, flipped, strides, back)
  matrix = w.reshape(-1, w.shape[3]).T

  def block(dy):
    taps = (dy @ matrix).reshape(*dy.shape[:3], -1, w.shape[2])
    dx = []
    for index, tap in enumerate(np.ndindex(*kernel)):
      low = [t - p[0] for t, p in zip(tap, pads)]  # noqa: B905
      fit = [
        (a, n - a - (o - 1) * s - 1)
        for a, n, o, s in zip(low, size, out, strides, strict=True)
      ]
      interior = [s - 1 for s in strides]
      dx.append(_pad(taps[:, :, :, index], fit, interior))
    return functools.reduce(operator.add, dx)

  return _in_blocks(block, [dy], out[0] * out[1] * matrix[0].size)


def _filter_gradient(x, dy, kernel_shape, strides, pads):
  kernel, out, o = kernel_shape[:2], dy.shape[1:3], dy.shape[3]

  def block(x, dy):
    patches = _patches(x, kernel, strides, pads, out)
    return dy.reshape(-1, o).T @ patches.reshape(-1, patches.shape[3])

  elements = out[0] * out[1] * kernel[0] * kernel[1] * x.shape[3]
  dw = _in_blocks(block, [x, dy], elements, total=True)
  return dw.T.reshape(kernel_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, w, strides, pads):
  return _forward(x, w, strides, pads)


def _conv_bwd(strides, pads, residuals, dy):
  x, w = residuals
  dx = _input_gradient(dy, w, x.shape[1:3], strides, pads)
  return dx, _filter_gradient(x, dy, w.shape, strides, pads)


_conv.defvjp(
  lambda x, w, strides, pads: (_conv(x, w, strides, pads), (x, w)), _conv_bwd
)
