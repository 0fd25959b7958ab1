"""Images on their way in: uint8 to float, and the checks that all ops share."""

import jax.numpy as jnp
import numpy as np

from simclr_jax.config import UserError


def to_float(images, dtype=None):
  """uint8 [..., H, W, C] to [0, 1]; floats keep their values.

  dtype None: float32 for uint8, the images' own for floats. Nothing is
  normalised by mean and deviation: SimCLRv2's networks eat [0, 1].
  Raises UserError for other integers and for fewer than three dimensions.
  """
  images = jnp.asarray(images)
  if images.ndim < 3:
    raise UserError(
      f"images have shape {images.shape}; expected [..., height, width, "
      "channels]: add the channel dimension with images[..., None]"
    )
  if images.dtype == jnp.uint8:
    dtype = jnp.dtype(dtype or jnp.float32)
    return images.astype(dtype) / jnp.asarray(255, dtype)
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f"images are {images.dtype}; expected uint8, or floats in [0, 1]: "
      "convert them with images.astype(np.uint8)"
    )
  return images.astype(dtype or images.dtype)


def need_floating(dtype):
  """For views, which lie between 0 and 1."""
  if not jnp.issubdtype(dtype, jnp.floating):
    raise UserError(
      f"dtype is {jnp.dtype(dtype)}; views are floats in [0, 1]: take "
      "jnp.float32 or jnp.bfloat16"
    )


def need_rgb(images, name):
  """For the ops that only three channels have."""
  if images.shape[-1] != 3:
    raise UserError(
      f"{name} got {images.shape[-1]} channels; it is defined for 3 (RGB): "
      "leave it out for other images"
    )


def low_high(values, name):
  """The two numbers of a range, as floats."""
  try:
    low, high = map(float, values)
  except (TypeError, ValueError):
    raise UserError(
      f"augment.{name} is {values}; expected two numbers, low and high"
    ) from None
  return low, high


def height_width(size):
  """An int or (height, width) to (height, width), checked."""
  try:
    pair = tuple(size) if np.ndim(size) else (size, size)
    height, width = map(int, pair)
    is_whole = (height, width) == pair
  except (TypeError, ValueError, OverflowError):
    is_whole = False
  if not is_whole or min(height, width) < 1:
    raise UserError(
      f"size is {size}; expected a positive int, or (height, width) of them"
    )
  return height, width
