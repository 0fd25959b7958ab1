"""A run's directory: what may change between two starts of one run."""

import json
import re
import shutil

import numpy as np
import pytest

from simclr_jax import checkpoint, cli, rundir
from simclr_jax.config import UserError, set_field


def make_config(**fields):
  config = cli.load_recipe("digits", stage="pretrain")
  for name, value in fields.items():
    set_field(config, name.replace("__", "."), value)
  return config


def save(workdir, config, *, step=4, weight=1.0, **extra):
  rundir.claim(config, workdir)
  state = {
    "step": np.asarray(step, np.int32),
    "params": {"w": np.full(2, weight, np.float32)},
    "batch_stats": {},
    "opt_state": {},
  }
  with checkpoint.open_manager(workdir, keep=1) as manager:
    checkpoint.save(manager, state, config, extra=extra)


CLASSES = ["cat", "dog"]


@pytest.mark.parametrize(
  "images, names, message",
  [
    (40, ["dog", "zcat"], "began with the classes cat, dog, .* classes dog, z"),
    (40, ["cat", "dog", "owl"], "the classes cat, dog, owl now. Give the data"),
    (40, [], "and the data has no labels now"),
    (80, CLASSES, "began with 40 images to train on, and there are 80 now"),
  ],
)
def test_other_data_is_refused(images, names, message, tmp_path, capsys):
  rundir.check_data(tmp_path, images, names)  # nothing is there yet
  save(tmp_path, make_config(), num_images=40, label_names=CLASSES)
  rundir.check_data(tmp_path, 40, tuple(CLASSES))
  with pytest.raises(UserError, match=message):
    rundir.check_data(tmp_path, images, names)
  rundir.check_data(tmp_path, images, names, complete=True)
  assert re.search(f"warning: .*{message}", capsys.readouterr().out)


def test_labels_that_came_later_can_be_left_out(tmp_path):
  save(tmp_path, make_config(), num_images=40, label_names=[])
  with pytest.raises(UserError, match=r"no labels, .*data.labels=none"):
    rundir.check_data(tmp_path, 40, CLASSES)
  rundir.claim(make_config(data__labels="none"), tmp_path)
  with pytest.raises(UserError, match=r"data.labels was 'none', is 'a.cs"):
    rundir.claim(make_config(data__labels="a.csv"), tmp_path)


def test_runs_of_earlier_versions_do_not_say(tmp_path):
  save(tmp_path, make_config(), label_names=CLASSES)
  rundir.check_data(tmp_path, 80, CLASSES)


def test_a_shorter_run_leaves_the_config_as_it_is(tmp_path):
  save(tmp_path, make_config(num_steps=6), step=6)
  before = (tmp_path / "config.json").read_text()
  with pytest.raises(UserError, match=r"has done 6 steps already, more than"):
    rundir.claim(make_config(num_steps=5), tmp_path, 5)
  assert (tmp_path / "config.json").read_text() == before


def test_without_its_file_a_run_keeps_the_config_of_its_checkpoint(tmp_path):
  save(tmp_path, make_config(seed=3))
  (tmp_path / "config.json").unlink()
  with pytest.raises(UserError, match=r"config.seed was 3, is 7"):
    rundir.claim(make_config(seed=7), tmp_path)
  rundir.claim(make_config(seed=3), tmp_path)


def test_a_path_may_be_spelled_in_another_way(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder, before = f"folder:{tmp_path}/photos", str(tmp_path / "before")
  save("run", make_config(data__name=folder, pretrained=before))
  for name, pretrained in (
    ("folder:photos", "before"),
    (f"{folder}/", f"{before}/"),
  ):
    rundir.claim(make_config(data__name=name, pretrained=pretrained), "run")
  with pytest.raises(UserError, match=r"config.data.name was"):
    rundir.claim(make_config(data__name="folder:other"), "run")


def test_a_network_may_have_moved_but_not_changed(tmp_path):
  old, new, other = (str(tmp_path / name) for name in ("old", "new", "other"))
  save(old, make_config())
  save(other, make_config(), weight=2.0)
  digits = checkpoint.load_described(old)[2]["hash"]
  workdir = tmp_path / "run"
  save(workdir, make_config(pretrained=old), pretrained={"hash": digits})
  shutil.move(old, new)
  rundir.claim(make_config(pretrained=new), workdir)
  for changed in (other, ""):
    with pytest.raises(UserError, match=r"another run: config.pretrained"):
      rundir.claim(make_config(pretrained=changed), workdir)


def test_a_file_that_lacks_something_is_named(tmp_path):
  (tmp_path / "result.json").write_text(json.dumps({"num_steps": 4}))
  with pytest.raises(UserError, match=r'result.json is damaged: .* no "prot'):
    rundir.finished(tmp_path, 4)
  (tmp_path / rundir.DIVERGED).write_text("{}")
  with pytest.raises(UserError, match=r'diverged.json is damaged: .* no "st'):
    rundir.claim(make_config(), tmp_path)


@pytest.mark.parametrize(
  "text, why", [('{"a":', "Expecting"), ("[]", "no JSON"), ("{}", 'no "b"')]
)
def test_a_damaged_file_is_one_line(tmp_path, text, why):
  file = tmp_path / "a.json"
  file.write_text(text)
  for options, end in (
    ({}, "Restore it from a copy."),
    ({"hint": "give another"}, "Restore it from a copy, or give another."),
  ):
    with pytest.raises(UserError) as error:
      rundir.read_json(file, "b", **options)
    message = str(error.value)
    assert message.startswith(f"{file} is damaged: ") and why in message
    assert message.endswith(end) and "\n" not in message


def test_class_names_are_those_that_sources_give(tmp_path):
  """Earlier versions stored a Mac's, with each accent apart."""
  save(tmp_path, make_config(), num_images=4, label_names=["e\u0301te\u0301"])
  rundir.check_data(tmp_path, 4, ["\u00e9t\u00e9"])
  assert checkpoint.load_described(tmp_path)[2]["label_names"] == [
    "\u00e9t\u00e9"
  ]
