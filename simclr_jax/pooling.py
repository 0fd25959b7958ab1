"""The stem's max-pool, with a gradient that gathers, and ResNet-D's mean.

JAX's gradient of a max-pool scatters: on GPUs by atomic additions, whose order
varies from run to run, on CPUs four times as slowly. TPUs have an instruction
for it and keep it: gathering would move three times the bytes there.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 3  # pixels of a side
STRIDE = 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x, padding):
  """The largest of 3x3 pixels, at every other pixel.

  The gradient goes to the first of equal ones, row by row, as JAX's does.

  Args:
    x: floats [n, H, W, C].
    padding: ((low, high), (low, high)) in pixels; they count as -inf.

  Returns:
    [n, h, w, C], h = (H + low + high - 3) // 2 + 1 and w likewise.

  >>> max_pool(jnp.ones((1, 8, 6, 1)), ((1, 1), (1, 1))).shape
  (1, 4, 3, 1)
  """
  return _forward(x, padding)[0]


def _forward(x, padding):
  def by_jax(x):
    y = _plain(x, padding)
    return y, jnp.zeros(y.shape, jnp.uint8)  # not used there

  placed = functools.partial(_with_place, padding=padding)
  y, place = jax.lax.platform_dependent(x, tpu=by_jax, default=placed)
  return y, (x, place)


def _plain(x, padding):
  return nn.max_pool(x, (WINDOW, WINDOW), (STRIDE, STRIDE), padding)


def _with_place(x, padding):
  """(Each window's largest pixel, its number there, counted row by row)."""
  config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
  padded = jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), config)
  n, *sides, channels = padded.shape
  counts = [(side - WINDOW) // STRIDE + 1 for side in sides]
  largest, place = None, None  # of the pixels so far
  for number, start in enumerate(np.ndindex(WINDOW, WINDOW)):
    stops = [
      a + STRIDE * (c - 1) + 1 for a, c in zip(start, counts, strict=True)
    ]
    pixel = jax.lax.slice(
      padded, (0, *start, 0), (n, *stops, channels), (1, STRIDE, STRIDE, 1)
    )
    if largest is None:
      largest, place = pixel, jnp.zeros(pixel.shape, jnp.uint8)
    else:
      place = jnp.where(pixel > largest, jnp.uint8(number), place)
      largest = jnp.maximum(largest, pixel)
  return largest, place


def _backward(padding, residuals, grad):
  def by_jax(x, place, grad):
    return jax.vjp(functools.partial(_plain, padding=padding), x)[1](grad)[0]

  gathered = functools.partial(_gathered, padding=padding)
  x_grad = jax.lax.platform_dependent(
    *residuals, grad, tpu=by_jax, default=gathered
  )
  return (x_grad,)


def _gathered(x, place, grad, padding):
  shape = x.shape
  wide = jnp.promote_types(grad.dtype, jnp.float32)
  halves = [-(-side // STRIDE) for side in shape[1:3]]

  def windows(axis, parity):
    """For each window w with pixel 2 c + parity: (its number there, w - c).

    Window w begins at pixel 2 w - low, so that both are the same for all c.
    """
    for number in range(WINDOW):
      ahead = parity + padding[axis][0] - number
      if ahead % STRIDE == 0:
        yield number, ahead // STRIDE

  def moved(x, shifts):
    config = [(0, 0, 0)]
    for shift, half, side in zip(shifts, halves, x.shape[1:3], strict=True):
      config.append((-shift, half + shift - side, 0))
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])

  def part(parities):
    """The gradient at every other pixel: [n, half of H, half of W, C]."""
    total = jnp.zeros((), wide)
    for i, down in windows(0, parities[0]):
      for j, across in windows(1, parities[1]):
        chosen = jnp.where(place == WINDOW * i + j, grad, 0)
        total += moved(chosen, (down, across)).astype(wide)
    return total.astype(grad.dtype)

  rows = [jnp.stack([part((i, j)) for j in range(STRIDE)], 3) for i in range(2)]
  whole = jnp.stack(rows, 2)
  whole = whole.reshape(shape[0], *(STRIDE * half for half in halves), shape[3])
  return whole[:, : shape[1], : shape[2]]


max_pool.defvjp(_forward, _backward)


def mean_pool(x, stride: int):
  """The mean of 2x2 pixels, as the official ResNet-D pools before a shortcut.

  A row and a column of zeros at the end count in the mean where the stride is
  2, and do not where it is 1.

  Args:
    x: floats [n, H, W, C].
    stride: 1 or 2, in pixels.

  Returns:
    [n, ceil(H / stride), ceil(W / stride), C].

  >>> mean_pool(jnp.ones((1, 3, 4, 1)), 2)[0, :, :, 0].tolist()
  [[1.0, 1.0], [0.5, 0.5]]
  """

  def by_jax(x):
    y = nn.avg_pool(
      x,
      (2, 2),
      (stride, stride),
      ((0, 1), (0, 1)),
      count_include_pad=stride > 1,
    )
    return y.astype(x.dtype)

  added = functools.partial(_mean_of_added, stride=stride)
  return jax.lax.platform_dependent(x, cpu=added, default=by_jax)


def _mean_of_added(x, stride):
  """On CPUs XLA's window would read the one pixel of a map of 1x1 four times.

  Where the batch has some thousand values, with jax 0.10.2 to 0.12.0.1.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  zeros = [(0, 0), (0, 1), (0, 1), (0, 0)]

  def added(x):
    padded = jnp.pad(x.astype(wide), zeros)
    ends = padded.shape[1] - 1, padded.shape[2] - 1
    return sum(
      padded[:, i : ends[0] + i : stride, j : ends[1] + j : stride]
      for i, j in np.ndindex(2, 2)
    )

  count = added(jnp.ones_like(x[:1, :, :, :1])) if stride == 1 else 4
  return (added(x) / count).astype(x.dtype)
