"""Jitter, grayscale and blur of crops, in a form for each kind of machine.

Accelerators take all images through the same operations and keep a result where
an image wants it. A CPU takes one image after the other, small enough for its
cache, through its own four operations alone: 14 to 20 times as fast at 224
pixels (XLA's CPU backend also computes a chain anew for each plane of it).
"""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.augment import color
from simclr_jax.augment.blur import blur_planes

SIGMA_RANGE = (0.1, 2.0)


@functools.partial(
  jax.jit, static_argnames=("amounts", "jitter", "gray", "blur"), inline=True
)
def recolor(crops, draws, *, amounts, jitter, gray, blur):
  """Crops [views, n, H, C, W] to views [views, n, H, W, C] in [0, 1].

  Args:
    crops: floats, not clipped.
    draws: uniforms by name, [views, n, count].
    amounts: ((name, (low, high)), ...), the ops of jitter.
    jitter, gray, blur: probabilities.
  """
  height, channels = crops.shape[2:4]
  x = crops.reshape(-1, *crops.shape[2:])
  u = {k: v.reshape(len(x), -1) for k, v in draws.items()}
  is_rgb, radius = channels == 3, height // 10 // 2
  drawn, times = {}, {}
  for name, (low, high) in amounts if jitter else ():
    if is_rgb or name not in ("saturation", "hue"):
      i = list(color.OPS).index(name)
      drawn[name] = low + (high - low) * u["amount"][:, i].astype(x.dtype)
      times[name] = u["time"][:, i]
  low, high = SIGMA_RANGE
  steps = {}
  if drawn:
    steps["jitter"] = (u["jitter"][:, 0] < jitter, drawn, times)
  if gray and is_rgb:
    steps["gray"] = u["gray"][:, 0] < gray
  if blur and radius:
    sigma = low + (high - low) * u["sigma"][:, 0].astype(x.dtype)
    steps["blur"] = (u["blur"][:, 0] < blur, sigma)
  views = jax.lax.platform_dependent(
    x,
    steps,
    cpu=functools.partial(one_by_one, radius=radius),
    default=functools.partial(together, radius=radius),
  )
  return jnp.swapaxes(views, 2, 3).reshape(
    *crops.shape[:3], crops.shape[4], channels
  )


def _clip(planes):
  return [jnp.clip(plane, 0, 1) for plane in planes]


def one_by_one(x, steps, *, radius):
  """x [m, H, C, W], steps with a leading m each -> [m, H, C, W]."""

  def image(x, steps):
    planes = [x[:, c] for c in range(x.shape[1])]
    if "jitter" in steps:
      on, amounts, times = steps["jitter"]
      in_order = functools.partial(color.in_order, amounts=amounts, times=times)
      planes = jax.lax.cond(on, in_order, lambda same: same, planes)
    if "gray" in steps:
      planes = jax.lax.cond(
        steps["gray"], color.grayscale, lambda same: same, planes
      )
    x = jnp.stack(_clip(planes), axis=1)
    if "blur" in steps:
      on, sigma = steps["blur"]

      def blurred(x):
        return jnp.clip(blur_planes(x[None], sigma[None], radius)[0], 0, 1)

      x = jax.lax.cond(on, blurred, lambda same: same, x)
    return x

  return jax.lax.map(lambda each: image(*each), (x, steps))


def together(x, steps, *, radius):
  """As `one_by_one`, all images at once."""
  # A number for each image, shaped to meet its planes [m, H, W].
  spread = jax.tree.map(lambda v: v[:, None, None], steps)
  planes = [x[:, :, c] for c in range(x.shape[2])]
  if "jitter" in steps:
    on, amounts, times = spread["jitter"]
    planes = color.jitter(planes, amounts, times, on)
  if "gray" in steps:
    luma = color.grayscale(planes)
    planes = [
      jnp.where(spread["gray"], a, b) for a, b in zip(luma, planes, strict=True)
    ]
  x = jnp.stack(_clip(planes), axis=2)
  if "blur" in steps:
    # Each slice of the band reads x: without this it may be computed for each.
    x = jax.lax.optimization_barrier(x)
    on, sigma = steps["blur"]
    blurred = jnp.clip(blur_planes(x, sigma, radius), 0, 1)
    x = jnp.where(on[:, None, None, None], blurred, x)
  return x
