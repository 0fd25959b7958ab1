"""Streamed datasets, damaged images, and what is kept on disk."""

import dataclasses
import gc
import os
import threading
import time

import numpy as np
import pytest
from test_folder import open_tree, write_tree
from test_sources import encode, photo

from simclr_jax import data
from simclr_jax.config import UserError
from simclr_jax.data import cache, memory, stream
from simclr_jax.sources import make_source


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """40 images of many shapes in two classes; 5 of them are damaged."""
  rng = np.random.default_rng(0)
  files = {}
  for i in range(40):
    shape = rng.integers(1, 20, 2)
    files[f"{'ab'[i % 2]}/{i:02}.png"] = encode(photo(*shape))
  for i in (3, 4, 17, 20, 39):
    files[f"{'ab'[i % 2]}/{i:02}.png"] = b"damaged"
  return write_tree(tmp_path_factory.mktemp("tree"), files)


@pytest.fixture(scope="module")
def good(tree):
  """The source of the 35 good ones."""
  source = open_tree(tree)
  bad = ("03", "04", "17", "20", "39")
  indices = [i for i in range(40) if source.describe(i)[-6:-4] not in bad]
  return source.select(indices)


def tiny_budget(source, **options):
  dataset = data.open_dataset(source, canvas_size=8, memory_gib=1e-9, **options)
  assert isinstance(dataset, data.Streamed)
  return dataset


def assert_same(batch, expected):
  assert batch.keys() == expected.keys()
  for name, array in batch.items():
    assert array.dtype == expected[name].dtype, name
    np.testing.assert_array_equal(array, expected[name], err_msg=name)


# -- streamed = in memory -----------------------------------------------------


def test_batches_are_those_from_memory(good):
  in_memory = data.open_dataset(good, canvas_size=8)
  assert isinstance(in_memory, data.Dataset)
  streamed = tiny_budget(good)
  assert len(streamed) == 35
  for field in ("label_names", "num_classes", "channels"):
    assert getattr(streamed, field) == getattr(in_memory, field)
  np.testing.assert_array_equal(streamed.labels, in_memory.labels)
  options = {"seed": 1, "batch_size": 16, "start_step": 3, "num_steps": 9}
  for index in range(2):
    host = {"process_index": index, "process_count": 2}
    pairs = zip(
      data.train_batches(streamed, **options, **host),
      data.train_batches(in_memory, **options, **host),
      strict=True,
    )
    for batch, expected in pairs:
      assert_same(batch, expected)
  pairs = zip(
    data.eval_batches(streamed, batch_size=16),
    data.eval_batches(in_memory, batch_size=16),
    strict=True,
  )
  for batch, expected in pairs:
    assert_same(batch, expected)


def test_selected_and_relabelled(good):
  indices = np.array([30, 2, 2, 9])
  labels = np.arange(35, dtype=np.int32) % 3 - 1
  for change in (
    lambda dataset: dataset.select(indices),
    lambda dataset: dataset.with_labels(labels),
    lambda dataset: dataset.with_labels(labels).select(indices),
  ):
    streamed = change(tiny_budget(good))
    in_memory = change(data.load(good, canvas_size=8))
    assert_same(streamed.gather(np.arange(4)), in_memory.gather(np.arange(4)))
    np.testing.assert_array_equal(streamed.labels, in_memory.labels)


def test_the_budget_decides(good):
  size_gib = 35 * 8 * 8 * 3 / 2**30
  for factor, kind in ((0.99, data.Streamed), (1.01, data.Dataset)):
    dataset = data.open_dataset(
      good, canvas_size=8, memory_gib=factor * size_gib
    )
    assert isinstance(dataset, kind)


# -- working ahead ------------------------------------------------------------


def batch_threads():
  return [t for t in threading.enumerate() if t.name == "batches"]


def wait_until(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end, "waited 10 s"
    time.sleep(0.005)


def counted(made, fails_at=None):
  for i in range(100):
    if i == fails_at:
      raise UserError(f"item {i} is bad")
    made.append(i)
    yield i


@pytest.mark.parametrize("size", [2, 5])
def test_two_items_are_made_ahead(size):
  made = []
  items = data.ahead(counted(made), size=size)
  assert not made, "nothing before the first is asked for"
  assert next(items) == 0
  wait_until(lambda: len(made) == 1 + size)
  time.sleep(0.05)
  assert len(made) == 1 + size, "no more than that"
  assert next(items) == 1
  wait_until(lambda: len(made) == 2 + size)
  assert list(items) == list(range(2, 100))
  wait_until(lambda: not batch_threads())


def test_an_exception_comes_in_its_place():
  items = data.ahead(counted([], fails_at=5))
  assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
  with pytest.raises(UserError, match="item 5 is bad"):
    next(items)
  wait_until(lambda: not batch_threads())


@pytest.mark.parametrize("how", ["close", "drop", "error"])
def test_the_thread_ends_with_its_reader(how):
  items = data.ahead(counted([], fails_at=3 if how == "error" else None))
  next(items)
  assert batch_threads()
  if how == "drop":
    del items
    gc.collect()
  else:
    items.close()
  assert not batch_threads()


def test_streamed_batches_are_made_ahead(good):
  batches = data.train_batches(
    tiny_budget(good), seed=0, batch_size=8, start_step=0, num_steps=50
  )
  assert not batch_threads()
  first = next(batches)
  assert batch_threads()
  second = next(batches)
  assert not np.array_equal(first["image"], second["image"])
  batches.close()
  assert not batch_threads()


# -- damaged images -----------------------------------------------------------


def test_raise_names_the_file(tree):
  source = open_tree(tree)
  end = "; mend or remove it, or set data.on_error=skip."
  with pytest.raises(UserError) as error:
    data.open_dataset(source, canvas_size=8)
  assert str(error.value).startswith(f"{tree}/a/04.png: not a readable image (")
  assert str(error.value).endswith(end)
  batches = data.train_batches(
    tiny_budget(source), seed=0, batch_size=40, start_step=0, num_steps=1
  )
  with pytest.raises(UserError) as error:
    next(batches)
  assert f"{tree}/" in str(error.value)
  assert str(error.value).endswith(end)


def test_skip_puts_a_good_image_in_the_place(tree, good):
  source = open_tree(tree)
  told = {"memory": [], "streamed": []}
  options = {"on_error": "skip", "seed": 3}
  in_memory = data.open_dataset(
    source, canvas_size=8, **options, on_skip=told["memory"].append
  )
  streamed = tiny_budget(source, **options, on_skip=told["streamed"].append)
  every = streamed.gather(np.arange(40))
  assert_same(every, in_memory.gather(np.arange(40)))
  bad = [
    i
    for i in range(40)
    if source.describe(i)[-6:-4] in ("03", "04", "17", "20", "39")
  ]
  np.testing.assert_array_equal(np.flatnonzero(every["replaced"]), bad)
  # What stands there is one of the good images, with its own label.
  known = data.load(good, canvas_size=8).gather(np.arange(35))
  used = []
  for i in bad:
    (j,) = [
      j
      for j in range(35)
      if np.array_equal(known["image"][j], every["image"][i])
      and np.array_equal(known["size"][j], every["size"][i])
    ]
    assert every["label"][i] == known["label"][j]
    used.append(j)
  assert len(set(used)) > 1
  assert sorted(told["memory"]) == sorted(told["streamed"])
  assert len(told["memory"]) == 5
  assert told["memory"][0].startswith(f"{tree}/a/04.png: not a readable image")
  # Another seed, other replacements.
  other = data.load(source, canvas_size=8, on_error="skip", seed=4)
  assert any(
    not np.array_equal(other.images[i], in_memory.images[i]) for i in bad
  )
  select = in_memory.select(np.array(bad[:2]))
  assert select.gather(np.arange(2))["replaced"].all()


def test_evaluation_leaves_damaged_images_out(tree, good):
  source = open_tree(tree)
  dropped = data.load(source, canvas_size=8, on_error="drop")
  expected = data.load(good, canvas_size=8)
  assert_same(dropped.gather(np.arange(35)), expected.gather(np.arange(35)))
  streamed = tiny_budget(source, on_error="drop")
  batch = streamed.gather(np.arange(40))
  gone = batch["label"] == -1
  assert gone.sum() == 5
  assert not batch["image"][gone].any()
  np.testing.assert_array_equal(streamed.labels, source.labels)
  streamed.note_labels(batch["label"])
  np.testing.assert_array_equal(streamed.labels, batch["label"])
  assert (source.labels >= 0).all(), "the source keeps its own"


def test_a_damaged_image_reads_no_labels(tree, monkeypatch):
  """The threads that decode would wait for themselves."""

  def scan_labels(*args):
    raise AssertionError(threading.current_thread().name)

  monkeypatch.setattr(stream, "scan_labels", scan_labels)
  source = dataclasses.replace(open_tree(tree), labels=None)
  streamed = tiny_budget(source, on_error="drop")
  batch = streamed.gather(np.arange(40))
  assert (batch["label"] == -1).sum() == 5
  streamed.note_labels(batch["label"])
  np.testing.assert_array_equal(streamed.labels, batch["label"])


def test_no_good_image_at_all(tmp_path):
  source = open_tree(write_tree(tmp_path, {"a.png": b"x", "b.png": b"y"}))
  message = f"none of the 2 images of folder:{tmp_path} train can be read."
  for dataset in (
    lambda: data.load(source, canvas_size=8, on_error="skip"),
    lambda: tiny_budget(source, on_error="skip").gather(np.array([0])),
  ):
    with pytest.raises(UserError) as error:
      dataset()
    assert str(error.value) == message


# -- kept on disk -------------------------------------------------------------


@pytest.fixture
def keep_all(monkeypatch):
  """Keeps also what was decoded in no time."""
  monkeypatch.setattr(memory, "_CACHE_SECONDS", -1)


def count_reads(source):
  reads = []

  def read(indices):
    reads.extend(indices)
    return read.inner(indices)

  read.inner = source.read
  return dataclasses.replace(source, read=read), reads


def test_the_second_start_reads_no_image(good, tmp_path, keep_all):
  options = {"canvas_size": 8, "cache_dir": tmp_path / "x" / "cache"}
  source, reads = count_reads(good)
  first = data.open_dataset(source, **options)
  assert sorted(reads) == list(range(35))
  reads.clear()
  second = data.open_dataset(source, **options)
  assert not reads
  assert_same(first.gather(np.arange(35)), second.gather(np.arange(35)))
  assert second.label_names == first.label_names
  skipping = data.open_dataset(source, **options, on_error="skip")
  assert not skipping.gather(np.arange(35))["replaced"].any()
  assert not reads
  # Another canvas or content is another entry.
  data.open_dataset(source, **options | {"canvas_size": 9})
  data.open_dataset(source.select(np.arange(34)), **options)
  assert len(reads) == 35 + 34
  assert len(os.listdir(tmp_path / "x" / "cache")) == 3


def test_quick_datasets_are_not_kept(good, tmp_path):
  data.open_dataset(good, canvas_size=8, cache_dir=tmp_path)
  assert not os.listdir(tmp_path)


def test_damage_is_told_at_each_start(tree, tmp_path, keep_all):
  for _ in range(2):
    told = []
    data.open_dataset(
      open_tree(tree),
      canvas_size=8,
      cache_dir=tmp_path,
      on_error="skip",
      on_skip=told.append,
    )
    assert len(told) == 5
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_damaged_cache_is_written_anew(good, tmp_path, keep_all, damage):
  expected = data.open_dataset(good, canvas_size=8, cache_dir=tmp_path)
  (folder,) = tmp_path.iterdir()
  file = folder / "images.npy"
  if damage == "missing":
    file.unlink()
  else:
    file.write_bytes(file.read_bytes()[: 500 if damage == "truncated" else 0])
  for reads_expected in (35, 0):
    source, reads = count_reads(good)
    dataset = data.open_dataset(source, canvas_size=8, cache_dir=tmp_path)
    assert len(reads) == reads_expected
    np.testing.assert_array_equal(dataset.images, expected.images)
  assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_does_not_end_the_run(
  good, tmp_path, keep_all, monkeypatch, capsys
):
  class Full:
    free = 10

  monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: Full)
  dataset = data.open_dataset(good, canvas_size=8, cache_dir=tmp_path)
  assert len(dataset) == 35
  assert capsys.readouterr().out == (
    f"note: decoded images are not kept in {tmp_path} (little space is left)\n"
  )
  assert not os.listdir(tmp_path)


def test_labels_of_records_are_read_once(tmp_path):
  source, reads = count_reads(make_source("digits", split="test"))
  unknown = dataclasses.replace(source, labels=None)
  streamed = tiny_budget(unknown, cache_dir=tmp_path)
  assert not reads, "opening reads nothing"
  np.testing.assert_array_equal(streamed.labels, source.labels)
  assert sorted(reads) == list(range(360))
  again = tiny_budget(unknown, cache_dir=tmp_path)
  np.testing.assert_array_equal(again.labels, source.labels)
  assert len(reads) == 360
  part = again.select(np.array([7, 5]))
  np.testing.assert_array_equal(part.labels, source.labels[[7, 5]])
  assert len(reads) == 360
  nothing = dataclasses.replace(unknown, label_names=())
  assert (tiny_budget(nothing).labels == -1).all()
  assert len(reads) == 360


def test_second_start_on_real_cifar10(shared, tmp_path):
  source = make_source(
    "tfds:cifar10",
    split="train",
    data_dir=str(shared / "tensorflow_datasets"),
  )
  images = np.zeros((50000, 32, 32, 3), np.uint8)
  images[:, 0, 0, 0] = np.arange(50000) % 256
  decoded = data.Dataset(
    images,
    np.full((50000, 2), 32, np.int32),
    np.zeros(50000, np.int32),
    source.label_names,
  )
  folder = cache.images_folder(source, 32, tmp_path)
  cache.write_images(folder, vars(decoded))
  begin = time.perf_counter()
  dataset = data.open_dataset(source, canvas_size=32, cache_dir=tmp_path)
  assert time.perf_counter() - begin < 2
  np.testing.assert_array_equal(dataset.images[:, 0, 0, 0], images[:, 0, 0, 0])
