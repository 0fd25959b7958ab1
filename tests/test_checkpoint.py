"""Checkpoints as users meet them: load, merge, and what can be wrong."""

import importlib.util
import shutil
import sys
import threading
import time
from concurrent.futures import thread as futures

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from simclr_jax import checkpoint, rundir
from simclr_jax.config import UserError


def make_state(step, value=1.0):
  rng = np.random.default_rng(step)
  kernel = rng.normal(size=(3, 2)).astype(np.float32) * value
  return {
    "step": np.asarray(step),
    "params": {
      "encoder": {"conv": {"kernel": kernel}},
      "classifier": {"bias": np.zeros(2, np.float32)},
    },
    "batch_stats": {"encoder": {"bn": {"mean": kernel[0]}}},
    "opt_state": ({"trace": kernel + 1}, ()),
  }


CONFIG = ml_collections.ConfigDict(
  {"model": {"depth": 18}, "range": (0.1, 1.0)}
)


def write(workdir, *steps):
  with checkpoint.open_manager(workdir, keep=2) as manager:
    for step in steps:
      checkpoint.save(manager, make_state(step), CONFIG, extra={"names": ["a"]})
  return workdir


def test_load_gives_config_and_network_of_the_latest_step(tmp_path, caplog):
  write(tmp_path, 1, 2, 5)
  files = sorted(tmp_path.rglob("*"))
  config, variables, about = checkpoint.load_described(tmp_path)
  assert config.to_dict() == CONFIG.to_dict()
  state = make_state(5)
  for name in ("params", "batch_stats"):
    np.testing.assert_equal(variables[name], state[name])
  assert (about["step"], about["names"]) == (5, ["a"])
  assert len(about["hash"]) == 16
  assert checkpoint.latest(tmp_path)[::2] == (5, {"names": ["a"]})
  assert sorted(tmp_path.rglob("*")) == files  # nothing is written, or said
  assert not caplog.records
  write(tmp_path, 6)
  assert checkpoint.load_described(tmp_path)[2]["hash"] != about["hash"]
  state["step"] = np.asarray(7)
  state["batch_stats"] = jax.tree.map(lambda x: x + 1, state["batch_stats"])
  with checkpoint.open_manager(tmp_path, keep=1) as manager:
    checkpoint.save(manager, state, CONFIG)
  assert checkpoint.load_described(tmp_path)[2]["hash"] != about["hash"]


def test_a_relative_workdir_works(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write("run", 3)
  assert checkpoint.load("run")[0].model.depth == 18


@pytest.mark.parametrize(
  "workdir, message",
  [
    ("gs://bucket/run", r"the package gcsfs: pip install gcsfs, .*\[gcs\]"),
    ("s3://bucket/run", r"needs the package s3fs: pip install s3fs, .*\[s3\]"),
    ("hdfs://host/run", r"must be a local path, gs://"),
  ],
)
def test_a_bucket_that_cannot_be_reached(workdir, message, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=message):
    checkpoint.load(workdir)
  with pytest.raises(UserError, match=message):
    rundir.claim(CONFIG, workdir)


@pytest.mark.parametrize("field", ["config.pretrained", "config.teacher"])
@pytest.mark.parametrize("where", ["gs://nope/x", "hdfs://nope/x", ""])
def test_a_place_that_cannot_be_is_said_of_its_field(field, where, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError) as error:
    checkpoint.load(where, field=field)
  assert str(error.value).startswith(f"{field}: {where}")


def test_restore_gives_the_optimizer_state_its_structure(tmp_path):
  write(tmp_path, 4)
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    state = checkpoint.restore_latest(manager, make_state(0))
  np.testing.assert_equal(state, make_state(4))
  assert isinstance(state["opt_state"], tuple)


def restored_step(workdir):
  with checkpoint.open_manager(workdir, keep=2) as manager:
    state = checkpoint.restore_latest(manager, make_state(0))
  expected = make_state(int(state["step"]))
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  return int(state["step"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [None, 0, 40], ids=["missing", "empty", "cut"])
def test_damage_to_any_file_is_seen_or_does_not_matter(tmp_path, size, caplog):
  whole = write(tmp_path / "whole", 4, 8)
  fell_back = 0
  # Those under ocdbt.process_0 are what Orbax has merged into state/d.
  for file in (whole / "checkpoints" / "8").rglob("*"):
    if file.is_dir() or "ocdbt.process_0" in str(file):
      continue
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    victim = run / file.relative_to(whole)
    if size is None:
      victim.unlink()
    else:
      victim.write_bytes(file.read_bytes()[:size])
    caplog.clear()
    step = restored_step(run)
    assert step == 8 or (
      step == 4 and "checkpoints/8 is damaged" in caplog.text
    )
    assert checkpoint.load_described(run)[2]["step"] == step
    fell_back += step == 4
  assert fell_back >= 4


@pytest.mark.parametrize(
  "text", ["{}", "5", '{"config": {}}', '{"config": 5, "extra": {}}']
)
def test_metadata_that_lacks_something_is_damage(tmp_path, text, caplog):
  write(tmp_path, 4, 8)
  for step in (8, 4):
    folder = tmp_path / "checkpoints" / str(step) / "config"
    (file,) = (f for f in folder.iterdir() if f.name == "metadata")
    file.write_text(text)
    if step == 8:  # the one before it is whole
      assert restored_step(tmp_path) == 4
      assert checkpoint.load_described(tmp_path)[2]["step"] == 4
      assert checkpoint.latest(tmp_path)[0] == 4
      assert "checkpoints/8 is damaged" in caplog.text
  with pytest.raises(UserError, match=r"^--checkpoint: .*all are damaged\.$"):
    checkpoint.load(tmp_path, field="--checkpoint")
  assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("step", [6, 8])
def test_a_save_replaces_damaged_checkpoints_after_it(tmp_path, step):
  write(tmp_path, 4, 8)
  (tmp_path / "checkpoints" / "8" / "state" / "manifest.ocdbt").unlink()
  write(tmp_path, step)
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    assert sorted(manager.all_steps()) == [4, step]
  assert restored_step(tmp_path) == step


def test_no_run_starts_over_in_silence(tmp_path, caplog):
  target = make_state(0)
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    assert checkpoint.restore_latest(manager, target) is None
    assert caplog.text == ""
    (tmp_path / "metrics.jsonl").write_text("")
    assert checkpoint.restore_latest(manager, target) is None
    assert "the run that was begun here starts over" in caplog.text
  write(tmp_path, 4, 8)
  for file in tmp_path.rglob("manifest.ocdbt"):
    file.unlink()
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    with pytest.raises(UserError, match=r"no checkpoint under .* can be read"):
      checkpoint.restore_latest(manager, target)


def test_restore_refuses_another_network(tmp_path):
  write(tmp_path, 4)
  other = make_state(0)
  other["params"]["encoder"]["conv"] = {"kernel": np.zeros((3, 5))}
  other["params"]["encoder"]["extra"] = np.zeros(1)
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    with pytest.raises(UserError) as error:
      checkpoint.restore_latest(manager, other)
  message = str(error.value)
  assert "missing encoder/extra" in message
  assert "encoder/conv/kernel has shape (3, 2), needed (3, 5)" in message
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    with pytest.raises(UserError, match="not expected encoder/bn/mean"):
      checkpoint.restore_latest(manager, make_state(0) | {"batch_stats": {}})


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda d: d / "none", "there is no directory"),
    (lambda d: d, "is not a run's directory"),
    (lambda d: (d / "checkpoints").mkdir() or d, "no complete checkpoint"),
  ],
)
def test_load_says_what_is_wrong(tmp_path, make, message):
  with pytest.raises(UserError, match=message) as error:
    checkpoint.load(make(tmp_path), field="config.pretrained")
  assert str(error.value).startswith("config.pretrained: ")


def test_a_save_that_cannot_begin_leaves_no_thread(tmp_path, monkeypatch):
  """The process would wait for it, some twenty minutes after its error."""
  path_type = type(epath.Path())
  real = path_type.mkdir

  def mkdir(path, *args, **kwargs):
    if "checkpoints" in path.parts[:-1]:
      raise OSError(30, "Read-only file system")
    return real(path, *args, **kwargs)

  before = set(threading.enumerate())
  with pytest.raises(UserError, match=r"Read-only file system\. Make room"):
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
      monkeypatch.setattr(path_type, "mkdir", mkdir)
      checkpoint.save(manager, make_state(1), CONFIG)
      checkpoint.check(manager, wait=True)
  # What only ends its work gets seconds; what waits would stay for minutes.
  deadline = time.monotonic() + 10
  while busy := [t for t in {*threading.enumerate()} - before if is_busy(t)]:
    assert time.monotonic() < deadline, busy
    time.sleep(0.01)


def is_busy(thread):
  """Whether a thread keeps its process from ending: no daemon, not idle."""
  if thread.daemon:
    return False
  frame = sys._current_frames().get(thread.ident)
  return frame is not None and frame.f_code.co_filename != futures.__file__
