"""Decoding in processes: the same images, errors told, nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from test_folder import open_tree, write_tree
from test_sources import encode, photo

from simclr_jax import data
from simclr_jax.config import UserError
from simclr_jax.sources import make_source, workers


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """40 images of many shapes; 7 and 30 are damaged."""
  rng = np.random.default_rng(0)
  files = {}
  for i in range(40):
    kind = "PNG" if i % 3 else "JPEG"
    image = encode(photo(*rng.integers(1, 40, 2)), kind)
    files[f"{i:02}.{kind.lower()}"] = b"damaged" if i in (7, 30) else image
  return open_tree(write_tree(tmp_path_factory.mktemp("tree"), files))


@pytest.fixture
def started(monkeypatch):
  """Processes at once, for three threads; a list of those that were started."""
  begun = []

  class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      begun.append(self)

  monkeypatch.setattr(workers.subprocess, "Popen", Popen)
  monkeypatch.setattr(workers, "num_cores", lambda: 3)
  monkeypatch.setattr(workers, "_LEAST_CORES", 3)
  monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 0)
  workers.threads.cache_clear()
  workers._warned.clear()
  yield begun
  workers.threads().shutdown()
  workers.threads.cache_clear()


@pytest.fixture
def here(monkeypatch):
  """Calls a function with all decoding in this process."""

  def call(fn):
    with monkeypatch.context() as patched:
      patched.setattr(workers, "_LEAST_CORES", 99)
      workers.threads.cache_clear()
      try:
        return fn()
      finally:
        workers.threads().shutdown()
        workers.threads.cache_clear()

  return call


def nothing_here(*args, **kwargs):
  raise AssertionError("this process decodes")


@pytest.mark.parametrize("on_error", ["drop", "skip"])
def test_images_are_the_same(source, started, here, monkeypatch, on_error):
  told = {"here": [], "there": []}

  def gather(where):
    return data.Streamed(
      source, 16, on_error=on_error, on_skip=told[where].append
    ).gather(np.arange(40))

  expected = here(lambda: gather("here"))
  assert not started
  if on_error == "drop":  # else this thread decodes what comes in their place
    monkeypatch.setattr(workers, "decode", nothing_here)
  batch = gather("there")
  assert 1 <= len(started) <= 3
  assert batch.keys() == expected.keys()
  for name, array in batch.items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)
  assert sorted(told["there"]) == sorted(told["here"])
  assert len(told["here"]) == 2


def test_loading_is_the_same_and_ends_its_processes(source, started, here):
  good = source.select([i for i in range(40) if i not in (7, 30)])
  expected = here(lambda: data.load(good, canvas_size=16))
  dataset = data.load(good, canvas_size=16)
  np.testing.assert_array_equal(dataset.images, expected.images)
  np.testing.assert_array_equal(dataset.sizes, expected.sizes)
  assert started
  assert all(process.poll() is not None for process in started)


def test_the_damaged_image_is_named(source, started, here):
  def error():
    with pytest.raises(UserError) as caught:
      data.load(source, canvas_size=16)
    return str(caught.value)

  expected = here(error)
  assert "07.png: not a readable image" in expected
  assert error() == expected
  assert started


def test_a_process_that_is_killed_is_done_without(source, started, capfd):
  dataset = data.Streamed(source, 16, on_error="drop")
  expected = dataset.gather(np.arange(40))
  for process in started:
    process.kill()
    process.wait()
  for _ in range(3):
    batch = dataset.gather(np.arange(40))
    np.testing.assert_array_equal(batch["image"], expected["image"])
  assert all(process.returncode == -signal.SIGKILL for process in started)
  (line,) = capfd.readouterr().err.splitlines()
  assert line.startswith("warning: a decoding process cannot be used (")


class Deadly(int):
  """A number that ends the process that it is sent to."""

  def __reduce__(self):
    return os._exit, (3,)


def test_one_that_dies_of_its_work_is_done_without(started, capfd):
  with workers.make_threads() as pool:
    # Nothing that it leaves unread, which would be another error.
    options = {"channels": 3, "max_size": Deadly(8)}
    future = pool.submit(workers.decode_all, [b""], **options)
    assert "the image is empty" in str(future.result(timeout=60)[0])
  assert [process.returncode for process in started] == [3]
  assert "cannot be used (it ended)" in capfd.readouterr().err


@pytest.mark.parametrize(
  ("python", "reason"),
  [("/nowhere/python", "No such file"), (None, "Permission denied")],
)
def test_one_that_cannot_start_is_done_without(
  python, reason, source, started, monkeypatch, capfd
):
  monkeypatch.setattr(sys, "executable", python)
  dataset = data.Streamed(source, 16, on_error="drop")
  for _ in range(2):
    assert dataset.gather(np.arange(40))["image"].any()
  (line,) = capfd.readouterr().err.splitlines()
  assert reason in line


def test_an_answer_that_was_left_is_no_other_ones(started, monkeypatch):
  """What an exception leaves in the channel would be the next one's pixels."""
  first, second = ([encode(photo(9, 9 + i))] for i in range(2))
  options = {"channels": 3, "max_size": 0}
  receive = workers._receive

  def interrupted(channel):
    raise MemoryError

  monkeypatch.setattr(workers, "num_cores", lambda: 1)
  monkeypatch.setattr(workers, "_LEAST_CORES", 1)
  with workers.make_threads() as pool:
    pool.submit(workers.decode_all, first, **options).result()
    monkeypatch.setattr(workers, "_receive", interrupted)
    with pytest.raises(MemoryError):
      pool.submit(workers.decode_all, first, **options).result()
    monkeypatch.setattr(workers, "_receive", receive)
    (image,) = pool.submit(workers.decode_all, second, **options).result()
  assert image.shape == (9, 10, 3)


def test_what_is_stopped_or_held_by_a_fork_is_ended(started):
  with workers.make_threads() as pool:
    options = {"channels": 3, "max_size": 0}
    records = [encode(photo(9, 9))]
    pool.submit(workers.decode_all, records, **options).result()
    held = pool.submit(lambda: os.dup(workers._own.worker._channel.fileno()))
    started[0].send_signal(signal.SIGSTOP)
  assert started[0].returncode == -signal.SIGKILL
  os.close(held.result())


def test_the_default_timeout_of_sockets_is_not_theirs(source, started, capfd):
  socket.setdefaulttimeout(0.001)
  try:
    dataset = data.Streamed(source, 16, on_error="drop")
    for _ in range(3):
      time.sleep(0.05)
      dataset.gather(np.arange(40))
  finally:
    socket.setdefaulttimeout(None)
  assert capfd.readouterr().err == ""


def test_pillow_is_set_up_as_here(started, monkeypatch):
  image = encode(photo(64, 64))
  options = {"channels": 3, "max_size": 0}
  with workers.make_threads() as pool:

    def decoded():
      records = [image[: len(image) * 2 // 3]]
      return pool.submit(workers.decode_all, records, **options).result()[0]

    assert "truncated" in str(decoded())
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert decoded().shape == (64, 64, 3)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    assert "decompression bomb" in str(decoded())
  assert started


def test_signals_of_a_job_do_not_end_them(source, started):
  dataset = data.Streamed(source, 16, on_error="drop")
  expected = dataset.gather(np.arange(40))
  for process in started:
    assert os.getpgid(process.pid) != os.getpgid(0)  # what Ctrl-C goes to
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
  batch = dataset.gather(np.arange(40))
  np.testing.assert_array_equal(batch["image"], expected["image"])
  assert all(process.poll() is None for process in started)


def test_there_are_no_more_than_help(source, started, monkeypatch):
  monkeypatch.setattr(workers, "_MOST_WORKERS", 1)
  data.Streamed(source, 16, on_error="drop").gather(np.arange(40))
  assert len(started) == 1


@pytest.mark.parametrize(
  ("name", "value"), [("_LEAST_CORES", 4), ("_PATIENCE_SECONDS", 60)]
)
def test_few_cores_or_little_work_need_none(
  source, started, monkeypatch, name, value
):
  monkeypatch.setattr(workers, name, value)
  data.Streamed(source, 16, on_error="drop").gather(np.arange(40))
  assert not started


def test_patience_is_with_all_that_a_thread_decoded(
  source, started, monkeypatch
):
  monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 1e-9)
  data.Streamed(source, 16, on_error="drop").gather(np.arange(40))
  assert started


def test_pixels_are_not_sent_around(started):
  data.load(make_source("digits", split="test"), canvas_size=8)
  assert not started


_PARENT = """
import sys, time
from simclr_jax.sources import workers
workers.num_cores = lambda: 3
workers._LEAST_CORES, workers._PATIENCE_SECONDS = 1, 0
with workers.make_threads() as pool:
  pool.submit(workers.decode_all, [b"x"], channels=3, max_size=8).result()
  modules = {"jax", "tensorflow_datasets"} & set(sys.modules)
  child = pool.submit(lambda: workers._own.worker.pid).result()
  print(child, modules or "", flush=True)
  time.sleep(60)
"""


def test_they_end_with_a_parent_that_is_killed():
  parent = subprocess.Popen(
    [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True
  )
  # A worker imports what its parent did here: neither takes the accelerator.
  child = int(parent.stdout.readline())
  os.kill(child, 0)
  parent.kill()
  parent.communicate()
  deadline = time.monotonic() + 20
  while _runs(child):
    assert time.monotonic() < deadline, "it outlives its parent"
    time.sleep(0.05)


def _runs(pid):
  """Whether a process is there and no zombie."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False
