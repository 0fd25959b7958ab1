"""Random views of images, made on the device: SimCLRv2's augmentation.

Pure functions of (key, images). `two_views` is pretraining's pipeline,
`crop_flip` that of fine-tuning and distillation, `eval_view` that of
evaluation; the ops they are made of are public too. Row i of a batch depends
on (key, index[i]) alone, so that any split over devices gives the same views.

Official operations and parameters (google-research/simclr, data_util.py), in
the official order: crop and resize, flip, colour jitter (four ops in random
order per image, clipped after each), grayscale, clip, blur, clip. Two things
differ on purpose: blur's sigma is drawn per image (official: per view and
replica), and crops are taken from a fixed canvas, not from the whole file.
"""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.augment import color, crop, pixels, views
from simclr_jax.augment.blur import gaussian_blur
from simclr_jax.augment.color import (
  adjust_brightness,
  adjust_contrast,
  adjust_hue,
  adjust_saturation,
  to_grayscale,
)
from simclr_jax.augment.crop import (
  AREA_RANGE,
  ASPECT_RANGE,
  crop_and_resize,
  eval_view,
  sample_crop_boxes,
)
from simclr_jax.config import UserError

__all__ = [
  "adjust_brightness",
  "adjust_contrast",
  "adjust_hue",
  "adjust_saturation",
  "crop_and_resize",
  "crop_flip",
  "eval_view",
  "gaussian_blur",
  "sample_crop_boxes",
  "to_grayscale",
  "two_views",
  "view_boxes",
]

# What a view draws, in this order whatever is switched on: a field that is
# turned off changes no other draw.
_DRAWS = {
  "box": 2 * crop.TRIES + 2,
  "flip": 1,
  "jitter": 1,
  "amount": len(color.OPS),
  "time": len(color.OPS),
  "gray": 1,
  "blur": 1,
  "sigma": 1,
}


@functools.partial(jax.jit, static_argnames="num_views", inline=True)
def _draw(key, index, num_views):
  """All uniforms of each view, by name: [num_views, n, count]."""

  def row(i):
    shape = (num_views, sum(_DRAWS.values()))
    return jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32)

  u, draws, start = jax.vmap(row, out_axes=1)(index), {}, 0
  for name, count in _DRAWS.items():
    draws[name] = u[..., start : start + count]
    start += count
  return draws


def _check_probabilities(**probabilities):
  for name, p in probabilities.items():
    if not 0 <= p <= 1:
      raise UserError(
        f"augment.{name} is {p}; expected a probability in [0, 1] (0 is off)"
      )


def _amounts(strength, **amounts):
  """((name, (low, high)), ...): what to draw from, without ops that are off."""
  if not strength >= 0:
    raise UserError(
      f"augment.strength is {strength}; expected a number >= 0 (0 is off)"
    )
  limits = {"brightness": jnp.inf, "contrast": 1, "saturation": 1, "hue": 0.5}
  ranges = {}
  for name, amount in amounts.items():
    scaled = strength * amount
    if not 0 <= scaled <= limits[name]:
      raise UserError(
        f"augment.{name} {amount} times augment.strength {strength} is "
        f"{scaled:g}; expected within [0, {limits[name]:g}]: lower one of them "
        "(with the official amounts strength is at most 1.25)"
      )
    if name == "hue":
      ranges[name] = (-scaled, scaled)
    else:
      ranges[name] = (max(1 - scaled, 0.0), 1 + scaled)
  return tuple((name, r) for name, r in ranges.items() if r[0] < r[1])


def _check_batch(images, index, sizes):
  """All three as arrays."""
  images = jnp.asarray(images)
  if images.ndim != 4:
    raise UserError(
      f"images have shape {images.shape}; expected a batch [n, height, width, "
      "channels]"
    )
  n = images.shape[0]
  index = jnp.arange(n) if index is None else jnp.asarray(index)
  sizes = jnp.asarray(images.shape[1:3] if sizes is None else sizes)
  if index.shape != (n,):
    raise UserError(f"index has shape {index.shape}; expected ({n},)")
  if sizes.shape not in ((n, 2), (2,)):
    raise UserError(f"sizes has shape {sizes.shape}; expected ({n}, 2)")
  # No image is larger than its canvas: outside it there are no pixels.
  sizes = jnp.minimum(sizes, jnp.asarray(images.shape[1:3]))
  return images, index, jnp.broadcast_to(sizes, (n, 2))


def _boxes(draws, sizes, area_range, aspect_range):
  """int32 [views, n, 4]."""
  ranges = crop.check_ranges(area_range, aspect_range)
  return crop.boxes_from_uniforms(draws["box"], sizes, **ranges)


def _make(
  draws,
  images,
  sizes,
  steps,
  *,
  size,
  flip_probability,
  area_range,
  aspect_range,
  dtype,
):
  """[views * n, H, H, C] of the dtype."""
  pixels.need_floating(dtype)
  _check_probabilities(flip_probability=flip_probability)
  wide = jnp.promote_types(dtype, jnp.float32)
  made = views.make_views(
    pixels.to_float(images, wide),
    _boxes(draws, sizes, area_range, aspect_range),
    draws["flip"][..., 0] < flip_probability,
    steps,
    size=pixels.height_width(size),
    # A 16-bit view keeps at most 11 bits, so products of 10 bits (TF32) are
    # exact enough.
    precision="highest" if dtype == wide else "high",
  )
  return made.astype(dtype)


def view_boxes(
  key, *, index, sizes, area_range=AREA_RANGE, aspect_range=ASPECT_RANGE
):
  """The boxes that `two_views` cuts out for the same key and rows.

  Args:
    key: the typed key that the views got.
    index: int [n], as given to the views.
    sizes: int [n, 2] or (height, width): the true sizes inside the canvas.
    area_range, aspect_range: as given to the views.

  Returns:
    int32 [2n, 4]: top, left, height, width in pixels of the canvas, view 1
    first. The first n are those of `crop_flip`.

  >>> key = jax.random.key(0)
  >>> view_boxes(key, index=jnp.arange(3), sizes=(32, 32)).shape
  (6, 4)
  """
  index = jnp.asarray(index)
  sizes = jnp.broadcast_to(jnp.asarray(sizes), (*index.shape, 2))
  boxes = _boxes(_draw(key, index, 2), sizes, area_range, aspect_range)
  return boxes.reshape(-1, 4)


def two_views(
  key,
  images,
  *,
  index=None,
  sizes=None,
  size,
  strength=1.0,
  brightness=0.8,
  contrast=0.8,
  saturation=0.8,
  hue=0.2,
  jitter_probability=0.8,
  gray_probability=0.2,
  blur_probability=0.5,
  flip_probability=0.5,
  area_range=AREA_RANGE,
  aspect_range=ASPECT_RANGE,
  dtype=jnp.float32,
):
  """Two random views of each image, as SimCLRv2 makes them.

  Args:
    key: a typed key (threefry, JAX's default: other generators make a row
      depend on its batch).
    images: uint8 [n, S, S, C], or floats in [0, 1]. Saturation, hue and
      grayscale need RGB and are skipped where C is not 3.
    index: int [n], positions in the global batch (default 0..n-1).
    sizes: int [n, 2], true height and width inside the canvas, top left
      (default: all of it). Nothing outside ever reaches a view.
    size: H, the side of the views in pixels.
    strength: scales the four amounts below.
    brightness: factor in [max(1 - b, 0), 1 + b], multiplicative.
    contrast, saturation: factor in [1 - c, 1 + c]; at most 1 after scaling.
    hue: shift in [-h, h] turns; at most 0.5 after scaling.
    jitter_probability, gray_probability, blur_probability, flip_probability:
      per view, in [0, 1]; 0 is off and costs nothing. Blur has a sigma in
      [0.1, 2] pixels and H // 10 // 2 taps on both sides (none below 20).
    area_range: of the crop, as a fraction of the image.
    aspect_range: of the crop, width over height.
    dtype: of the views; the arithmetic is float32, or float64 if asked. For
      bfloat16 and float16 matrix products may keep 10 bits (TF32 on GPUs; views
      then differ from float32's by up to 0.005, from rounding alone by 0.002).

  Returns:
    [2n, H, H, C] in [0, 1]: rows 0..n-1 are view 1, rows n..2n-1 view 2. Both
    views of row i depend on (key, index[i]) alone.

  Raises:
    UserError: for a number outside its range or arrays of another shape.

  >>> images = jnp.zeros((4, 40, 40, 3), jnp.uint8)
  >>> two_views(jax.random.key(0), images, size=32).shape
  (8, 32, 32, 3)
  """
  images, index, sizes = _check_batch(images, index, sizes)
  _check_probabilities(
    jitter_probability=jitter_probability,
    gray_probability=gray_probability,
    blur_probability=blur_probability,
  )
  amounts = _amounts(
    strength,
    brightness=brightness,
    contrast=contrast,
    saturation=saturation,
    hue=hue,
  )
  draws = _draw(key, index, 2)
  steps = views.recoloring(
    draws,
    amounts=amounts,
    jitter=jitter_probability,
    gray=gray_probability,
    blur=blur_probability,
    is_rgb=images.shape[-1] == 3,
    dtype=jnp.promote_types(dtype, jnp.float32),
  )
  return _make(
    draws,
    images,
    sizes,
    steps,
    size=size,
    flip_probability=flip_probability,
    area_range=area_range,
    aspect_range=aspect_range,
    dtype=dtype,
  )


def crop_flip(
  key,
  images,
  *,
  index=None,
  sizes=None,
  size,
  flip_probability=0.5,
  area_range=AREA_RANGE,
  aspect_range=ASPECT_RANGE,
  dtype=jnp.float32,
):
  """One random crop and flip of each image: fine-tuning and distillation.

  Arguments and errors as in `two_views`; returns [n, H, H, C] in [0, 1], the
  crops of the first view that `two_views` makes with the same key and index.

  >>> images = jnp.zeros((4, 40, 40, 3), jnp.uint8)
  >>> crop_flip(jax.random.key(0), images, size=32).shape
  (4, 32, 32, 3)
  """
  images, index, sizes = _check_batch(images, index, sizes)
  return _make(
    _draw(key, index, 1),
    images,
    sizes,
    {},
    size=size,
    flip_probability=flip_probability,
    area_range=area_range,
    aspect_range=aspect_range,
    dtype=dtype,
  )
