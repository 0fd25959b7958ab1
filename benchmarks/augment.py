"""Two random views of each image: lightly, kornia, dm-pix, and this package.

  python benchmarks/augment.py --peers=peers/bin/python --output=augment.json

Small: 32 pixels, colour at half strength, no blur (the CIFAR-10 recipe). Large:
from a canvas of 256 to 224 pixels, with blur. lightly's transform works on PIL
images with one process a core, kornia on batches. dm-pix, under vmap, has no
random crop of random size, so it gets this package's; its colour operations
come in a random order per image, as in BYOL's JAX code. Pixels are random and
in memory.
"""

import functools
import os

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import rounds

from simclr_jax import augment, cli

# name: images, canvas, size, strength, blur, images lightly makes a round,
# at least that many times lightly and dm-pix
CASES = {
  "small": (512, 32, 32, 0.5, 0.0, 1024, 5, 2),
  "large": (32, 256, 224, 1.0, 0.5, 96, 1, 1),
}


def pix_view(key, image, *, size, strength, blur):
  """One view of one image [S, S, C] by dm-pix."""
  keys = iter(jax.random.split(key, 16))

  def sometimes(probability, fn, x):
    on = jax.random.uniform(next(keys)) < probability
    return jnp.where(on, fn(x), x)

  box = augment.sample_crop_boxes(next(keys), image.shape[:2], num=1)[0]
  x = augment.crop_and_resize(image, box, size=size)
  x = dm_pix.random_flip_left_right(next(keys), x).clip(0, 1)
  s = 0.8 * strength
  names = ("brightness", "contrast", "saturation", "hue")
  ranges = ((1 - s, 1 + s),) * 3 + ((-0.2 * strength, 0.2 * strength),)
  factors = [
    jax.random.uniform(next(keys), minval=low, maxval=high)
    for low, high in ranges
  ]
  adjust = [lambda y, f=factors[0]: y * f] + [
    functools.partial(lambda y, fn, f: fn(y, f), fn=fn, f=f)
    for fn, f in zip(
      [getattr(dm_pix, f"adjust_{name}") for name in names[1:]],
      factors[1:],
      strict=True,
    )
  ]
  order = jax.random.permutation(next(keys), 4)

  def jitter(y):
    for i in range(4):
      y = jax.lax.switch(order[i], adjust, y).clip(0, 1)
    return y

  x = sometimes(0.8, jitter, x)
  gray = functools.partial(dm_pix.rgb_to_grayscale, keep_dims=True)
  x = sometimes(0.2, gray, x)
  if blur:
    sigma = jax.random.uniform(next(keys), minval=0.1, maxval=2)

    def blurred(y):
      return dm_pix.gaussian_blur(y, sigma, size // 10, padding="SAME")

    x = sometimes(blur, blurred, x).clip(0, 1)
  return x


def make_forms(count, canvas, size, strength, blur):
  """{name: one round}, of this package and dm-pix."""
  pixels = np.random.default_rng(0).integers(
    0, 256, (count, canvas, canvas, 3), np.uint8
  )
  images = jax.device_put(pixels)
  views = jax.jit(
    functools.partial(
      augment.two_views, size=size, strength=strength, blur_probability=blur
    )
  )
  one = functools.partial(pix_view, size=size, strength=strength, blur=blur)

  @jax.jit
  def pix(key, images):
    keys = jax.random.split(key, (2, count))
    return jax.vmap(jax.vmap(one), (0, None))(keys, images / 255)

  keys = iter(jax.random.split(jax.random.key(0), 1000))

  def timed(fn):
    return lambda: rounds.seconds_of(
      lambda: fn(next(keys), images).block_until_ready()
    )

  return {"simclr_jax": timed(views), "dm-pix": timed(pix)}


def main():
  cli.setup()
  parser = rounds.parser(__doc__)
  parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
  args = parser.parse_args()
  lines, versions = [], {}
  for case in args.cases:
    count, canvas, size, strength, blur, more, *wanted = CASES[case]
    forms = make_forms(count, canvas, size, strength, blur)
    options = {
      "canvas": canvas,
      "size": size,
      "strength": strength,
      "blur": blur,
    }
    with (
      rounds.maybe_peer(
        args.peers, "views", count=more, processes=os.cpu_count(), **options
      ) as (lightly, found),
      rounds.maybe_peer(args.peers, "kornia_views", count=count, **options) as (
        kornia,
        _,
      ),
    ):
      if lightly:
        versions = found
        forms["lightly"] = lambda: lightly() * count / more  # noqa: B023
        forms["kornia"] = kornia
      seconds = rounds.alternate(forms, args.rounds)
    lines.append(
      rounds.report(
        f"two views, {canvas} to {size} pixels, {case}",
        seconds,
        count=count,
        ours="simclr_jax",
        at_least={"lightly": wanted[0], "dm-pix": wanted[1]},
      )
    )
  rounds.write(lines, args, peers=versions)


if __name__ == "__main__":
  main()
