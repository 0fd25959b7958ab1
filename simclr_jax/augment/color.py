"""Colour: brightness, contrast, saturation, hue, grayscale, any order.

Inside, an image is a list of planes [..., H, W], one a channel: HSV needs the
channels beside each other, and a plane keeps rows contiguous.
"""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.augment import pixels

# Keeps 0 / 0 out of pixels without colour, and its square out of their
# gradients: 1e-36 is still a float32.
TINY = 1e-18


def _extremes(planes):
  red, green, blue = planes
  high = jnp.maximum(jnp.maximum(red, green), blue)
  return high, jnp.minimum(jnp.minimum(red, green), blue)


def brightness(planes, factor):
  """See adjust_brightness; so for the others."""
  return [x * factor for x in planes]


def contrast(planes, factor):
  """About the mean of each plane."""
  means = [x.mean(axis=(-2, -1), keepdims=True) for x in planes]
  return [
    x * factor + (1 - factor) * mean
    for x, mean in zip(planes, means, strict=True)
  ]


def saturation(planes, factor):
  """S becomes min(S * factor, 1).

  Each channel's distance from V is scaled; V and hue stay.
  """
  high, low = _extremes(planes)
  limit = jnp.maximum(high / jnp.maximum(high - low, TINY), 0)
  scale = jnp.minimum(limit, factor)
  zero = jnp.where(limit <= factor, low, -jnp.inf)  # S is 1: exactly 0 there
  return [jnp.where(x == zero, 0, x + (1 - scale) * (high - x)) for x in planes]


def hue(planes, delta):
  """A turn of H; V and the smallest channel's value stay."""
  red, green, blue = planes
  high, low = _extremes(planes)
  spread = high - low
  unit = jnp.maximum(spread, TINY)  # a sixth of a turn
  away = jnp.where(
    red == high,
    green - blue,
    jnp.where(green == high, blue - red + 2 * unit, red - green + 4 * unit),
  )
  angle = away / unit + 6 * delta

  def channel(peak):  # full within 1 of its peak, none beyond 2
    away = angle - peak
    away = jnp.abs(away - 6 * jnp.round(away / 6))
    mixed = low + spread * jnp.maximum(2 - away, 0)
    return jnp.where(away <= 1, high, mixed)  # V without rounding

  return [channel(peak) for peak in (0, 2, 4)]


def grayscale(planes):
  """The luma, three times."""
  red, green, blue = planes
  return [0.2989 * red + 0.587 * green + 0.114 * blue] * 3


# From cheap to dear: jitter computes the first 8 times, the last once.
# Contrast is the dearest, since it needs the mean over the image first.
OPS = {
  "brightness": brightness,
  "saturation": saturation,
  "hue": hue,
  "contrast": contrast,
}


def jitter(planes, amounts, times, active):
  """Applies ops in an order of each image's own, clipping after each.

  Args:
    planes: list of [n, H, W].
    amounts: dict, name in OPS -> [n, 1, 1]; ops that are left out cost nothing.
    times: dict, name -> [n, 1, 1]; an image's ops run by increasing time.
    active: bool [n, 1, 1]; other images pass unchanged, not even clipped.

  Every order of a, b, c is found in the sequence a b a c a b a, in which each
  op comes twice as often as the next dearer one. All images walk through all
  slots and take part in one slot of each op: the one that lies before or after
  each dearer op's slot as this image's order says.
  """

  def walk(planes, ops, active):
    if not ops:
      return planes
    cheaper, op = ops[:-1], ops[-1]
    before = {name: times[name] < times[op] for name in cheaper}
    planes = walk(
      planes, cheaper, {name: active[name] & before[name] for name in cheaper}
    )
    changed = OPS[op](planes, amounts[op])
    planes = [
      jnp.where(active[op], jnp.clip(new, 0, 1), old)
      for new, old in zip(changed, planes, strict=True)
    ]
    return walk(
      planes, cheaper, {name: active[name] & ~before[name] for name in cheaper}
    )

  ops = [name for name in OPS if name in amounts]
  return walk(planes, ops, dict.fromkeys(ops, active))


def in_order(planes, amounts, times):
  """`jitter` of one image, planes [H, W] and scalars, by real branches."""
  # At equal times the dearer op comes first, as there.
  names = [name for name in reversed(OPS) if name in amounts]

  def branch(name):
    return lambda planes, amount: [
      jnp.clip(plane, 0, 1) for plane in OPS[name](planes, amount)
    ]

  branches = [branch(name) for name in names]
  values = jnp.stack([amounts[name] for name in names])
  order = jnp.argsort(jnp.stack([times[name] for name in names]))

  def step(i, planes):
    return jax.lax.switch(order[i], branches, planes, values[order[i]])

  return jax.lax.fori_loop(0, len(names), step, planes)


@functools.partial(jax.jit, static_argnames="fn", inline=True)
def _on_planes(fn, images, *amounts):
  wide = jnp.promote_types(images.dtype, jnp.float32)
  planes = [images[..., c].astype(wide) for c in range(images.shape[-1])]
  amounts = [
    jnp.broadcast_to(jnp.asarray(a, wide), images.shape[:-3])[..., None, None]
    for a in amounts
  ]
  return jnp.stack(fn(planes, *amounts), axis=-1).astype(images.dtype)


def adjust_brightness(images, factor):
  """images * factor, not clipped (SimCLRv2's brightness; v1 added).

  Args:
    images: [..., H, W, C] in [0, 1] (uint8 is converted).
    factor: [...] or a scalar, at least 0.

  Source: data_util.py, random_brightness with impl "simclrv2".

  >>> float(adjust_brightness(jnp.full((2, 2, 3), 0.25), 2.0).max())
  0.5
  """
  return _on_planes(brightness, pixels.to_float(images), factor)


def adjust_contrast(images, factor):
  """(images - mean) * factor + mean per channel and image, not clipped.

  Args:
    images: [..., H, W, C] in [0, 1] (uint8 is converted).
    factor: [...] or a scalar, at least 0.

  As tf.image.adjust_contrast; torchvision blends with the gray mean instead.

  >>> float(adjust_contrast(jnp.full((2, 2, 1), 0.5), 3.0).max())
  0.5
  """
  return _on_planes(contrast, pixels.to_float(images), factor)


def adjust_saturation(images, factor):
  """S of HSV becomes min(S * factor, 1).

  Args:
    images: [..., H, W, 3] in [0, 1] (uint8 is converted).
    factor: [...] or a scalar, at least 0; 0 leaves V in all channels.

  Raises:
    UserError: for other than 3 channels.

  As tf.image.adjust_saturation; torchvision blends with the gray image.

  >>> adjust_saturation(jnp.array([[[0.5, 0.25, 0.0]]]), 0.5).tolist()
  [[[0.5, 0.375, 0.25]]]
  """
  images = pixels.to_float(images)
  pixels.need_rgb(images, "adjust_saturation")
  return _on_planes(saturation, images, factor)


def adjust_hue(images, delta):
  """H of HSV moves by delta turns.

  Args:
    images: [..., H, W, 3] in [0, 1] (uint8 is converted).
    delta: [...] or a scalar, in turns (1 is the whole circle).

  Raises:
    UserError: for other than 3 channels.

  As tf.image.adjust_hue.

  >>> adjust_hue(jnp.array([[[1.0, 0.0, 0.0]]]), 1 / 3).round(3).tolist()
  [[[0.0, 1.0, 0.0]]]
  """
  images = pixels.to_float(images)
  pixels.need_rgb(images, "adjust_hue")
  return _on_planes(hue, images, delta)


def to_grayscale(images):
  """Luma 0.2989 R + 0.587 G + 0.114 B in all three channels.

  images [..., H, W, 3] in [0, 1] (uint8 is converted); the same shape comes
  back. Raises UserError for other than 3 channels. As tf.image.rgb_to_grayscale
  and a tile: the weights sum to 0.9999.

  >>> to_grayscale(jnp.ones((2, 2, 3))).shape
  (2, 2, 3)
  """
  images = pixels.to_float(images)
  pixels.need_rgb(images, "to_grayscale")
  return _on_planes(grayscale, images)
