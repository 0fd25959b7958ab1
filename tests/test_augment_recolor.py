"""The two forms of recolouring: that of CPUs and that of accelerators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.augment import color, recolor

RANGES = {
  "brightness": (0.2, 1.8),
  "contrast": (0.2, 1.8),
  "saturation": (0.2, 1.8),
  "hue": (-0.2, 0.2),
}


def drawn(n, names=tuple(RANGES)):
  """Crops, some values outside [0, 1], and the steps of each of n images."""
  rng = np.random.default_rng(0)
  x = rng.uniform(-0.1, 1.1, (n, 24, 3, 20))
  times = rng.uniform(size=(len(names), n))
  times[:, -1] = 0.5  # all at once
  flags = rng.uniform(size=(3, n)) < 0.5
  steps = {
    "jitter": (
      flags[0],
      {name: rng.uniform(*RANGES[name], n) for name in names},
      dict(zip(names, times, strict=True)),
    ),
    "gray": flags[1],
    "blur": (flags[2], rng.uniform(0.1, 2, n)),
  }
  return jax.tree.map(jnp.asarray, (x, steps))


def both(x, steps):
  return [
    jax.jit(functools.partial(form, radius=2))(x, steps)
    for form in (recolor.one_by_one, recolor.together)
  ]


@pytest.mark.parametrize("names", [tuple(RANGES), ("hue", "brightness")])
def test_both_forms_give_the_same(names, x64):
  x, steps = drawn(40, names)
  one, other = both(x, steps)
  assert one.shape == other.shape == x.shape
  assert float(jnp.abs(one - x).max()) > 0.1
  np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_images_without_a_step_are_only_clipped(x64):
  x, steps = drawn(6)
  off = jnp.zeros(6, bool)
  steps = {
    "jitter": (off, *steps["jitter"][1:]),
    "gray": off,
    "blur": (off, steps["blur"][1]),
  }
  for form in both(x, steps):
    np.testing.assert_array_equal(form, jnp.clip(x, 0, 1))


@pytest.mark.parametrize("platform, loops", [("cpu", True), ("cuda", False)])
def test_each_platform_gets_its_form(platform, loops):
  """One image after the other only where that is fast."""
  draws = {"amount": 4, "time": 4, "jitter": 1, "gray": 1, "blur": 1}
  shapes = {
    name: jax.ShapeDtypeStruct((2, 3, count), jnp.float32)
    for name, count in (draws | {"sigma": 1}).items()
  }
  text = (
    jax.jit(
      lambda x, u: recolor.recolor(
        x, u, amounts=tuple(RANGES.items()), jitter=0.8, gray=0.2, blur=0.5
      )
    )
    .trace(jax.ShapeDtypeStruct((2, 3, 24, 3, 24), jnp.float32), shapes)
    .lower(lowering_platforms=(platform,))
    .as_text()
  )
  assert ("stablehlo.while" in text) == loops
  assert list(color.OPS) == ["brightness", "saturation", "hue", "contrast"]
