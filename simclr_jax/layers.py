"""Convolution and BatchNorm as the official network has them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.config import UserError


def batch_norm(
  *, train, dtype, axis_name=None, group_size=0, initializing=False
) -> Callable[..., nn.BatchNorm]:
  """A maker of the official BatchNorm: momentum 0.9, epsilon 1e-5.

  Moments are computed in float32 at least, over the batch of all devices on
  `axis_name` (of `group_size` neighbours where that is not 0), and the biased
  variance goes into the moving average, as with the official global_bn. The
  variance is E[x^2] - E[x]^2: exact over any number of devices with one
  collective for both moments, where the two-pass form needs two.
  """
  groups = None
  if axis_name is not None and train and not initializing:
    num_devices = jax.lax.axis_size(axis_name)
    group_size = group_size or num_devices
    if num_devices % group_size:
      raise UserError(
        f"bn_group_size: got {group_size}, which does not divide the "
        f"{num_devices} devices"
      )
    if group_size == 1:  # XLA keeps collectives of one device on CPUs
      axis_name = None
    elif group_size < num_devices:
      groups = np.arange(num_devices).reshape(-1, group_size).tolist()
  is_float64 = jnp.dtype(dtype) == jnp.float64
  return functools.partial(
    nn.BatchNorm,
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
    axis_name=axis_name,
    axis_index_groups=groups,
    # Flax otherwise keeps the moving averages of a float64 network in float32.
    force_float32_reductions=not is_float64,
  )


# Flax traces it for every kernel of every trace; jitted, once a shape.
_kernel_init = jax.jit(
  nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
  static_argnums=(1, 2),
)


def conv(features, kernel_size, strides=1, *, name, dtype, conv_fn):
  """A convolution padded by its kernel size alone, without bias."""
  before = (kernel_size - 1) // 2
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    (strides, strides),
    padding=((before, kernel_size - 1 - before),) * 2,
    use_bias=False,
    kernel_init=_kernel_init,
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
    conv_general_dilated=conv_fn,
    name=name,
  )
