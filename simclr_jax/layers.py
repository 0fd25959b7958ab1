"""Convolution and BatchNorm as the official network has them."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.config import UserError

MOMENTUM = 0.9  # of the moving averages
EPSILON = 1e-5


def batch_norm(
  *, train, dtype, axis_name=None, group_size=0, initializing=False
) -> "Callable[..., BatchNorm]":
  """A maker of `BatchNorm`s, functools.partial.

  Args:
    train: whether they normalize by the batch's moments, or by the moving ones.
    dtype: of what they return; parameters and moments are float32 or above.
    axis_name: of the mapped axis whose devices share moments.
    group_size: how many neighbours share them; 0 is all. The moving averages
      are of all groups, so that devices end a step with one state.
    initializing: whether variables are only made, outside a mapped axis.

  Raises:
    UserError: a group size that does not divide the devices.
  """
  groups = all_groups = None
  if axis_name is not None and train and not initializing:
    num_devices = jax.lax.axis_size(axis_name)
    group_size = group_size or num_devices
    if num_devices % group_size:
      raise UserError(
        f"bn_group_size: got {group_size}, which does not divide the "
        f"{num_devices} devices"
      )
    if group_size < num_devices:
      all_groups = axis_name
    if group_size == 1:  # on CPUs XLA would keep collectives of one device
      axis_name = None
    elif group_size < num_devices:
      indices = np.arange(num_devices).reshape(-1, group_size)
      groups = tuple(map(tuple, indices.tolist()))
  return functools.partial(
    BatchNorm,
    train=train,
    dtype=dtype,
    axis_name=None if initializing else axis_name,
    groups=groups,
    all_groups=all_groups,
  )


class _GivenParams:
  """Takes parameters of the right shape as they are.

  Flax traces every initializer just to compare shapes, a tenth of the start-up
  time.
  """

  def param(self: Any, name, init, shape, *args, **kwargs):
    if self.has_variable("params", name):
      value = self.get_variable("params", name)
      if jnp.shape(value) == tuple(shape):
        return value
    # Draws it, or says what is wrong with the shape of the given one.
    return nn.Module.param(self, name, init, shape, *args, **kwargs)


class BatchNorm(_GivenParams, nn.Module):
  """Normalizes [..., C] by channel, then adds a shortcut, then cuts at 0.

  The official one: momentum 0.9, epsilon 1e-5, moments in float32 at least,
  over the batch of all devices on the axis (of a group, where there are some),
  the biased variance in the moving average, as with the official global_bn. The
  variance is E[x^2] - E[x]^2: exact over any number of devices with one
  collective for both moments, where the two-pass form needs two.
  """

  train: bool
  dtype: Any
  axis_name: str | None = None
  groups: tuple[tuple[int, ...], ...] | None = None
  all_groups: str | None = None  # the axis that the moving averages are over
  use_bias: bool = True
  scale_init: Any = nn.initializers.ones

  @nn.compact
  def __call__(self, x, shortcut=None, *, relu=False):
    shape, wide = x.shape[-1:], jnp.promote_types(self.dtype, jnp.float32)
    mean = self.variable("batch_stats", "mean", jnp.zeros, shape, wide)
    var = self.variable("batch_stats", "var", jnp.ones, shape, wide)
    scale = self.param("scale", self.scale_init, shape, wide)
    bias = jnp.zeros(shape, wide)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, shape, wide)
    x = jnp.asarray(x, self.dtype)
    scale, bias = jnp.asarray(scale, wide), jnp.asarray(bias, wide)
    if not self.train:
      factor = scale * jax.lax.rsqrt(var.value + EPSILON)
      return _rescaled(x, mean.value, factor, bias, shortcut, relu)
    y, moments = _normalized(
      x, scale, bias, shortcut, relu, self.axis_name, self.groups
    )
    if not self.is_initializing():
      moments = _over_devices(moments, self.all_groups, None)
      for moving, moment in zip((mean, var), moments, strict=True):
        moving.value = MOMENTUM * moving.value + (1 - MOMENTUM) * moment
    return y


def _rescaled(x, mean, factor, bias, shortcut, relu):
  y = ((x.astype(factor.dtype) - mean) * factor + bias).astype(x.dtype)
  if shortcut is not None:
    y = y + shortcut
  return nn.relu(y) if relu else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _normalized(x, scale, bias, shortcut, relu, axis_name, groups):
  """(`BatchNorm`'s output, (mean, variance)), the moments without a gradient.

  The gradient is that of Ioffe and Szegedy (2015), section 3, its sums over all
  devices. For the gradient that JAX derives, XLA for GPUs passes over the
  images seven times and stores what the ReLU lets through; for this one, five.
  """
  return _forward(x, scale, bias, shortcut, relu, axis_name, groups)[0]


def _forward(x, scale, bias, shortcut, relu, axis_name, groups):
  axes, wider = tuple(range(x.ndim - 1)), x.astype(scale.dtype)
  moments = wider.mean(axes), jnp.square(wider).mean(axes)
  mean, square = _over_devices(moments, axis_name, groups)
  var = jnp.maximum(square - jnp.square(mean), 0)
  inverse = jax.lax.rsqrt(var + EPSILON)
  y = _rescaled(x, mean, scale * inverse, bias, shortcut, relu)
  kept = None if shortcut is None else y
  return (y, (mean, var)), (x, kept, mean, inverse, scale, bias)


def _backward(relu, axis_name, groups, residuals, gradients):
  x, y, mean, inverse, scale, bias = residuals
  axes, factor = tuple(range(x.ndim - 1)), scale * inverse

  def centred(x, y, grad):
    """(x - mean, the gradient that the ReLU lets through), both wide."""
    away = x.astype(mean.dtype) - mean
    if relu:
      # Without a shortcut the same as y > 0, and y need not be read.
      is_open = away * factor > -bias if y is None else y > 0
      grad = jnp.where(is_open, grad, 0)
    return away, grad.astype(mean.dtype)

  # Recomputed in each of the two passes: whatever XLA for GPUs shares between
  # passes it stores to memory, which costs more than reading x again.
  x, y, grad = _afresh((x, y, gradients[0]))
  away, open_grad = centred(x, y, grad)
  d_bias, d_factor = _sums(open_grad, open_grad * away, axes)
  count = x.size // x.shape[-1]
  means = _over_devices((d_bias, d_factor), axis_name, groups)
  if y is None:
    x, grad, means = _afresh((x, grad, means))
    away, open_grad = centred(x, None, grad)
  mean_d_bias, mean_d_factor = (m / count for m in means)
  slope = jnp.square(inverse) * mean_d_factor
  d_x = factor * (open_grad - mean_d_bias - away * slope)
  d_shortcut = None if y is None else open_grad.astype(y.dtype)
  return d_x.astype(x.dtype), d_factor * inverse, d_bias, d_shortcut


_normalized.defvjp(_forward, _backward)


def _over_devices(pair, axis_name, groups):
  """The mean of each over the devices, in one collective."""
  if axis_name is None:
    return pair
  return jax.lax.pmean(jnp.stack(pair), axis_name, axis_index_groups=groups)


def _on_gpus(fn, default, *args):
  return jax.lax.platform_dependent(*args, cuda=fn, rocm=fn, default=default)


def _afresh(arrays):
  return _on_gpus(jax.lax.optimization_barrier, lambda x: x, arrays)


def _sums(a, b, axes):
  """The sums of a and of b.

  As one reduction, XLA for GPUs reads their common inputs once; two reductions
  are faster on CPUs.
  """

  def together(a, b):
    zero = jnp.zeros((), a.dtype)
    add = lambda x, y: (x[0] + y[0], x[1] + y[1])  # noqa: E731
    return tuple(jax.lax.reduce((a, b), (zero, zero), add, axes))

  def apart(a, b):
    return a.sum(axes), b.sum(axes)

  return _on_gpus(together, apart, a, b)


# Flax traces it for every kernel of every trace; jitted, it is traced once for
# each shape.
_kernel_init = jax.jit(
  nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
  static_argnums=(1, 2),
)


class _Conv(_GivenParams, nn.Conv):
  pass


def conv(features, kernel_size, strides=1, *, name, dtype, conv_fn):
  """A convolution padded by its kernel size alone, without bias."""
  before = (kernel_size - 1) // 2
  return _Conv(
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
