"""A student uses no label that its teacher never had, whatever is damaged."""

import dataclasses
import itertools

import numpy as np
import pytest
from test_folder import open_tree, write_tree

from simclr_jax import build, cli, data, distill, finetune
from simclr_jax.config import set_field

NUM = 60
DAMAGED = range(2, NUM, 5)


@pytest.fixture(scope="module", params=["part", "all"])
def tree(request, tmp_path_factory):
  """60 images, 12 of them damaged, a part of them or all labelled."""
  files = {f"{i:02}.png": 4 * i for i in range(NUM)}
  files |= {f"{i:02}.png": b"damaged" for i in DAMAGED}
  labelled = [i for i in range(NUM) if request.param == "all" or i % 3]
  lines = [f"{i:02}.png,{'abc'[i * i % 7 % 3]}" for i in labelled]
  files["labels.csv"] = "\n".join(["file,label", *lines])
  return write_tree(tmp_path_factory.mktemp(request.param), files)


def pairs(batch):
  """What is learned: {(pixels, label)} of the labelled."""
  return {
    (image.tobytes(), int(label))
    for image, label in zip(batch["image"], batch["label"], strict=True)
    if label >= 0
  }


@pytest.fixture
def given(tree, tmp_path, monkeypatch):
  """given(stage, ...) -> all examples that the stage would train on."""
  taught = {}
  number = itertools.count()

  def stop(config, train):
    taught[config.stage] = config
    raise KeyboardInterrupt(train)

  def load_teacher(config):
    used = build.label_choice(taught["finetune"])
    about = {"label_names": ["a", "b", "c"], "labels_used": used, "hash": ""}
    return taught["finetune"], variables, about | {"step": 1}

  kernel = {"kernel": np.zeros((3, 3, 3, 4))}
  variables = {"params": {"encoder": {"stem": {"conv_1": kernel}}}}
  monkeypatch.setattr(build, "check_views", stop)
  monkeypatch.setattr(distill, "load_teacher", load_teacher)

  def given(stage, **fields):
    name = stage.__name__.rpartition(".")[2]
    config = cli.load_recipe("folder", stage=name)
    for field, value in {
      "batch_size": 8,
      "num_steps": 1,
      "report": False,
      "data.name": f"folder:{tree}",
      "data.on_error": "skip",
      "data.eval_split": "",
      "data.canvas_size": 8,
      "data.image_size": 8,
      **fields,
    }.items():
      set_field(config, field, value)
    with pytest.raises(KeyboardInterrupt) as stopped:
      stage.train_and_evaluate(config, tmp_path / f"{next(number)}")
    (train,) = stopped.value.args
    return train.gather(np.arange(len(train)))

  return given


MEMORY = {"data.memory_gib": 0.0}
STREAMED = {"data.memory_gib": 1e-9}


@pytest.mark.parametrize("where", [MEMORY, STREAMED], ids=["memory", "stream"])
@pytest.mark.parametrize(
  "student", [MEMORY, STREAMED], ids=["memory", "stream"]
)
@pytest.mark.parametrize(
  "choice, fraction",
  [
    ({"label_percent": 20.0}, 0.0),
    ({"label_percent": 30.0}, 0.25),
    ({"labels_per_class": 4, "label_percent": 100.0}, 0.0),
    ({"label_percent": 100.0}, 0.25),
  ],
)
def test_no_label_but_the_teachers(given, where, student, choice, fraction):
  """Also of another seed, and where one is streamed and the other is not."""
  split = {"data.eval_fraction": fraction}
  teacher = given(finetune, **where, **choice, **split)
  assert (teacher["label"] >= 0).all()
  assert teacher["replaced"].any()
  known = pairs(teacher)
  for seed in (0, 1):
    split["seed"] = seed
    every = given(distill, **student, **split, **{"loss.label_weight": 0.5})
    alone = given(distill, **student, **split, only_labelled=True)
    assert len(alone["label"]) == len(teacher["label"])
    assert pairs(every) == pairs(alone) == known
    assert {image.tobytes() for image in alone["image"]} == {
      image for image, _ in known
    }


@pytest.mark.parametrize("choice", [{"label_percent": 20.0}, {}])
def test_the_teachers_are_those_from_memory_or_streamed(given, choice):
  for name, array in given(finetune, **MEMORY, **choice).items():
    np.testing.assert_array_equal(
      array, given(finetune, **STREAMED, **choice)[name]
    )


def test_labels_that_come_with_the_records(tree):
  """A damaged image has its own to choose from, as where they are known."""
  known = open_tree(tree)
  source = dataclasses.replace(known, labels=None)
  in_memory, streamed = [
    data.open_dataset(source, canvas_size=8, memory_gib=gib, on_error="skip")
    for gib in (0.0, 1e-9)
  ]
  np.testing.assert_array_equal(in_memory.listed, known.labels)
  np.testing.assert_array_equal(streamed.listed, known.labels)
  assert (in_memory.labels != known.labels).any()
  hidden = np.where(np.arange(NUM) < 30, known.labels, -1)
  indices = np.array([7, 2, 50, 12, 7, 1])
  changed = [d.with_labels(hidden) for d in (in_memory, streamed)]
  for a, b in (changed, [d.select(indices) for d in changed]):
    every = np.arange(len(a))
    np.testing.assert_array_equal(a.listed, b.listed)
    for name, array in a.gather(every).items():
      np.testing.assert_array_equal(array, b.gather(every)[name])
