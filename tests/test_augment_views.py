"""The pipelines: two_views, crop_flip, and the law of what they draw.

golden/augment_stats.json holds means, standard errors, deviations and quantiles
of many draws of the official code (google-research/simclr, tf2/data_util.py at
commit 383d414 on TF 2.21.0), a part of the project's reference data. The seeds
here are fixed: a test that passes once passes always.
"""

import functools
import json

import det
import jax
import jax.numpy as jnp
import numpy as np
import oracles_augment as oracles
import pytest
import scipy.stats

from simclr_jax import augment
from simclr_jax.augment import color
from simclr_jax.config import UserError

KEY = jax.random.key(3)
CANVAS, SIZE = 28, 24  # the smallest views that are blurred: radius 1
INDEX = np.array([7, 0, 1023, 12, 5, 4, 3, 2], np.int32)
SIZES = np.array(
  [[28, 28], [20, 28], [28, 13], [9, 9], [17, 23], [28, 20], [1, 1], [5, 27]],
  np.int32,
)
IMAGES = np.random.default_rng(0).integers(
  0, 256, (8, CANVAS, CANVAS, 3), dtype=np.uint8
)


@functools.cache
def jitted(fn=augment.two_views, **options):
  return jax.jit(functools.partial(fn, size=SIZE, **options))


def views_of(images=IMAGES, *, key=KEY, index=INDEX, sizes=SIZES, **options):
  index, sizes = jnp.asarray(index), jnp.asarray(sizes)
  return np.asarray(
    jitted(**options)(key, jnp.asarray(images), index=index, sizes=sizes)
  )


def rows(views, chosen):
  """Those images' views, both."""
  return views.reshape(2, -1, *views.shape[1:])[:, chosen].reshape(
    -1, *views.shape[1:]
  )


def expected_view(image, box, draw, *, size, options):
  """One view in float64 NumPy, from the box and the uniforms that it drew."""
  o = {
    "strength": 1.0,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "jitter_probability": 0.8,
    "gray_probability": 0.2,
    "blur_probability": 0.5,
    "flip_probability": 0.5,
  } | options
  draw = {k: v.astype(np.float64) for k, v in draw.items()}
  view = oracles.resize(image / 255, box, (size, size))
  if draw["flip"] < o["flip_probability"]:
    view = view[:, ::-1]
  if draw["jitter"] < o["jitter_probability"]:
    names = list(color.OPS)
    for i in np.argsort(draw["time"]):
      amount, unit = o["strength"] * o[names[i]], draw["amount"][i]
      low, high = max(1 - amount, 0), 1 + amount
      if names[i] == "hue":
        low, high = -amount, amount
      view = oracles.COLOR[names[i]](view, low + (high - low) * unit)
      view = view.clip(0, 1)
  if draw["gray"] < o["gray_probability"]:
    view = oracles.gray(view)
  view = view.clip(0, 1)
  if draw["blur"] < o["blur_probability"]:
    sigma = 0.1 + 1.9 * draw["sigma"]
    view = oracles.blur(view, sigma, size // 10 // 2).clip(0, 1)
  return view


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "options",
  [{}, {"strength": 0.5, "brightness": 3.0, "blur_probability": 1.0}],
)
def test_two_views_equal_numpy_step_by_step(options):
  views = views_of(dtype="float64", **options)
  assert views.dtype == np.float64
  draws = augment._draw(KEY, INDEX, 2)
  boxes = augment.view_boxes(KEY, index=INDEX, sizes=SIZES).reshape(2, 8, 4)
  seen = {name: set() for name in ("flip", "jitter", "gray", "blur")}
  for v, i in np.ndindex(2, 8):
    draw = {k: np.asarray(x[v, i]) for k, x in draws.items()}
    expected = expected_view(
      IMAGES[i], boxes[v, i], draw, size=SIZE, options=options
    )
    np.testing.assert_allclose(
      views.reshape(2, 8, SIZE, SIZE, 3)[v, i], expected, rtol=0, atol=1e-9
    )
    for name, got in seen.items():
      got.add(bool(draw[name] < 0.5))
  assert all(got == {True, False} for got in seen.values())


def test_float32_follows_float64():
  with jax.enable_x64(True):
    exact = views_of(dtype="float64")
  views = views_of()
  assert views.dtype == np.float32
  np.testing.assert_allclose(views, exact, rtol=0, atol=2e-5)
  half = augment.crop_flip(KEY, IMAGES, size=SIZE, dtype=jnp.bfloat16)
  assert half.dtype == jnp.bfloat16


def test_a_row_depends_on_key_and_index_alone():
  """Any order, any part, any division into chunks: the same views."""
  views = views_of()
  assert views.shape == (16, SIZE, SIZE, 3)
  assert views.min() >= 0
  assert views.max() <= 1
  order = np.random.default_rng(1).permutation(8)

  def same(parts, tolerance, **options):
    whole = views_of(**options)
    for part in parts:
      views = views_of(
        IMAGES[part], index=INDEX[part], sizes=SIZES[part], **options
      )
      np.testing.assert_allclose(
        views, rows(whole, part), rtol=0, atol=tolerance
      )

  same([order], 0)
  # XLA sums a mean, contrast's, in another order in smaller batches.
  same(np.split(order, 4), 1e-6)
  same(np.split(order, 4), 0, contrast=0.0, saturation=0.0, hue=0.0)
  # Other pixels elsewhere in the batch change nothing here.
  other = IMAGES.copy()
  other[1:] = 255 - other[1:]
  np.testing.assert_array_equal(rows(views_of(other), [0]), rows(views, [0]))
  # Key and index do matter, and so does the view.
  assert not np.array_equal(views_of(key=jax.random.key(4)), views)
  moved = views_of(index=INDEX + 1)
  assert not any(
    np.array_equal(a, b) for a, b in zip(moved, views, strict=True)
  )
  assert not np.array_equal(views[0], views[8])


def test_views_and_images_share_no_draw():
  for name, u in augment._draw(KEY, jnp.arange(8), 2).items():
    assert np.all(u[0] != u[1]), name
    assert np.all(u[:, 1:] != u[:, :-1]), name


def test_devices_and_vmap_make_the_same_views():
  views, n = views_of(), jax.device_count()
  assert n == 8
  split = jax.pmap(jitted(), in_axes=(None, 0))
  with jax.default_device(jax.devices()[0]):
    parts = split(
      KEY,
      IMAGES.reshape(8, 1, *IMAGES.shape[1:]),
      index=INDEX.reshape(8, 1),
      sizes=SIZES.reshape(8, 1, 2),
    )
  parts = np.asarray(parts).swapaxes(0, 1).reshape(views.shape)
  np.testing.assert_allclose(parts, views, rtol=0, atol=1e-6)
  keys = jax.random.split(KEY, 2)
  mapped = jax.vmap(jitted(), in_axes=(0, None))(keys, jnp.asarray(IMAGES))
  for key, part in zip(keys, mapped, strict=True):
    alone = views_of(key=key, index=np.arange(8), sizes=[[CANVAS] * 2] * 8)
    np.testing.assert_allclose(part, alone, rtol=0, atol=1e-6)


def test_jit_equals_eager():
  eager = augment.two_views(KEY, IMAGES, index=INDEX, sizes=SIZES, size=SIZE)
  np.testing.assert_allclose(eager, views_of(), rtol=0, atol=2e-5)


def test_nothing_outside_the_image_leaks():
  spoiled = np.random.default_rng(2).integers(
    0, 256, IMAGES.shape, dtype=np.uint8
  )
  for image, canvas, (height, width) in zip(
    IMAGES, spoiled, SIZES, strict=True
  ):
    canvas[:height, :width] = image[:height, :width]
  np.testing.assert_array_equal(views_of(spoiled), views_of())
  # The canvas is as good as an image of exactly that size.
  i = 4
  height, width = SIZES[i]
  exact = augment.two_views(
    KEY, IMAGES[i : i + 1, :height, :width], index=INDEX[i : i + 1], size=SIZE
  )
  np.testing.assert_allclose(exact, rows(views_of(), [i]), atol=1e-6)


def test_what_is_off_changes_no_other_draw():
  plain = {"strength": 0.0, "gray_probability": 0.0, "blur_probability": 0.0}
  views = views_of(**plain)
  flips = jitted(augment.crop_flip)(
    KEY, jnp.asarray(IMAGES), index=INDEX, sizes=SIZES
  )
  np.testing.assert_allclose(flips, views[:8], atol=1e-6)
  boxes = augment.view_boxes(KEY, index=INDEX, sizes=SIZES)
  still = views_of(**plain, flip_probability=0.0)
  mirrored = 0
  for i in range(16):
    crop = oracles.resize(IMAGES[i % 8] / 255, boxes[i], (SIZE, SIZE))
    np.testing.assert_allclose(still[i], crop.clip(0, 1), atol=1e-5)
    mirrored += not np.allclose(views[i], still[i], atol=1e-5)
    same = (
      views[i]
      if np.allclose(views[i], still[i], atol=1e-5)
      else (views[i][:, ::-1])
    )
    np.testing.assert_allclose(same, still[i], atol=1e-5)
  assert 2 < mirrored < 14


def test_whole_box_at_strength_0_is_the_image():
  views = augment.two_views(
    KEY,
    IMAGES,
    size=CANVAS,
    strength=0.0,
    gray_probability=0,
    blur_probability=0,
    flip_probability=0,
    area_range=(1.0, 1.0),
    aspect_range=(1.0, 1.0),
  )
  images = IMAGES / np.float32(255)
  np.testing.assert_allclose(views, np.concatenate([images] * 2), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_skip_what_needs_rgb(channels):
  images = np.repeat(IMAGES[:3, :, :, :1], channels, axis=-1)
  options = {"gray_probability": 1.0, "index": INDEX[:3], "size": SIZE}
  views = augment.two_views(KEY, images, **options)
  assert views.shape == (6, SIZE, SIZE, channels)
  again = augment.two_views(KEY, images, **options, saturation=0, hue=0)
  np.testing.assert_array_equal(views, again)
  flips = augment.crop_flip(KEY, images, index=INDEX[:3], size=SIZE)
  assert flips.shape == (3, SIZE, SIZE, channels)
  if channels == 1:  # brightness and contrast do act: the gray of RGB
    rgb = augment.two_views(
      KEY, np.repeat(images, 3, -1), **options, saturation=0, hue=0
    )
    np.testing.assert_allclose(rgb[..., :1], views, atol=2e-4)  # luma .9999


@pytest.mark.parametrize(
  "options, message",
  [
    ({"strength": -1.0}, "augment.strength is -1.0"),
    ({"strength": 1.3}, "augment.contrast 0.8 times augment.strength 1.3 is"),
    ({"saturation": 1.1}, "augment.saturation 1.1"),
    ({"strength": float("nan")}, "augment.strength is nan"),
    ({"hue": 0.6}, "augment.hue 0.6"),
    ({"brightness": -0.1}, "augment.brightness -0.1"),
    ({"jitter_probability": 1.5}, "augment.jitter_probability is 1.5"),
    ({"gray_probability": -0.5}, "augment.gray_probability"),
    ({"blur_probability": 2}, "augment.blur_probability"),
    ({"flip_probability": 2}, "augment.flip_probability"),
    ({"area_range": (0.0, 1.0)}, "augment.area_range"),
    ({"area_range": (0.2, 1.1)}, "augment.area_range"),
    ({"aspect_range": (1.4, 0.7)}, "augment.aspect_range"),
    ({"size": 0}, "size is 0"),
    ({"images": IMAGES[0]}, "expected a batch"),
    ({"images": IMAGES.astype(np.int32)}, "images are int32"),
    ({"index": np.arange(3)}, r"index has shape \(3,\); expected \(8,\)"),
    ({"sizes": np.ones((3, 2), int)}, "sizes has shape"),
  ],
)
def test_mistakes_get_one_line(options, message):
  options = {"images": IMAGES, "size": SIZE} | options
  images = options.pop("images")
  with pytest.raises(UserError, match=message) as caught:
    jax.eval_shape(
      lambda key: augment.two_views(key, images, **options), jax.random.key(0)
    )
  assert "\n" not in str(caught.value)


# What many draws look like.


@pytest.fixture(scope="module")
def stats(golden):
  return json.loads(golden("augment_stats.json").read_text())


def same_law(ours, theirs, *, quantiles=True):
  """Mean within 3 standard errors, spread and quantiles likewise."""
  ours, n = np.asarray(ours, np.float64), theirs["n"]
  error = np.hypot(ours.std() / len(ours) ** 0.5, theirs["se"])
  assert abs(ours.mean() - theirs["mean"]) <= 3 * error
  center = ours - ours.mean()
  if "std" in theirs and ours.std():
    kurtosis = (center**4).mean() / ours.var() ** 2
    error = ours.std() * np.sqrt((kurtosis - 1) / 4 * (1 / len(ours) + 1 / n))
    assert abs(ours.std() - theirs["std"]) <= 3 * error
  for name, value in theirs.items():
    if name[0] == "q" and quantiles:
      p = int(name[1:]) / 100
      slack = 3.5 * np.sqrt(p * (1 - p) * (1 / len(ours) + 1 / n))
      assert (ours < value - 1e-6).mean() - slack <= p, name
      assert p <= (ours < value + 1e-6).mean() + slack, name


@pytest.mark.parametrize(
  "shape", ["224x224", "32x32", "48x64", "375x500", "600x200", "96x128"]
)
def test_boxes_have_the_official_law(stats, shape):
  rows, columns = (int(s) for s in shape.split("x"))
  theirs, n = stats["boxes"][shape], 20_000
  boxes = np.asarray(
    augment.sample_crop_boxes(jax.random.key(rows), (rows, columns), num=n)
  )
  assert boxes.dtype == np.int32
  top, left, height, width = boxes.T
  assert (boxes >= 0).all()
  assert (top + height <= rows).all()
  assert (left + width <= columns).all()
  free_y, free_x = rows - height, columns - width
  ours = {
    "height": height,
    "width": width,
    "area_fraction": height * width / (rows * columns),
    "sqrt_area_fraction": np.sqrt(height * width / (rows * columns)),
    "aspect_w_over_h": width / height,
    "log_aspect_w_over_h": np.log(width / height),
    "full_image_fraction": (free_y == 0) & (free_x == 0),
    "offset_y_over_slack": (top / np.maximum(free_y, 1))[free_y > 0],
    "offset_x_over_slack": (left / np.maximum(free_x, 1))[free_x > 0],
  }
  for name, values in ours.items():
    same_law(values, theirs[name])
  assert ours["area_fraction"].min() >= 0.1
  # The last position on a side is never used.
  assert not ((top == free_y) & (free_y > 0)).any()
  assert not ((left == free_x) & (free_x > 0)).any()

  rng = np.random.default_rng(rows)
  oracle = np.array(
    [oracles.crop_box(rng, rows, columns) for _ in range(n // 4)]
  )
  for i in range(4):
    assert scipy.stats.ks_2samp(boxes[:, i], oracle[:, i]).pvalue > 0.01
  area = oracle[:, 2] * oracle[:, 3]
  assert scipy.stats.ks_2samp(height * width, area).pvalue > 0.01
  aspect = oracle[:, 3] / oracle[:, 2]
  assert scipy.stats.ks_2samp(width / height, aspect).pvalue > 0.01


def test_boxes_of_odd_shapes():
  """A row each; tiny and extreme images get the whole or a legal box."""
  shapes = np.array([[1, 1], [1, 50], [3, 2], [400, 20], [10, 3000]] * 40)
  boxes = augment.sample_crop_boxes(KEY, shapes, num=len(shapes))
  top, left, height, width = np.asarray(boxes).T
  rows, columns = shapes.T
  assert (top >= 0).all()
  assert (left >= 0).all()
  assert (height > 0).all()
  assert (width > 0).all()
  assert (top + height <= rows).all()
  assert (left + width <= columns).all()
  thin = columns == 3000  # no legal box: the whole image
  assert (height[thin] == 10).all()
  assert (width[thin] == 3000).all()


def statistics(views):
  """Per view, named as in the reference data."""
  views = np.asarray(views, np.float64)
  axes = (1, 2, 3)
  return {
    "brightness": views.mean(axes),
    "pixel_std": views.std(axes),
    "chroma": (views.max(-1) - views.min(-1)).mean((1, 2)),
    "fraction_at_0": (views <= 0).mean(axes),
    "fraction_at_1": (views >= 1).mean(axes),
    "gray_fraction": np.ptp(views, axis=-1).max((1, 2)) < 1e-6,
    **{f"mean_{c}": views[..., i].mean((1, 2)) for i, c in enumerate("rgb")},
  }


def draw_many(image, *, num, chunk=200, **options):
  images = jnp.broadcast_to(jnp.asarray(image), (chunk, *image.shape))
  fn = jax.jit(
    functools.partial(
      augment.two_views, size=32, blur_probability=0.0, **options
    )
  )
  return np.concatenate(
    [
      fn(jax.random.key(1), images, index=i + jnp.arange(chunk))
      for i in range(0, num, chunk)
    ]
  )


BLOCKS = det.array("aug/dist_96x128", (96, 128, 3), "blocks")


@pytest.mark.parametrize(
  "strength", [pytest.param("0.5", marks=pytest.mark.slow), "1"]
)
def test_jitter_has_the_official_law(stats, strength):
  views = draw_many(
    BLOCKS[::3, ::4],
    num=2000,
    strength=float(strength),
    jitter_probability=1.0,
    gray_probability=0.0,
    flip_probability=0.0,
    area_range=(1.0, 1.0),
    aspect_range=(1.0, 1.0),
  )
  theirs = stats[f"color_jitter_only_strength{strength}"]
  for name, values in statistics(views).items():
    same_law(values, theirs[name])


@pytest.mark.parametrize(
  "case",
  [
    "no_color",
    "strength0.5",
    pytest.param("strength1.0", marks=pytest.mark.slow),
  ],
)
def test_the_pipeline_has_the_official_law(stats, case):
  options = {"strength": 0.0, "gray_probability": 0.0}
  if case != "no_color":
    options = {"strength": float(case.removeprefix("strength"))}
  views = draw_many(BLOCKS, num=2000, **options)
  for name, values in statistics(views).items():
    same_law(values, stats[f"train_{case}"][name])


def test_flips_and_blurs_are_as_frequent_as_official(stats):
  image = np.zeros((20, 20, 3), np.float32)
  image[8, 4] = 1  # where a flip and the radius 1 of a blur show
  views = augment.two_views(
    jax.random.key(2),
    jnp.broadcast_to(image, (1000, *image.shape)),
    size=20,
    strength=0.0,
    gray_probability=0.0,
    area_range=(1.0, 1.0),
    aspect_range=(1.0, 1.0),
  )[..., 0]
  same_law(views[:, 8, 15] > views[:, 8, 4], stats["flip_fraction"])
  beside = np.maximum(views[:, 7, 4], views[:, 7, 15])
  same_law(beside > 0, stats["blurred_fraction"])


def test_brightness_has_the_official_factors(stats):
  views = augment.two_views(
    jax.random.key(3),
    jnp.full((1000, 8, 8, 3), 0.25),
    size=8,
    jitter_probability=1.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    gray_probability=0.0,
  )
  factors = np.asarray(views, np.float64)[:, 0, 0, 0] / 0.25
  same_law(factors, stats["brightness_factor"])
  assert 0.2 - 1e-6 <= factors.min() < 0.21
  assert 1.79 < factors.max() <= 1.8 + 1e-6


def test_every_entry_of_the_reference_is_compared(stats, shared):
  """In both official codes, all but the additive brightness of SimCLRv1."""
  with open(shared / "golden" / "d_stats.json") as file:
    reference = json.load(file)
  names = {
    "boxes": "sample_distorted_bounding_box",
    "blurred_fraction": "batch_random_blur",
    "brightness_factor": "brightness_factor_max_delta0.8",
  }
  kept = {names.get(name, name) for name in stats}
  others = {"color_jitter_only_strength1_simclrv1", "color_jitter_input"}
  assert kept | others == set(reference["tf1"]) == set(reference["tf2"])
  for shape, entries in reference["tf1"][names["boxes"]].items():
    # Two runs of the official sampler differ as ours does from each.
    for name, entry in entries.items():
      if isinstance(entry, dict):
        ours = stats["boxes"][shape][name]
        error = np.hypot(ours["se"], entry["se"])
        assert abs(ours["mean"] - entry["mean"]) <= 4 * error
