"""The ops of augmentation, one by one, against numbers of the official code.

golden/augment_primitives.npz holds outputs of google-research/simclr (commit
383d414, TF 1.15.4 and, for bicubic, tf2/ on TF 2.21.0), a part of the project's
reference data; the inputs are drawn again from their names. "edge" is an image
of corner cases (gray, black, white, ties).
"""

import doctest
import inspect
import itertools

import det
import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import oracles_augment as oracles
import pytest

from simclr_jax import augment
from simclr_jax.augment import color, crop, pixels
from simclr_jax.config import UserError

ADJUST = {
  "brightness": augment.adjust_brightness,
  "contrast": augment.adjust_contrast,
  "saturation": augment.adjust_saturation,
  "hue": augment.adjust_hue,
}
BOXES = {"box0": (0, 0, 48, 64), "box1": (5, 7, 20, 23)}
IMAGE = det.array("aug/color", (16, 24, 3), "uniform")


@pytest.fixture(scope="module")
def official(golden):
  with np.load(golden("augment_primitives.npz")) as file:
    return dict(file)


def group(official, name):
  found = {
    k.split("/", 1)[1]: v for k, v in official.items() if k.startswith(name)
  }
  assert found
  return found.items()


def close(ours, theirs, tolerance=1e-5):
  ours = np.asarray(ours)
  assert ours.shape == theirs.shape
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_color_equals_official(official):
  edge = official["input/edge"]
  for case, theirs in [*group(official, "color/"), *group(official, "color_e")]:
    name, _, amount = case.partition("_")
    if name in ADJUST:
      image = IMAGE if theirs.shape == IMAGE.shape else edge
      close(np.clip(ADJUST[name](image, float(amount)), 0, 1), theirs)
  close(augment.to_grayscale(IMAGE), official["color/to_grayscale"])


@pytest.mark.parametrize(
  "case, steps",
  [
    ("bcsh", "brightness 1.4 contrast 0.5 saturation 1.6 hue 0.15"),
    ("hscb", "hue -0.18 saturation 0.3 contrast 1.7 brightness 0.6"),
  ],
)
def test_sequence_equals_official(official, case, steps):
  words = steps.split()
  steps = dict(zip(words[::2], map(float, words[1::2]), strict=True))
  times = {name: jnp.full((1, 1, 1), i) for i, name in enumerate(steps)}
  amounts = {name: jnp.full((1, 1, 1), x) for name, x in steps.items()}
  planes = [jnp.asarray(IMAGE[None, ..., c]) for c in range(3)]
  on = jnp.ones((1, 1, 1), bool)
  planes = jax.jit(color.jitter)(planes, amounts, times, on)
  close(jnp.stack(planes, -1)[0], official[f"color/seq_{case}"])


def test_blur_equals_official(official):
  image = det.array("aug/blur", (24, 32, 3), "uniform")
  for case, theirs in group(official, "blur/"):
    size, sigma = case[1:].split("_s")
    ours = augment.gaussian_blur(image, float(sigma), kernel_size=int(size))
    close(ours, theirs)


def test_resize_equals_official(official):
  image = det.array("aug/crop", (48, 64, 3), "uniform")
  for case, theirs in group(official, "resize"):
    box = jnp.array(BOXES[case])
    ours = augment.crop_and_resize(image, box, size=theirs.shape[:2])
    close(ours, theirs, 1e-3)  # TF rounds its weights to 1/1024
    close(ours, oracles.resize(image, box, theirs.shape[:2]), 1e-5)


def test_eval_view_equals_official(official):
  for case, theirs in group(official, "eval/"):
    (rows, columns), size = (
      tuple(int(s) for s in part.split("x")) for part in case.split("_to_")
    )
    image = det.array(
      f"aug/eval_{rows}x{columns}", (rows, columns, 3), "uniform"
    )
    ours = augment.eval_view(image, size=size, crop=0.875)
    ours = ours[::3, ::3] if size == (64, 64) else ours  # as it is stored
    close(ours, theirs, 1e-3)


def test_eval_view_crop_rule():
  images = np.random.default_rng(0).integers(
    0, 256, (2, 40, 48, 3), dtype=np.uint8
  )
  small = augment.eval_view(images, size=32)
  close(small, np.asarray(augment.eval_view(images, size=32, crop=1.0)), 0)
  # Wider than the image: rint(0.875 / 1.65 * 48) = 25 rows of 42 pixels.
  wide = augment.eval_view(images, size=(20, 33))
  box = jnp.array((8, 3, 25, 42))
  view = augment.crop_and_resize(images, box, size=(20, 33))
  close(wide, np.clip(view, 0, 1))
  # The largest box of the result's aspect: 40 x 40 of 40 x 48, in the middle.
  box = jnp.array((0, 4, 40, 40))
  close(small, np.clip(augment.crop_and_resize(images, box, size=32), 0, 1))
  # A canvas around an image changes nothing, whatever it holds.
  canvas = np.full((2, 64, 64, 3), 255, np.uint8)
  canvas[:, :40, :48] = images
  inside = augment.eval_view(canvas, size=32, sizes=jnp.array([[40, 48]] * 2))
  close(inside, np.asarray(small), 1e-6)
  assert small.dtype == jnp.float32
  assert small.min() >= 0
  assert small.max() <= 1


def test_eval_view_in_bfloat16_is_that_in_float32():
  """But for its rounding, 2**-8: positions beyond 256 are no bfloat16."""
  image = np.random.default_rng(0).random((300, 400, 3), np.float32)
  want = augment.eval_view(image, size=(224, 320))
  got = augment.eval_view(image, size=(224, 320), dtype=jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(np.float32), want, atol=2**-8)
  half = jnp.asarray(image, jnp.bfloat16)
  got = augment.crop_and_resize(half, np.array([9, 70, 280, 320]), size=224)
  assert got.dtype == jnp.bfloat16
  want = augment.crop_and_resize(
    half.astype(np.float32), np.array([9, 70, 280, 320]), size=224
  )
  np.testing.assert_allclose(got.astype(np.float32), want, atol=2**-7)


def test_eval_view_of_its_own_size_is_the_image():
  images = np.random.default_rng(0).integers(
    0, 256, (2, 32, 32, 1), dtype=np.uint8
  )
  close(augment.eval_view(images, size=32), images / np.float32(255), 1e-6)


def test_dm_pix_agrees():
  close(dm_pix.adjust_contrast(IMAGE, 1.7), augment.adjust_contrast(IMAGE, 1.7))
  for factor in (0.3, 1.9):
    theirs = dm_pix.adjust_saturation(jnp.asarray(IMAGE), factor)
    close(theirs, np.asarray(augment.adjust_saturation(IMAGE, factor)))
  for delta in (-0.5, -0.2, 0.13, 0.5):
    theirs = dm_pix.adjust_hue(jnp.asarray(IMAGE), delta)
    close(theirs, np.asarray(augment.adjust_hue(IMAGE, delta)))
  gray = dm_pix.rgb_to_grayscale(IMAGE, keep_dims=True)
  close(gray, np.asarray(augment.to_grayscale(IMAGE)), 1e-4)
  blur = dm_pix.gaussian_blur(jnp.asarray(IMAGE), 1.3, 7, padding="SAME")
  close(blur, np.asarray(augment.gaussian_blur(IMAGE, 1.3, kernel_size=7)))


def test_every_order_equals_numpy_step_by_step():
  """All 24 orders at once, on values that overshoot as bicubic does."""
  orders = list(itertools.permutations(color.OPS)) * 2
  n, rng = len(orders), np.random.default_rng(0)
  images = rng.uniform(-0.1, 1.1, (n, 5, 6, 3)).astype(np.float32)
  active = np.arange(n) < n - 6
  amounts = {name: rng.uniform(0.2, 1.8, n) for name in color.OPS}
  amounts["hue"] = rng.uniform(-0.2, 0.2, n)
  times = {name: [o.index(name) for o in orders] for name in color.OPS}
  walk = jax.jit(color.jitter)
  for names in (
    list(color.OPS),
    ["brightness", "contrast"],
    ["saturation", "hue", "contrast"],
  ):
    planes = walk(
      [jnp.asarray(images[..., c]) for c in range(3)],
      {k: jnp.float32(amounts[k])[:, None, None] for k in names},
      {k: jnp.float32(times[k])[:, None, None] for k in names},
      jnp.asarray(active)[:, None, None],
    )
    for i, order in enumerate(orders):
      expected = images[i].astype(np.float64)
      for name in order if active[i] else ():
        if name in names:
          expected = oracles.COLOR[name](expected, amounts[name][i])
          expected = expected.clip(0, 1)
      close(jnp.stack(planes, -1)[i], expected)


def test_neutral_amounts_change_nothing():
  images = det.array("neutral", (3, 8, 8, 3), "uniform")
  ones, zeros = jnp.ones(3), jnp.zeros(3)
  close(augment.adjust_brightness(images, ones), images, 0)
  close(augment.adjust_contrast(images, ones), images, 0)
  close(augment.adjust_saturation(images, ones), images, 0)
  close(augment.adjust_hue(images, zeros), images, 1e-6)
  close(augment.adjust_hue(images, ones), images, 1e-6)
  close(augment.gaussian_blur(images, 1.0, kernel_size=1), images, 0)
  whole = augment.crop_and_resize(images, jnp.array([0, 0, 8, 8]), size=8)
  close(whole, images, 0)


def test_amounts_belong_to_their_images():
  """A batch with an amount each is the images one by one."""
  images = det.array("batch", (2, 3, 22, 9, 3), "uniform")
  amounts = np.array([[0.2, 0.9, 1.3], [1.8, 0.5, 1.1]], np.float32)
  boxes = np.array([[[0, 0, 9, 9]] * 3, [[3, 1, 7, 5]] * 3], np.int32)
  ops = {
    **ADJUST,
    "blur": lambda x, a: augment.gaussian_blur(x, a, kernel_size=5),
  }
  for op in ops.values():
    together = op(images, amounts)
    alone = [
      op(images[i, j], amounts[i, j]) for i in range(2) for j in range(3)
    ]
    close(together, np.reshape(alone, images.shape), 1e-6)
    close(jax.vmap(jax.vmap(op))(images, amounts), np.asarray(together), 1e-6)
  together = augment.crop_and_resize(images, boxes, size=(4, 6))
  for i, j in np.ndindex(2, 3):
    one = augment.crop_and_resize(images[i, j], boxes[i, j], size=(4, 6))
    close(one, np.asarray(together[i, j]), 1e-6)


def test_images_may_be_a_list_and_a_size_an_array():
  image = (255 * IMAGE).astype(np.uint8)
  options = {"size": np.array([8, 6])}
  for views_fn in (augment.two_views, augment.crop_flip):
    key = jax.random.key(1)
    together = views_fn(key, np.stack([image, image[::-1]]), size=(8, 6))
    assert together.shape[1:] == (8, 6, 3)
    alone = views_fn(key, [image, image[::-1]], **options)
    np.testing.assert_array_equal(alone, together)
  assert augment.eval_view(image, **options).shape == (8, 6, 3)


@pytest.mark.parametrize("shape", [(2, 1), (3,), (5, 2)])
def test_amounts_of_another_shape_are_refused(shape):
  with pytest.raises(ValueError, match="broadcast"):
    augment.adjust_brightness(
      np.ones((2, 4, 4, 3), np.float32), jnp.ones(shape)
    )


def test_wide_blur_crosses_blocks():
  """Images larger than a block of the band, and smaller than the kernel."""
  for rows, columns, size in ((130, 70, 23), (5, 4, 23), (64, 65, 3)):
    image = det.array("wide", (rows, columns, 1), "uniform")
    ours = augment.gaussian_blur(image, 1.7, kernel_size=size)
    close(ours, oracles.blur(image, 1.7, size // 2))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels(channels):
  images = det.array("channels", (6, 7, channels), "uniform")
  for op in (augment.adjust_brightness, augment.adjust_contrast):
    assert op(images, 1.5).shape == images.shape
  assert augment.gaussian_blur(images, 1.0, kernel_size=3).shape == images.shape
  assert augment.eval_view(images, size=4).shape == (4, 4, channels)
  for name in ("adjust_saturation", "adjust_hue"):
    with pytest.raises(UserError, match=f"{name} got {channels} channels"):
      getattr(augment, name)(images, 0.1)
  with pytest.raises(UserError, match="to_grayscale got"):
    augment.to_grayscale(images)


def test_pixels_outside_the_box_never_leak():
  image = det.array("leak", (12, 13, 2), "uniform")
  box = jnp.array([3, 2, 6, 7])
  spoiled = np.full_like(image, np.float32(1e6))
  spoiled[3:9, 2:9] = image[3:9, 2:9]
  clean = augment.crop_and_resize(image, box, size=10)
  close(augment.crop_and_resize(spoiled, box, size=10), np.asarray(clean), 0)
  close(clean, oracles.resize(image, box, (10, 10)), 1e-5)
  one = augment.crop_and_resize(image, jnp.array([4, 5, 1, 1]), size=3)
  close(one, np.broadcast_to(image[4, 5], (3, 3, 2)), 1e-6)


@pytest.mark.usefixtures("x64")
def test_float64_stays():
  image = det.array("double", (9, 10, 3), "uniform", np.float64)
  for op in ADJUST.values():
    assert op(image, 0.7).dtype == jnp.float64
  assert augment.to_grayscale(image).dtype == jnp.float64
  blur = augment.gaussian_blur(image, 1.3, kernel_size=5)
  close(blur, oracles.blur(image, 1.3, 2), 1e-12)
  box = jnp.array([1, 2, 7, 6])
  views = augment.crop_and_resize(image, box, size=8)
  close(views, oracles.resize(image, box, (8, 8)), 1e-12)
  raw = (image * 255).astype(np.uint8)
  views = augment.eval_view(raw, size=8, dtype=jnp.float64)
  assert views.dtype == jnp.float64
  exact = oracles.resize(raw / 255.0, (0, 1, 9, 9), (8, 8)).clip(0, 1)
  close(views, exact, 1e-12)


def test_signatures():
  """DESIGN's contract: key first, images next, options keyword-only."""
  expected = {
    "adjust_brightness": "images factor",
    "adjust_contrast": "images factor",
    "adjust_saturation": "images factor",
    "adjust_hue": "images delta",
    "to_grayscale": "images",
    "gaussian_blur": "images sigma * kernel_size",
    "crop_and_resize": "images boxes * size",
    "sample_crop_boxes": "key shape * num area_range aspect_range",
    "eval_view": "images * size sizes crop dtype",
    "view_boxes": "key * index sizes area_range aspect_range",
    "two_views": "key images * index sizes size strength brightness contrast "
    "saturation hue jitter_probability gray_probability blur_probability "
    "flip_probability area_range aspect_range dtype",
    "crop_flip": "key images * index sizes size flip_probability area_range "
    "aspect_range dtype",
  }
  assert set(expected) == set(augment.__all__)
  for name, words in expected.items():
    parameters = inspect.signature(getattr(augment, name)).parameters.values()
    got, starred = [], False
    for p in parameters:
      if p.kind is p.KEYWORD_ONLY and not starred:
        got, starred = [*got, "*"], True
      got.append(p.name)
    assert " ".join(got) == words, name


@pytest.mark.parametrize("module", [augment, pixels, crop, color, augment.blur])
def test_examples(module):
  result = doctest.testmod(module)
  assert result.failed == 0
  if module is not pixels:
    assert result.attempted


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_pixels_without_colour_have_values_and_gradients(value, dtype):
  images = jnp.full((2, 4, 4, 3), value, dtype)
  for fn in (augment.adjust_saturation, augment.adjust_hue):
    np.testing.assert_allclose(fn(images, 0.4), images)
    gradient = jax.grad(lambda x, fn=fn: fn(x, 0.4).astype(float).sum())
    assert np.isfinite(gradient(images)).all()


def test_sizes_end_at_the_canvas():
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  key, beyond = jax.random.key(1), jnp.full((2, 2), 40)
  for fn in (
    lambda sizes: augment.two_views(key, images, sizes=sizes, size=8),
    lambda sizes: augment.eval_view(images, sizes=sizes, size=8),
  ):
    np.testing.assert_array_equal(fn(beyond), fn(None))


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: augment.to_grayscale(IMAGES[0, 0]), "images have shape"),
    (lambda: augment.eval_view(IMAGES.astype(np.int32), size=4), "are int32"),
    (lambda: augment.eval_view(IMAGES, size=0), "size is 0"),
    (
      lambda: augment.eval_view(IMAGES, size=4, dtype=jnp.uint8),
      "uint8; views",
    ),
    (
      lambda: augment.two_views(
        jax.random.key(0), IMAGES, size=4, dtype=jnp.int32
      ),
      "int32; views",
    ),
    (lambda: augment.eval_view(IMAGES, size=(4, 4, 3)), "size is"),
    (lambda: augment.eval_view(IMAGES, size=4, crop=1.5), "crop is 1.5"),
    (
      lambda: augment.gaussian_blur(IMAGES, 1.0, kernel_size=-1),
      "kernel_size is -1",
    ),
    (
      lambda: augment.sample_crop_boxes(
        jax.random.key(0), (8, 8), num=1, area_range=(0.5, 0.2)
      ),
      "area_range is",
    ),
    (
      lambda: augment.sample_crop_boxes(
        jax.random.key(0), (8, 8), num=1, area_range=(0.01, 0.05)
      ),
      "no crop covers less",
    ),
    (
      lambda: augment.sample_crop_boxes(
        jax.random.key(0), (8, 8), num=1, aspect_range=(0, 1)
      ),
      "aspect_range is",
    ),
    (
      lambda: augment.sample_crop_boxes(
        jax.random.key(0), (8, 8), num=1, area_range=0.5
      ),
      "augment.area_range is 0.5; expected two numbers",
    ),
    (
      lambda: augment.sample_crop_boxes(
        jax.random.key(0), (8, 8), num=1, aspect_range=(0.5,)
      ),
      r"augment.aspect_range is \(0.5,\); expected two numbers",
    ),
    (
      lambda: augment.sample_crop_boxes(jax.random.key(0), (8, 8), num=-1),
      "num is -1; expected an int >= 0",
    ),
    (
      lambda: augment.gaussian_blur(IMAGE, 1.0, kernel_size=5.5),
      "kernel_size is 5.5; expected an int >= 0",
    ),
    *(
      (lambda size=size: augment.eval_view(IMAGE, size=size), "size is")
      for size in (np.array([8, 8, 8]), np.array([8.5, 8]), (8,), "8", None)
    ),
  ],
)
def test_mistakes_get_one_line(call, message):
  with pytest.raises(UserError, match=message) as caught:
    call()
  assert "\n" not in str(caught.value)
