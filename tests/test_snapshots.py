"""report.npz: every array belongs to the image it is shown with."""

import functools
import json

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from simclr_jax import augment, cli, data, finetune, snapshots, train_state
from simclr_jax.config import set_field

SIDE, VIEW = 12, 8
CROP = {"area_range": (0.2, 0.8), "aspect_range": (0.75, 4 / 3)}
CONFIG = ml_collections.ConfigDict(
  {
    "seed": 3,
    "report": True,
    "augment": CROP,
    "data": {"image_size": VIEW, "split": "train", "eval_split": "test"},
  }
)


class Means:
  """In the place of a network: features are the means of the channels."""

  def apply(self, variables, images, *, train):
    assert not train
    h = images.mean((1, 2))
    return {"h": h, "z": 2 * h, "logits": 9 * h}


def make_dataset(count, *, classes=3, seed=0):
  """Flat colours, each on a part of its canvas, labelled by their colour."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(SIDE // 2, SIDE + 1, (count, 2)).astype(np.int32)
  images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
  labels = rng.integers(0, classes, count).astype(np.int32)
  for image, (height, width), label in zip(images, sizes, labels, strict=True):
    image[:height, :width] = rng.integers(0, 99, 3)
    image[:height, :width, label] += 150
  names = tuple("rgb"[:classes])
  return data.Dataset(images, sizes, labels, names)


TRAIN, TEST = make_dataset(90), make_dataset(150, seed=1)
VIEWS = {
  "two_views": functools.partial(
    augment.two_views, size=VIEW, strength=0.0, gray_probability=0, **CROP
  ),
  "crop_flip": functools.partial(augment.crop_flip, size=VIEW, **CROP),
}


def take(views="two_views", train=TRAIN, test=TEST):
  return snapshots.take(CONFIG, {}, Means(), train, test, VIEWS[views])


@pytest.fixture(scope="module")
def arrays():
  return take()


def test_features_labels_and_thumbnails_belong_together(arrays):
  """150 images make two full programs and a part of one."""
  assert len(arrays["features"]) == 150
  assert arrays["split"] == "test"
  assert list(arrays["label_names"]) == ["r", "g", "b"]
  colours = arrays["thumbnails"].mean((1, 2)) / 255
  assert np.allclose(arrays["features"], colours, atol=1 / 255)
  assert np.array_equal(arrays["labels"], colours.argmax(1))
  assert np.array_equal(arrays["predictions"], arrays["labels"])
  exp = np.exp(9 * arrays["features"])
  expected = (exp / exp.sum(1, keepdims=True)).max(1)
  assert np.allclose(arrays["confidence"], expected, atol=1e-5)
  # In the order of the dataset, each once.
  assert np.array_equal(arrays["labels"], TEST.labels)


@pytest.mark.parametrize("views", ["two_views", "crop_flip"])
def test_views_belong_to_their_originals_and_boxes(arrays, views):
  """Nothing but the crop is random here: the colour tells the original."""
  found = arrays if views == "two_views" else take(views)
  n, count = 12, 2 if views == "two_views" else 1
  assert len(found["originals"]) == n
  assert len(found["views"]) == len(found["boxes"]) == count * n
  for i in range(count * n):
    height, width = found["original_sizes"][i % n]
    original = found["originals"][i % n]
    assert not original[height:].any()
    assert not original[:, width:].any()
    colour = original[:height, :width].mean((0, 1))
    assert np.allclose(found["views"][i].mean((0, 1)), colour, atol=1)
  areas = found["boxes"][:, 2] * found["boxes"][:, 3]
  assert np.all((areas > 0.1) & (areas < 0.95))
  assert np.all(found["boxes"][:, :2] + found["boxes"][:, 2:] <= 1 + 1e-6)


def test_boxes_are_those_of_the_views():
  """A ramp: its mean over a view says where the view was cut out."""
  train = make_dataset(20)
  ramp = np.arange(SIDE, dtype=np.uint8) * 10
  train.images[:] = ramp[:, None, None]
  train.images[..., 1] = ramp
  train.sizes[:] = SIDE
  found = take(train=train)
  top, left, height, width = SIDE * found["boxes"].T
  means = found["views"].mean((1, 2))
  assert np.allclose(means[:, 0], 10 * (top + height / 2 - 0.5), atol=3)
  middle = 10 * (left + width / 2 - 0.5)
  assert np.allclose(means[:, 1], middle, atol=3)
  assert np.ptp(means[:, 0]) > 20  # they differ


def test_pairs_are_the_two_views_of_one_image(arrays):
  first, second = np.split(arrays["z"], 2)
  assert len(first) == len(arrays["z_labels"]) == 64
  assert np.allclose(first, second, atol=0.02)
  assert np.array_equal(first.argmax(1), arrays["z_labels"])
  assert "z" not in take("crop_flip")


def test_few_images_without_evaluation():
  found = take(train=make_dataset(5), test=None)
  assert found["split"] == "train"
  assert len(found["features"]) == len(found["originals"]) == 5
  assert len(found["z"]) == 10


def test_big_images_become_small():
  images = jnp.full((2, 200, 100, 1), 0.5)
  pixels = snapshots._pixels(images, 96)
  assert pixels.shape == (2, 96, 48, 1)
  assert np.unique(pixels).tolist() == [128]


def save(workdir, *, report=True):
  config = ml_collections.ConfigDict(CONFIG.to_dict() | {"report": report})
  state = train_state.TrainState(
    step=0, params={}, batch_stats={}, opt_state=()
  )
  views_fn = VIEWS["crop_flip"]
  snapshots.save(workdir, config, state, Means(), TRAIN, TEST, views_fn)


def test_only_where_it_is_asked_for(tmp_path):
  save(tmp_path, report=False)
  assert not list(tmp_path.iterdir())


def test_a_fault_is_a_warning(tmp_path, capsys):
  save(tmp_path / "gone")
  assert "warning: no report was written" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_ends_with_its_report(tmp_path):
  config = cli.load_recipe("digits,labels=1", stage="finetune")
  tiny = {"num_steps": 2, "scratch.width": 0.0625, "scratch.image_size": 8}
  for name, value in (tiny | {"model.conv": "xla"}).items():
    set_field(config, name, value)
  result = finetune.train_and_evaluate(config, tmp_path)
  text = (tmp_path / "report.html").read_text()
  assert 'class="missing"' not in text
  assert f"{result['top1']:.1%}" in text
  with np.load(tmp_path / "report.npz") as arrays:
    right = np.mean(arrays["predictions"] == arrays["labels"])
  assert right == pytest.approx(result["top1"])
  assert json.loads((tmp_path / "result.json").read_text()) == result
