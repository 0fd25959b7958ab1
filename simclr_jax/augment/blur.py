"""Gaussian blur as products with banded matrices."""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.augment import pixels
from simclr_jax.config import UserError

# Rows that share a slice of the band: products with the whole band are mostly
# of zeros. On accelerators slicing costs more than the zeros do (two views: 5.2
# ms and 4.7).
BLOCK = 64


def _band(sigma, size, radius):
  """[n] -> [n, size, size], symmetric; taps beyond the image are dropped."""
  place = jnp.arange(size, dtype=sigma.dtype)
  away = jnp.abs(place[:, None] - place)
  scale = 0.5 / sigma[:, None] ** 2
  taps = jnp.arange(-radius, radius + 1, dtype=sigma.dtype)
  total = jnp.exp(-(taps**2) * scale).sum(axis=-1)[:, None, None]
  weight = jnp.exp(-(away**2) * scale[..., None]) / total
  return jnp.where(away <= radius, weight, 0)


def _blocks(size, radius, block):
  for start in range(0, size, block):
    stop = min(start + block, size)
    yield (
      slice(start, stop),
      slice(max(start - radius, 0), min(stop + radius, size)),
    )


@functools.partial(
  jax.jit, static_argnames=("radius", "block", "precision"), inline=True
)
def blur_planes(images, sigma, radius, *, block=BLOCK, precision="highest"):
  """images [n, H, C, W], sigma [n] -> [n, H, C, W]; zeros outside.

  `block` rows share a slice of the band; None: all of them.
  """
  n, height, channels, width = images.shape
  product = functools.partial(jnp.einsum, precision=precision)
  down, across = (_band(sigma, s, radius) for s in (height, width))
  x = images.reshape(n, height, channels * width)
  x = jnp.concatenate(
    [
      product("nts,nsk->ntk", down[:, t, s], x[:, s])
      for t, s in _blocks(height, radius, block or height)
    ],
    axis=1,
  ).reshape(n, height * channels, width)
  x = jnp.concatenate(
    [
      product("nks,nst->nkt", x[..., s], across[:, s, t])
      for t, s in _blocks(width, radius, block or width)
    ],
    axis=2,
  )
  return x.reshape(images.shape)


def gaussian_blur(images, sigma, *, kernel_size):
  """Separable Gaussian blur with zeros outside, as official (edges darken).

  Args:
    images: [..., H, W, C] in [0, 1] (uint8 is converted).
    sigma: [...] or a scalar, pixels, above 0.
    kernel_size: int; the radius is kernel_size // 2, so 22 and 23 both give
      23 taps. SimCLR takes the image's height // 10.

  Raises:
    UserError: for a kernel_size that is negative or no whole number.

  Source: data_util.py, gaussian_blur.

  >>> gaussian_blur(jnp.ones((8, 8, 3)), 1.0, kernel_size=3).shape
  (8, 8, 3)
  """
  if kernel_size < 0 or int(kernel_size) != kernel_size:
    raise UserError(f"kernel_size is {kernel_size}; expected an int >= 0")
  images = pixels.to_float(images)
  lead = images.shape[:-3]
  sigma = jnp.broadcast_to(jnp.asarray(sigma, images.dtype), lead).reshape(-1)
  x = jnp.swapaxes(images.reshape(-1, *images.shape[-3:]), 2, 3)
  x = blur_planes(x, sigma, int(kernel_size) // 2)
  return jnp.swapaxes(x, 2, 3).reshape(images.shape)
