"""A 2-D convolution for GPUs, with a form of its own for the stem's 7x7.

cuDNN's kernels are slow where there are three channels. Space to depth: 2x2
pixels become one with four times the channels, and the 7x7 convolution of
stride 2 a 4x4 one of stride 1 with the same sums, in 5 ms in place of 11.5 on
an H200 (1,024 images of 224 pixels, forward and filter gradient).
"""

import jax.numpy as jnp
from jax import lax

NUMBERS = ("NHWC", "HWIO", "NHWC")
# After space to depth, zero-padded: tensor cores work on multiples of 8.
CHANNELS = 16


def conv_general_dilated(lhs, rhs, window_strides, padding, **options):
  """`jax.lax.conv_general_dilated`, for `nn.Conv`'s attribute.

  Covers kernels of more than 3x3 over up to four channels at stride 2, NHWC and
  HWIO, with the padding as numbers; passes all else on to lax.

  >>> x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((7, 7, 3, 4))
  >>> pad = ((3, 3), (3, 3))
  >>> conv_general_dilated(
  ...   x, w, (2, 2), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
  ... ).shape
  (2, 4, 4, 4)
  """
  if _is_stem(lhs, rhs, window_strides, padding, options):
    lhs, rhs = _folded(lhs, rhs, padding)
    window_strides, padding = (1, 1), "VALID"
  return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def _is_stem(lhs, rhs, window_strides, padding, options) -> bool:
  if lhs.ndim != 4 or isinstance(padding, str):
    return False
  given, expected = (
    lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
    for numbers in (options.get("dimension_numbers"), NUMBERS)
  )
  dilations = (
    options.get(f"{side}_dilation") or (1,) for side in ("lhs", "rhs")
  )
  return (
    given == expected
    and tuple(window_strides) == (2, 2)
    and lhs.shape[3] == rhs.shape[2] <= CHANNELS // 4
    and min(rhs.shape[:2]) > 3
    and all(d == 1 for sizes in dilations for d in sizes)
  )


def _folded(x, kernel, padding):
  """Images [n, h, w, 16] and kernel [kh, kw, 16, o] of stride 1."""
  pads = []
  for size, taps, (low, high) in zip(
    x.shape[1:3], kernel.shape[:2], padding, strict=True
  ):
    num_out = (size + low + high - taps) // 2 + 1
    needed = 2 * (num_out - 1) + taps + taps % 2  # the kernel is made even
    pads.append((low, needed - size - low, 0))
  more = 0, CHANNELS // 4 - x.shape[3], 0
  zero = jnp.zeros((), x.dtype)
  x = lax.pad(x, zero, [(0, 0, 0), *pads, more])
  n, height, width, channels = x.shape
  x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // 2, width // 2, -1)
  even = [(0, taps % 2, 0) for taps in kernel.shape[:2]]
  kernel = lax.pad(kernel, zero, [*even, more, (0, 0, 0)])
  rows, columns, _, num_filters = kernel.shape
  kernel = kernel.reshape(rows // 2, 2, columns // 2, 2, channels, num_filters)
  kernel = kernel.transpose(0, 2, 1, 3, 4, 5)
  return x, kernel.reshape(rows // 2, columns // 2, -1, num_filters)
