"""Crop, jitter, grayscale and blur, in a form for each kind of machine.

Accelerators take all images through the same operations and keep a result where
an image wants it. A CPU takes one view after the other, small enough for its
cache, through its own operations alone: some 15 times as fast at 224 pixels
(XLA's CPU backend also recomputes a chain of operations for each colour plane).
"""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.augment import color, crop
from simclr_jax.augment.blur import blur_planes

SIGMA_RANGE = (0.1, 2.0)


def recoloring(draws, *, amounts, jitter, gray, blur, is_rgb, dtype) -> dict:
  """What is done to each view after its crop, from what it drew.

  Args:
    draws: uniforms by name, [views, n, count].
    amounts: ((name, (low, high)), ...), the ops of jitter.
    jitter, gray, blur: probabilities.
    is_rgb: whether there are three channels.
    dtype: of the arithmetic.

  Returns:
    Steps that are not off, by name; all arrays are [views * n].
  """
  u = {k: v.reshape(-1, v.shape[-1]) for k, v in draws.items()}
  drawn, times, steps = {}, {}, {}
  for name, (low, high) in amounts if jitter else ():
    if is_rgb or name not in ("saturation", "hue"):
      i = list(color.OPS).index(name)
      drawn[name] = low + (high - low) * u["amount"][:, i].astype(dtype)
      times[name] = u["time"][:, i]
  if drawn:
    steps["jitter"] = (u["jitter"][:, 0] < jitter, drawn, times)
  if gray and is_rgb:
    steps["gray"] = u["gray"][:, 0] < gray
  if blur:
    low, high = SIGMA_RANGE
    sigma = low + (high - low) * u["sigma"][:, 0].astype(dtype)
    steps["blur"] = (u["blur"][:, 0] < blur, sigma)
  return steps


@functools.partial(jax.jit, static_argnames=("size", "precision"), inline=True)
def make_views(images, boxes, flips, steps, *, size, precision="highest"):
  """The views [views * n, H, W, C], in [0, 1], of all images.

  Args:
    images: floats [n, S, T, C].
    boxes: [views, n, 4].
    flips: bool [views, n].
    steps: from `recoloring`; {} only clips.
    size: (H, W).
    precision: of matrix products on accelerators.
  """
  if size[0] < 20:  # the official blur has no taps there
    steps = {name: step for name, step in steps.items() if name != "blur"}
  return jax.lax.platform_dependent(
    images,
    boxes.astype(images.dtype),
    flips,
    steps,
    cpu=functools.partial(one_by_one, size=size),
    default=functools.partial(together, size=size, precision=precision),
  )


def _clip(planes):
  return [jnp.clip(plane, 0, 1) for plane in planes]


def _same(x):
  return x


def one_by_one(images, boxes, flips, steps, *, size):
  """See `make_views`."""
  views, n = flips.shape
  planes = jnp.swapaxes(images, 2, 3)
  by_rows = crop.rows_are_faster(images, size)
  if by_rows:  # crops are made one by one as well
    crops = jnp.tile(jnp.arange(n), views), boxes.reshape(-1, 4), flips.ravel()
  else:
    crops = _crops(images, boxes, flips, size=size)

  def view(x, steps):
    if by_rows:
      i, box, flip = x
      x = crop.rows_of(planes[i], box[None], flip[None], size=size)[0]
    return jnp.swapaxes(_recolored(x, steps, size[0] // 10 // 2), 1, 2)

  return jax.lax.map(lambda each: view(*each), (crops, steps))


def _recolored(x, steps, radius):
  """One view [H, C, W] and scalars: every branch is a real one."""
  planes = [x[:, c] for c in range(x.shape[1])]
  if "jitter" in steps:
    on, amounts, times = steps["jitter"]
    in_order = functools.partial(color.in_order, amounts=amounts, times=times)
    planes = jax.lax.cond(on, in_order, _same, planes)
  if "gray" in steps:
    planes = jax.lax.cond(steps["gray"], color.grayscale, _same, planes)
  x = jnp.stack(_clip(planes), axis=1)
  if "blur" in steps:
    on, sigma = steps["blur"]

    def blurred(x):
      return jnp.clip(blur_planes(x[None], sigma[None], radius)[0], 0, 1)

    x = jax.lax.cond(on, blurred, _same, x)
  return x


def _crops(images, boxes, flips, **options):
  """[views * n, H, C, W]."""
  x = crop.by_products(
    images, jnp.swapaxes(boxes, 0, 1), jnp.swapaxes(flips, 0, 1), **options
  )
  x = jnp.swapaxes(x, 0, 1)
  return x.reshape(-1, *x.shape[2:])


def together(images, boxes, flips, steps, *, size, precision="highest"):
  """See `make_views`."""
  x = _crops(images, boxes, flips, size=size, precision=precision)
  # A number for each view, shaped to meet its planes [views * n, H, W].
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
    # x is used twice below: without this XLA may compute it twice.
    x = jax.lax.optimization_barrier(x)
    on, sigma = steps["blur"]
    radius = size[0] // 10 // 2
    blurred = blur_planes(x, sigma, radius, block=None, precision=precision)
    blurred = jnp.clip(blurred, 0, 1)
    x = jnp.where(on[:, None, None, None], blurred, x)
  return jnp.swapaxes(x, 2, 3)
