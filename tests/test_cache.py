"""What is kept on disk, written by several processes of several hosts."""

import os
import shutil
import time

import numpy as np
import pytest
from test_streaming import assert_same, count_reads

from simclr_jax import data
from simclr_jax.data import memory
from simclr_jax.data.scan import scan_labels
from simclr_jax.sources import make_source


@pytest.fixture(autouse=True)
def _in_a_container(monkeypatch):
  """Decoding in no time is kept too; every process has the number 1."""
  monkeypatch.setattr(memory, "_CACHE_SECONDS", -1)
  monkeypatch.setattr(os, "getpid", lambda: 1)


@pytest.fixture
def source():
  return make_source("digits", split="test")


def opened(source, cache_dir):
  return data.open_dataset(source, canvas_size=8, cache_dir=cache_dir)


def meanwhile(monkeypatch, other, *, call=1):
  """Another host does all of `other` within this one's n-th np.save."""
  save, calls = np.save, []

  def np_save(*args):
    save(*args)
    calls.append(args)
    if len(calls) == call:
      other()

  monkeypatch.setattr(np, "save", np_save)


def is_kept(source, cache_dir):
  """Whether the next start reads no image and finds the right ones."""
  again, reads = count_reads(source)
  found = opened(again, cache_dir)
  every = np.arange(len(source))
  assert_same(
    found.gather(every), data.load(source, canvas_size=8).gather(every)
  )
  return not reads


def set_age(path, seconds):
  changed = time.time() - seconds
  for file in (*path.rglob("*"), path):
    os.utime(file, (changed, changed))


@pytest.mark.parametrize("pids", [[1, 1], [1, 2]])
@pytest.mark.parametrize("call", [1, 3])
def test_two_hosts_keep_the_same_images(
  source, tmp_path, monkeypatch, capsys, call, pids
):
  """The first to end keeps its own, and the other takes that for good."""
  inodes = {}

  def other():
    monkeypatch.setattr(os, "getpid", lambda: pids[1])
    opened(source, tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: pids[0])
    (folder,) = (d for d in tmp_path.iterdir() if d.suffix != ".partial")
    inodes.update({file: file.stat().st_ino for file in folder.iterdir()})

  meanwhile(monkeypatch, other, call=call)
  opened(source, tmp_path)
  (folder,) = tmp_path.iterdir()
  assert inodes == {file: file.stat().st_ino for file in folder.iterdir()}
  assert len(inodes) == 3
  assert is_kept(source, tmp_path)
  assert "not kept" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_two_hosts_mend_the_same_images(source, tmp_path, monkeypatch, damage):
  opened(source, tmp_path)
  (file,) = tmp_path.glob("*/images.npy")
  if damage == "missing":
    file.unlink()
  else:
    os.truncate(file, 500)
  meanwhile(monkeypatch, lambda: opened(source, tmp_path), call=3)
  opened(source, tmp_path)
  assert is_kept(source, tmp_path)
  assert len(list(tmp_path.iterdir())) == 1


def test_two_hosts_keep_the_same_labels(source, tmp_path, monkeypatch):
  meanwhile(monkeypatch, lambda: scan_labels(source, tmp_path))
  labels = scan_labels(source, tmp_path)
  np.testing.assert_array_equal(labels, source.labels)
  again, reads = count_reads(source)
  np.testing.assert_array_equal(scan_labels(again, tmp_path), source.labels)
  assert not reads
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [0, 100, 500])
def test_damaged_labels_are_read_anew(source, tmp_path, size):
  """As after a power failure, of which a rename alone is no protection."""
  scan_labels(source, tmp_path)
  (file,) = tmp_path.iterdir()
  os.truncate(file, size)
  for num_reads in (360, 0):
    again, reads = count_reads(source)
    np.testing.assert_array_equal(scan_labels(again, tmp_path), source.labels)
    assert len(reads) == num_reads


@pytest.mark.parametrize("keep", [opened, scan_labels])
@pytest.mark.parametrize("seconds", [60, 2 * 24 * 3600])
def test_what_a_killed_process_left(
  source, tmp_path, monkeypatch, keep, seconds
):
  """It is never taken for whole, and goes when nobody can be writing it."""
  left = []

  def die():
    (path,) = tmp_path.iterdir()
    copy = path.with_name("copy")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    left.append((path, copy))
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    meanwhile(patch, die)
    with pytest.raises(KeyboardInterrupt):
      keep(source, tmp_path)
  ((path, copy),) = left
  assert list(tmp_path.iterdir()) == [copy], "Ctrl-C leaves nothing"
  copy.rename(path)  # SIGKILL does.
  set_age(path, seconds)
  again, reads = count_reads(source)
  keep(again, tmp_path)
  assert sorted(reads) == list(range(360))
  assert path.exists() == (seconds == 60)
  keep(again, tmp_path)
  assert len(reads) == 360
  assert len(list(tmp_path.iterdir())) == 1 + (seconds == 60)


@pytest.mark.parametrize("keep", [opened, scan_labels])
def test_others_may_read_it(source, tmp_path, keep):
  """Containers of one volume may have different users."""
  mask = os.umask(0o022)
  try:
    keep(source, tmp_path)
  finally:
    os.umask(mask)
  (path,) = tmp_path.iterdir()
  modes = {file.stat().st_mode & 0o777 for file in path.rglob("*")}
  assert path.stat().st_mode & 0o755 == (0o755 if path.is_dir() else 0o644)
  assert modes <= {0o644}
