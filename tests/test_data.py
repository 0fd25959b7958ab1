"""Batches: the order is a pure function of (seed, step) for any hosts.

This file is also a program that a test starts: `python test_data.py DATA OUT`.
"""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import PIL.Image
import pytest

from simclr_jax import build, cli, data, hosts
from simclr_jax import config as config_lib
from simclr_jax.config import UserError
from simclr_jax.data.scan import with_listed_labels
from simclr_jax.sources import Source, make_source, workers


def make_dataset(num_examples, size=2):
  """A dataset in which each pixel and the size of example i tell i."""
  ids = np.arange(num_examples)
  images = np.zeros((num_examples, size, size, 1), np.uint8)
  images += (ids % 251).astype(np.uint8)[:, None, None, None]
  return data.Dataset(
    images=images,
    sizes=np.stack([ids, ids + 1], axis=1).astype(np.int32),
    labels=(ids % 3 - 1).astype(np.int32),
    label_names=("a", "b"),
  )


def ids_of(batch):
  """Which examples of `make_dataset` a batch has; checks all its fields."""
  ids = batch["size"][:, 0]
  np.testing.assert_array_equal(batch["label"], ids % 3 - 1)
  np.testing.assert_array_equal(batch["size"][:, 1], ids + 1)
  np.testing.assert_array_equal(
    batch["image"],
    np.broadcast_to(ids[:, None, None, None] % 251, batch["image"].shape),
  )
  return ids


def stream(num_steps, **kwargs):
  return np.concatenate(
    [data.batch_indices(step=step, **kwargs) for step in range(num_steps)]
  )


# -- order --------------------------------------------------------------------


@pytest.mark.parametrize(
  "num_examples, batch_size",
  [(10, 5), (10, 4), (10, 7), (7, 10), (14, 64), (1, 3), (1437, 256)],
)
def test_epochs_are_permutations(num_examples, batch_size):
  """Each window of N draws from the start is every example once."""
  num_epochs = 2 * batch_size // num_examples + 3
  num_steps = -(-num_epochs * num_examples // batch_size)
  order = stream(
    num_steps, seed=3, batch_size=batch_size, num_examples=num_examples
  )
  assert order.dtype == np.int64
  assert len(order) == num_steps * batch_size
  epochs = order[: num_epochs * num_examples].reshape(num_epochs, -1)
  np.testing.assert_array_equal(
    np.sort(epochs), np.tile(np.arange(num_examples), (num_epochs, 1))
  )
  if num_examples > 5:  # The orders differ.
    assert len({tuple(epoch) for epoch in epochs}) == num_epochs


def test_order_is_the_documented_one():
  order = stream(4, seed=5, batch_size=6, num_examples=8)
  expected = [np.random.default_rng((5, e)).permutation(8) for e in range(3)]
  np.testing.assert_array_equal(order, np.concatenate(expected))


def test_order_depends_on_seed_and_epoch_separately():
  """Epoch 1 of seed 0 is not epoch 0 of seed 1, as it is in some loaders."""
  epochs = {
    tuple(data.batch_indices(seed=s, step=e, batch_size=50, num_examples=50))
    for s in range(4)
    for e in range(4)
  }
  assert len(epochs) == 16


def test_batches_can_be_changed_without_changing_the_order():
  kwargs = {"seed": 0, "step": 0, "batch_size": 4, "num_examples": 4}
  first = data.batch_indices(**kwargs)
  expected = first.copy()
  first[:] = 0
  np.testing.assert_array_equal(data.batch_indices(**kwargs), expected)


# -- training batches ---------------------------------------------------------


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_global_batch_is_the_same_for_any_hosts(process_count):
  dataset = make_dataset(300)
  kwargs = {"seed": 1, "batch_size": 32}
  hosts = [
    data.train_batches(
      dataset,
      **kwargs,
      start_step=0,
      num_steps=25,
      process_index=i,
      process_count=process_count,
    )
    for i in range(process_count)
  ]
  steps = list(zip(*hosts, strict=True))
  assert len(steps) == 25
  for step, parts in enumerate(steps):
    ids = [ids_of(part) for part in parts]
    assert {len(part) for part in ids} == {32 // process_count}
    np.testing.assert_array_equal(
      np.concatenate(ids),
      data.batch_indices(step=step, num_examples=300, **kwargs),
    )


@pytest.mark.parametrize("start_step", [0, 1, 7, 12])
def test_resume_equals_skipping(start_step):
  dataset = make_dataset(23)
  kwargs = {"seed": 4, "batch_size": 8, "num_steps": 12}
  whole = [
    ids_of(b) for b in data.train_batches(dataset, start_step=0, **kwargs)
  ]
  rest = data.train_batches(dataset, start_step=start_step, **kwargs)
  rest = [ids_of(b) for b in rest]
  assert len(rest) == 12 - start_step
  for ids, expected in zip(rest, whole[start_step:], strict=True):
    np.testing.assert_array_equal(ids, expected)


def test_batch_layout():
  batch = next(
    data.train_batches(
      make_dataset(9, size=5), seed=0, batch_size=4, start_step=0, num_steps=1
    )
  )
  assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
    "image": ((4, 5, 5, 1), "uint8"),
    "label": ((4,), "int32"),
    "size": ((4, 2), "int32"),
  }
  assert batch["image"].flags.c_contiguous


@pytest.mark.parametrize("batches", [data.train_batches, data.eval_batches])
def test_batch_must_divide_by_the_hosts(batches):
  """At the call, before any batch is asked for."""
  options = {"seed": 0, "start_step": 0, "num_steps": 1}
  if batches is data.eval_batches:
    options = {}
  with pytest.raises(UserError) as error:
    batches(make_dataset(9), batch_size=10, process_count=4, **options)
  assert str(error.value) == (
    "batch_size is 10; it must be a multiple of the 4 hosts."
  )


@pytest.mark.parametrize("batch_size", [0, -4])
def test_a_batch_of_nothing_is_refused(batch_size):
  dataset = make_dataset(9)
  message = f"^batch_size must be 1 or more, got {batch_size}[.]$"
  with pytest.raises(UserError, match=message):
    data.eval_batches(dataset, batch_size=batch_size)
  with pytest.raises(UserError, match=message):
    data.train_batches(
      dataset, seed=0, batch_size=batch_size, start_step=0, num_steps=1
    )


# -- evaluation batches -------------------------------------------------------


@pytest.mark.parametrize("process_count", [1, 2, 3, 4])
@pytest.mark.parametrize("num_examples", [1, 11, 12, 13, 36, 250])
def test_eval_counts_each_example_once(num_examples, process_count):
  dataset = make_dataset(num_examples)
  hosts = [
    list(
      data.eval_batches(
        dataset, batch_size=12, process_index=i, process_count=process_count
      )
    )
    for i in range(process_count)
  ]
  assert {len(batches) for batches in hosts} == {-(-num_examples // 12)}
  counted = np.zeros(num_examples)
  for batches in hosts:
    for batch in batches:
      assert batch["weight"].shape == (12 // process_count,)
      assert batch["weight"].dtype == np.float32
      np.add.at(counted, ids_of(batch), batch["weight"])
      assert not ids_of(batch)[batch["weight"] == 0].any()
  np.testing.assert_array_equal(counted, 1)
  # On one host they come in their own order, which `embed` relies on.
  if process_count == 1:
    ids = np.concatenate([ids_of(batch) for batch in hosts[0]])
    np.testing.assert_array_equal(ids[:num_examples], np.arange(num_examples))


# -- loading ------------------------------------------------------------------


def source_of(images, labels=None, fails_at=(), reads=None):
  """A source of pixels that are in memory; `reads` counts what was asked."""
  labels = [-1] * len(images) if labels is None else labels

  def read(indices):
    if reads is not None:
      reads.append(len(indices))
    if set(fails_at) & set(indices):
      return [(b"damaged", -1) for _ in indices]
    return [(images[i], int(labels[i])) for i in indices]

  return Source(
    name="arrays",
    split="train",
    num_examples=len(images),
    read=read,
    describe=lambda index: f"image {index}",
    label_names=("a", "b"),
    channels=images[0].shape[-1],
    fingerprint="",
  )


@pytest.mark.parametrize("num_threads", [1, 5])
def test_load_digits(num_threads, monkeypatch):
  monkeypatch.setattr(workers, "num_cores", lambda: num_threads)
  source = make_source("digits", split="train")
  done = []
  dataset = data.load(
    source,
    canvas_size=8,
    progress=lambda n, total: done.append((n, total)),
  )
  images = np.stack([image for image, _ in source.fetch(range(1437))])
  np.testing.assert_array_equal(dataset.images, images)
  np.testing.assert_array_equal(dataset.labels, source.labels)
  np.testing.assert_array_equal(dataset.sizes, 8)
  assert (dataset.labels.dtype, dataset.sizes.dtype) == (np.int32, np.int32)
  assert dataset.label_names == source.label_names
  assert (len(dataset), dataset.num_classes) == (1437, 10)
  assert done == sorted(done)
  assert done[-1] == (1437, 1437)


def test_load_fits_images_to_the_canvas():
  rng = np.random.default_rng(0)
  shapes = [(4, 6), (8, 8), (16, 8), (3, 30), (1, 1)]
  images = [rng.integers(1, 256, (*s, 3)).astype(np.uint8) for s in shapes]
  dataset = data.load(source_of(images, labels=[0, 1, -1, 0, 1]), canvas_size=8)
  np.testing.assert_array_equal(
    dataset.sizes, [(4, 6), (8, 8), (8, 4), (1, 8), (1, 1)]
  )
  np.testing.assert_array_equal(dataset.labels, [0, 1, -1, 0, 1])
  for i, (height, width) in enumerate(dataset.sizes):
    expected = PIL.Image.fromarray(images[i])
    if images[i].shape[:2] != (height, width):
      expected = expected.resize((width, height), PIL.Image.Resampling.BILINEAR)
    canvas = np.zeros((8, 8, 3), np.uint8)
    canvas[:height, :width] = np.array(expected)
    np.testing.assert_array_equal(dataset.images[i], canvas)


def test_load_names_a_damaged_image_and_stops(monkeypatch):
  monkeypatch.setattr(workers, "num_cores", lambda: 1)
  images = [np.zeros((2, 2, 1), np.uint8)] * 300_000
  threads = threading.active_count()
  reads = []
  source = source_of(images, fails_at=[300], reads=reads)
  with pytest.raises(UserError, match=r"\Aimage 256: not a readable image"):
    data.load(source, canvas_size=2)
  assert threading.active_count() == threads
  assert sum(reads) < 150_000, "the rest is not read"


@pytest.mark.parametrize("load", [data.load, data.open_dataset])
def test_what_to_do_at_damage_is_one_of_three(load):
  with pytest.raises(UserError) as error:
    load(source_of([np.zeros((2, 2, 1))]), canvas_size=2, on_error="skipp")
  assert str(error.value) == (
    'on_error must be one of raise, skip, drop; got "skipp"; did you mean '
    '"skip"?'
  )


def test_load_too_much_for_the_memory():
  source = source_of([np.zeros((2, 2, 3), np.uint8)] * 10000)
  with pytest.raises(UserError) as error:
    data.load(source, canvas_size=100_000)
  assert str(error.value).startswith(
    "arrays train takes 279396.8 GiB on a canvas of 100000 pixels, and this "
    "machine has "
  )
  assert str(error.value).endswith(
    "; lower data.canvas_size or take a slice of it."
  )


def test_select():
  dataset = make_dataset(20)
  part = dataset.select(np.array([5, 3, 19]))
  assert len(part) == 3
  assert part.label_names == dataset.label_names
  batch = part.gather(np.array([2, 0]))
  np.testing.assert_array_equal(ids_of(batch), [19, 5])


def test_train_on_prepared_cifar10(shared):
  """Two hosts, the real records: the pixels of the global batches."""
  data_dir = str(shared / "tensorflow_datasets")
  source = make_source("tfds:cifar10", split="train[:2000]", data_dir=data_dir)
  dataset = data.load(source, canvas_size=32)
  assert dataset.images.shape == (2000, 32, 32, 3)
  hosts = [
    data.train_batches(
      dataset,
      seed=0,
      batch_size=64,
      start_step=30,
      num_steps=34,
      process_index=i,
      process_count=2,
    )
    for i in range(2)
  ]
  for step, parts in enumerate(zip(*hosts, strict=True), start=30):
    indices = data.batch_indices(
      seed=0, step=step, batch_size=64, num_examples=2000
    )
    images, labels = zip(*source.fetch(indices), strict=True)
    np.testing.assert_array_equal(
      np.concatenate([part["image"] for part in parts]), images
    )
    np.testing.assert_array_equal(
      np.concatenate([part["label"] for part in parts]), labels
    )


# -- few labels ---------------------------------------------------------------


def unbalanced(seed=0):
  """1,000 labels: 500, 300, 150, 45 and 5 of a class, 200 unknown."""
  labels = np.repeat([-1, 0, 1, 2, 3, 4], [200, 500, 300, 150, 45, 5])
  return np.random.default_rng(seed).permutation(labels)


def test_percent_is_balanced_and_floored():
  labels = np.repeat(np.arange(10), 100)
  for percent, num_chosen in [(1, 10), (1.55, 15), (10, 100), (32.3, 323)]:
    chosen = data.label_subset(labels, percent=percent, seed=0)
    counts = np.bincount(labels[chosen], minlength=10)
    assert counts.sum() == num_chosen
    assert counts.max() - counts.min() <= 1


def test_one_percent_of_imagenet_has_the_official_counts():
  """facts A10: 1%: 189 x 12 + 811 x 13; 10%: 884 x 128 + 116 x 129."""
  labels = np.arange(1_281_167) % 1000
  for percent, counts in [(1, [189, 811]), (10, [884, 116])]:
    chosen = data.label_subset(labels, percent=percent, seed=0)
    per_class = np.bincount(labels[chosen])
    np.testing.assert_array_equal(np.unique_counts(per_class).counts, counts)
    assert per_class.min() == {1: 12, 10: 128}[percent]


@pytest.mark.parametrize("percent", [0.001, 1, 10, 33, 50, 99.9, 100])
def test_percent_of_unbalanced_labels(percent):
  labels = unbalanced()
  chosen = data.label_subset(labels, percent=percent, seed=0)
  assert chosen.dtype == np.int64
  assert (np.diff(chosen) > 0).all(), "sorted, each once"
  counts = np.bincount(labels[chosen] + 1, minlength=6)
  assert counts[0] == 0, "the unlabelled are never chosen"
  assert counts[1:].min() >= 1
  assert counts.sum() == max(5, int(10 * percent))
  # Balanced as long as a class lasts: the others share what is left.
  sizes = np.array([500, 300, 150, 45, 5])
  lasting = counts[1:] < sizes
  assert lasting.any() == (percent < 100)
  if lasting.any():
    assert np.ptp(counts[1:][lasting]) <= 1
    assert (counts[1:] <= counts[1:][lasting].max()).all()


def test_subsets_are_nested_and_seeded():
  labels = unbalanced()
  previous = set()
  for percent in (0.1, 1, 2, 5, 10, 40, 100):
    chosen = set(data.label_subset(labels, percent=percent, seed=7).tolist())
    assert previous <= chosen
    previous = chosen
  assert previous == set(np.flatnonzero(labels >= 0).tolist())
  draws = {
    tuple(data.label_subset(labels, percent=1, seed=seed)) for seed in range(20)
  }
  assert len(draws) == 20
  again = tuple(data.label_subset(labels, percent=1, seed=0))
  assert again in draws


def test_every_label_can_be_drawn():
  """No position in the dataset is preferred."""
  labels = np.array([0, 1] * 20)
  drawn = np.zeros(40)
  for seed in range(400):
    drawn[data.label_subset(labels, per_class=2, seed=seed)] += 1
  # 40 expected each; six standard deviations of a binomial are 36.
  assert drawn.min() > 4
  assert drawn.max() < 76


def test_no_class_is_preferred():
  """Which classes have one label more is drawn, too."""
  labels = np.repeat(np.arange(4), 25)
  more = np.zeros(4)
  for seed in range(40):
    chosen = data.label_subset(labels, percent=6, seed=seed)
    more += np.bincount(labels[chosen]) - 1
  assert more.sum() == 80 and more.min() > 8


def test_per_class():
  labels = unbalanced()
  chosen = data.label_subset(labels, per_class=5, seed=0)
  np.testing.assert_array_equal(np.bincount(labels[chosen]), [5] * 5)
  ten_percent = data.label_subset(labels, percent=10, seed=0)
  assert set(chosen) <= set(ten_percent)


@pytest.mark.parametrize(
  "options, message",
  [
    (
      {"per_class": 6},
      'labels_per_class is 6, but class "4" has 5 labelled images; ask for at '
      "most that many.",
    ),
    (
      {"per_class": 46, "label_names": list("abcde")},
      'labels_per_class is 46, but class "e" has 5 labelled images; ask for at '
      "most that many.",
    ),
    (
      {"per_class": 1, "label_names": list("abcdef")},
      'labels_per_class is 1, but class "f" has 0 labelled images; ask for at '
      "most that many.",
    ),
    ({"per_class": 0}, "labels_per_class is 0; it must be 1 or more."),
    ({"percent": 0}, "label_percent is 0; it must be above 0 and at most 100."),
    (
      {"percent": 101.0},
      "label_percent is 101.0; it must be above 0 and at most 100.",
    ),
  ],
)
def test_label_subset_messages(options, message):
  with pytest.raises(UserError) as error:
    data.label_subset(unbalanced(), seed=0, **options)
  assert str(error.value) == message


def test_label_subset_without_labels():
  with pytest.raises(UserError) as error:
    data.label_subset(np.full(9, -1), percent=10, seed=0)
  assert str(error.value) == "the dataset has no labelled image."


# -- a file of ids ------------------------------------------------------------


def numbered(num_examples=1300):
  """A source of blank images whose ids are n0.jpg, n1.jpg, ..."""
  reads = []

  def read_ids(indices):
    reads.append(len(indices))
    return [(f"n{i}.jpg", i % 3) for i in indices]

  source = Source(
    name="tfds:numbered",
    split="train",
    num_examples=num_examples,
    read=lambda indices: [
      (np.full((4, 4, 1), i % 251, np.uint8), i % 3) for i in indices
    ],
    describe=str,
    label_names=("a", "b", "c"),
    channels=1,
    fingerprint="numbered",
    read_ids=read_ids,
  )
  return source, reads


def test_labels_of_listed_ids_alone(tmp_path):
  source, reads = numbered()
  (tmp_path / "ids.txt").write_text("n1299.jpg\n n7.jpg\n\nn512.jpg\r\n")
  options = {"cache_dir": tmp_path / "cache"}
  listed = with_listed_labels(source, tmp_path / "ids.txt", **options)
  expected = np.full(1300, -1)
  expected[[7, 512, 1299]] = 7 % 3, 512 % 3, 1299 % 3
  np.testing.assert_array_equal(listed.labels, expected)
  assert [label for _, label in listed.fetch([6, 7])] == [-1, 1]
  assert listed.fingerprint != source.fingerprint
  # All records are read once, and kept by source and ids.
  assert sum(reads) == 1300
  again = with_listed_labels(source, tmp_path / "ids.txt", **options)
  np.testing.assert_array_equal(again.labels, expected)
  assert sum(reads) == 1300
  (tmp_path / "ids.txt").write_text("n8.jpg")
  other = with_listed_labels(source, tmp_path / "ids.txt", **options)
  assert np.flatnonzero(other.labels >= 0).tolist() == [8]
  # A selection keeps its ids.
  part = source.select(np.array([8, 5]))
  other = with_listed_labels(part, tmp_path / "ids.txt")
  assert other.labels.tolist() == [2, -1]


@pytest.mark.parametrize(
  "text, message",
  [
    (
      None,
      "data.label_ids: {file} cannot be read (No such file or directory).",
    ),
    (" \n", "data.label_ids: {file} is empty; write an id a line."),
    (
      "n3.jpg\nn4.JPEG\nx\n",
      "2 of the 3 ids in data.label_ids are not in tfds:numbered train, such "
      'as "n4.JPEG"; its ids look like "n0.jpg".',
    ),
  ],
)
def test_messages_of_a_file_of_ids(text, message, tmp_path):
  file = tmp_path / "ids.txt"
  if text is not None:
    file.write_text(text)
  with pytest.raises(UserError) as error:
    with_listed_labels(numbered()[0], file, cache_dir=tmp_path)
  assert str(error.value) == message.format(file=file)
  assert not list(tmp_path.glob("labels*"))


def test_a_file_of_ids_needs_ids(tmp_path):
  (tmp_path / "ids.txt").write_text("7\n")
  with pytest.raises(UserError) as error:
    with_listed_labels(
      make_source("digits", split="train"), tmp_path / "ids.txt"
    )
  assert str(error.value) == (
    "data.label_ids is given, but the records of digits have no ids."
  )


# -- real processes -----------------------------------------------------------


def quarter_epoch(data_dir, output):
  """Hashes of the rows of a quarter epoch: of this process, as it trains."""
  hosts.initialize()
  config = cli.load_recipe("cifar10", stage="pretrain")
  fields = {"data.data_dir": data_dir, "data.eval_split": ""}
  # Streamed: a quarter of the images is decoded, not all.
  for name, value in (fields | {"data.memory_gib": 1e-9}).items():
    config_lib.set_field(config, name, value)
  build.resolve(config)
  train, _ = data.open_splits(config, output)
  num_steps = len(train) // 4 // config.batch_size
  rows = [
    [
      hashlib.sha256(b"%d " % label + image.tobytes()).hexdigest()
      for image, label in zip(batch["image"], batch["label"], strict=True)
    ]
    for batch in build.host_batches(config, train, num_steps)(0)
  ]
  file = f"{output}/{jax.process_index()}.json"
  pathlib.Path(file).write_text(json.dumps(rows))


@pytest.mark.slow
def test_the_cifar10_recipe_on_one_and_two_processes(shared, tmp_path):
  """Both see the same images in the same order, and each its half of them."""
  data_dir = str(shared / "tensorflow_datasets")
  streams = {}
  for count in (1, 2):
    output = tmp_path / str(count)
    output.mkdir()
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    children = [
      subprocess.Popen(
        [sys.executable, __file__, data_dir, str(output)],
        env=os.environ
        | {
          "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
          "JAX_NUM_PROCESSES": str(count),
          "JAX_PROCESS_ID": str(i),
          "XLA_FLAGS": "",
        },
      )
      for i in range(count)
    ]
    assert [child.wait(timeout=300) for child in children] == [0] * count
    parts = [
      json.loads((output / f"{i}.json").read_text()) for i in range(count)
    ]
    streams[count] = [
      [row for part in step for row in part]
      for step in zip(*parts, strict=True)
    ]
    assert {len(part[0]) for part in parts} == {512 // count}
  assert streams[1] == streams[2]
  assert [len(step) for step in streams[1]] == [512] * 24
  # A quarter of one epoch: (nearly, as 50,000 images hold twins) no repeats.
  assert len({row for step in streams[1] for row in step}) > 24 * 512 - 20


if __name__ == "__main__":
  quarter_epoch(*sys.argv[1:])
