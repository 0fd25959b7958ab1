"""The two forms of making views: that of CPUs and that of accelerators."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import augment, build, cli
from simclr_jax.augment import crop, views

RANGES = {
  "brightness": (0.2, 1.8),
  "contrast": (0.2, 1.8),
  "saturation": (0.2, 1.8),
  "hue": (-0.2, 0.2),
}
BOXES = [[2, 3, 20, 11], [0, 0, 96, 80], [95, 79, 1, 1], [5.5, 7, 30, 9]]


def drawn(n, names=tuple(RANGES), *, shape=(26, 24), probability=0.5):
  """The arguments of `make_views`: two views of n images."""
  rng = np.random.default_rng(0)
  times = rng.uniform(size=(len(names), 2 * n))
  times[:, -1] = 0.5  # all at once
  flags = rng.uniform(size=(3, 2 * n)) < probability
  steps = {
    "jitter": (
      flags[0],
      {name: rng.uniform(*RANGES[name], 2 * n) for name in names},
      dict(zip(names, times, strict=True)),
    ),
    "gray": flags[1],
    "blur": (flags[2], rng.uniform(0.1, 2, 2 * n)),
  }
  images = rng.uniform(-0.1, 1.1, (n, *shape, 3))
  corners, sides = (
    rng.uniform(0, 0.4, (2, n, 2)),
    rng.uniform(0.2, 0.6, (2, n, 2)),
  )
  boxes = np.rint(np.concatenate([corners, sides], -1) * (shape * 2))
  flips = rng.uniform(size=(2, n)) < 0.5
  return jax.tree.map(jnp.asarray, (images, boxes, flips, steps))


def both(args, size):
  return [
    jax.jit(functools.partial(form, size=size))(*args)
    for form in (views.one_by_one, views.together)
  ]


@pytest.mark.parametrize(
  "names, shape, size",
  [
    (tuple(RANGES), (26, 24), (24, 20)),
    (("hue", "brightness"), (26, 24), (24, 20)),
    (tuple(RANGES), (80, 60), (64, 60)),  # large: crops one by one too
  ],
)
def test_both_forms_give_the_same(names, shape, size, x64):
  args = drawn(12, names, shape=shape)
  assert crop.rows_are_faster(args[0], size) == (shape[0] == 80)
  one, other = both(args, size)
  assert one.shape == other.shape == (24, *size, 3)
  assert one.std() > 0.1
  np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_views_without_a_step_are_only_clipped(x64):
  args = drawn(3, probability=0)
  without = both((*args[:3], {}), (24, 20))
  for form in both(args, (24, 20)):
    np.testing.assert_allclose(form, without[0], rtol=0, atol=1e-12)
  assert (without[0].min(), without[0].max()) == (0, 1)


@pytest.mark.parametrize("flip", [False, True])
def test_rows_give_what_products_give(flip, x64):
  """Also at the edges, for a single pixel and a box between pixels."""
  images = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 96, 80, 2)))
  boxes, flips = jnp.asarray(BOXES), jnp.full(len(BOXES), flip)
  rows = crop.rows_of(
    jnp.swapaxes(images[0], 1, 2), boxes, flips, size=(50, 44)
  )
  products = crop.by_products(images, boxes[None], flips[None], size=(50, 44))
  np.testing.assert_allclose(rows, products[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("platform, loops", [("cpu", True), ("cuda", False)])
def test_each_platform_gets_its_form(platform, loops):
  """One view after the other only where that is fast."""
  text = (
    jax.jit(functools.partial(views.make_views, size=(24, 20)))
    .trace(*drawn(2))
    .lower(lowering_platforms=(platform,))
    .as_text()
  )
  assert ("stablehlo.while" in text) == loops


@pytest.mark.parametrize(
  "dtype, precision", [("float32", "HIGHEST"), ("bfloat16", "HIGH")]
)
def test_products_are_as_exact_as_the_views(dtype, precision):
  """A half is rounded to 8 bits in the end; accelerators are faster then."""

  def fn(key, images):
    return augment.two_views(key, images, size=24, dtype=jnp.dtype(dtype))

  args = jax.random.key(0), np.zeros((2, 26, 24, 3), np.uint8)
  lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
  found = re.findall(r"precision = \[(\w+), (\w+)\]", lowered.as_text())
  assert len(found) >= 4 and set(found) == {(precision, precision)}


@pytest.mark.parametrize(
  "stage, views_fn",
  [
    ("pretrain", augment.two_views),
    ("finetune", augment.crop_flip),
    ("distill", augment.crop_flip),
  ],
)
def test_views_are_the_stages_in_the_networks_type(stage, views_fn):
  config = cli.load_recipe("digits", stage=stage)
  for dtype in ("float32", "bfloat16"):
    config.model.dtype = dtype
    made = build.make_views(config)
    assert made.func is views_fn
    assert made.keywords["dtype"] == jnp.dtype(dtype)
