"""Augmentation once more, in float64 NumPy, an image at a time.

Written from the definitions (HSV, Keys' cubic, the official sampler's law in
the reference data) and without a thought to speed: what the tests of
simclr_jax.augment compare with.
"""

import numpy as np


def hsv(image):
  """The textbook's: H in turns, S, V."""
  high, low = image.max(-1), image.min(-1)
  spread = np.where(high == low, 1, high - low)
  red, green, blue = np.moveaxis(image, -1, 0)
  h = np.select(
    [high == low, red == high, green == high],
    [0, (green - blue) / spread, 2 + (blue - red) / spread],
    4 + (red - green) / spread,
  )
  s = np.where(high > 0, (high - low) / np.where(high > 0, high, 1), 0)
  return h / 6 % 1, s, high


def rgb(h, s, v):
  channels = []
  for n in (5, 3, 1):
    k = (n + h * 6) % 6
    channels.append(v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1))
  return np.stack(channels, -1)


def saturation(image, factor):
  h, s, v = hsv(image)
  return rgb(h, np.clip(s * factor, 0, 1), v)


def hue(image, delta):
  """V and the lowest channel are kept, also outside [0, 1], as TF does."""
  low = image.min(-1, keepdims=True)
  h, s, v = hsv(image - low)
  return rgb((h + delta) % 1, s, v) + low


def contrast(image, factor):
  mean = image.mean((0, 1))
  return (image - mean) * factor + mean


COLOR = {
  "brightness": lambda image, factor: image * factor,
  "contrast": contrast,
  "saturation": saturation,
  "hue": hue,
}


def gray(image):
  luma = image @ np.array([0.2989, 0.587, 0.114])
  return np.repeat(luma[..., None], 3, -1)


def cubic(x):
  x = abs(x)
  if x < 1:
    return 1.5 * x**3 - 2.5 * x**2 + 1
  return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0


def resize(image, box, size):
  """Cuts out, then resizes each side with the four taps that exist."""
  top, left, height, width = (int(b) for b in box)
  image = image[top : top + height, left : left + width].astype(np.float64)
  for axis in (0, 1):
    image, result = np.moveaxis(image, axis, 0), []
    for i in range(size[axis]):
      source = (i + 0.5) * len(image) / size[axis] - 0.5
      taps = range(
        max(int(np.floor(source)) - 1, 0),
        min(int(np.floor(source)) + 3, len(image)),
      )
      weights = [cubic(source - t) for t in taps]
      total = sum(w * image[t] for w, t in zip(weights, taps, strict=True))
      result.append(total / sum(weights))
    image = np.moveaxis(np.stack(result), 0, axis)
  return image


def blur(image, sigma, radius):
  taps = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
  taps /= taps.sum()
  image = image.astype(np.float64)
  for axis in (0, 1):
    rows = np.moveaxis(image, axis, 0)
    padded = np.pad(rows, [(radius, radius), (0, 0), (0, 0)])
    rows = sum(w * padded[k : k + len(rows)] for k, w in enumerate(taps))
    image = np.moveaxis(rows, 0, axis)
  return image


def crop_box(rng, rows, columns):
  """One draw of the official sampler: up to 100 tries, then all of it."""
  whole = rows * columns
  for _ in range(100):
    aspect = rng.uniform(3 / 4, 4 / 3)
    tallest = int(np.rint(np.sqrt(whole / aspect)))
    if np.rint(tallest * aspect) > columns:
      tallest = int((columns + 0.5 - 1e-7) / aspect)
    tallest = min(tallest, rows)
    shortest = min(int(np.rint(np.sqrt(0.08 * whole / aspect))), tallest)
    height = int(rng.integers(shortest, tallest + 1))
    width = int(np.rint(height * aspect))
    if height * width < 0.08 * whole:
      height += 1
      width = int(np.rint(height * aspect))
    if height * width > whole:
      height -= 1
      width = int(np.rint(height * aspect))
    if height > rows or width > columns or height * width < 0.1 * whole:
      continue
    top = int(rng.integers(rows - height)) if height < rows else 0
    left = int(rng.integers(columns - width)) if width < columns else 0
    return top, left, height, width
  return 0, 0, rows, columns
