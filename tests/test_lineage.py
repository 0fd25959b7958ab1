"""lineage.py: what a run may not take from another one."""

import importlib.util
import os

import pytest
import test_rundir

from simclr_jax import cli, distill, finetune, lineage, rundir
from simclr_jax.config import UserError, from_json_tree, set_field


def make_config(stage, **fields):
  config = cli.load_recipe("folder", stage=stage)
  set_field(config, "data.name", "folder:photos")
  for name, value in fields.items():
    set_field(config, name.replace("__", "."), value)
  return config


def test_images_held_out_are_new_to_the_teacher():
  student, teacher = make_config("distill"), make_config("finetune")
  lineage.refuse_seen(student, teacher, field="teacher")
  set_field(teacher, "data.eval_fraction", 0.0)
  with pytest.raises(UserError, match=r"0.2, but config.teacher .* with 0,"):
    lineage.refuse_seen(student, teacher, field="teacher")
  spelled = make_config("distill", data__name=f"folder:{os.getcwd()}/photos/")
  with pytest.raises(UserError, match=r"0.2, but config.teacher .* with 0,"):
    lineage.refuse_seen(spelled, teacher, field="teacher")
  with teacher.data.unlocked():
    del teacher.data.eval_fraction  # of an earlier version: there was none
  teacher = from_json_tree(teacher.to_dict())
  set_field(student, "data.eval_fraction", 0.0)
  lineage.refuse_seen(student, teacher, field="teacher")
  for name, value in (("eval_split", ""), ("name", "folder:others")):
    other = make_config("distill", **{f"data__{name}": value})
    lineage.refuse_seen(other, teacher, field="teacher")


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"label_percent": 10.0}, "supcon on all labels of these images; leave"),
    ({"labels_per_class": 5}, "supcon on all labels of these images; leave"),
    ({"data__eval_fraction": 0.5}, "is 0.5, but config.pretrained was trained"),
    ({}, ""),
    ({"label_percent": 10.0, "data__name": "folder:others"}, ""),
  ],
)
def test_few_labels_after_all_of_them(fields, message, tmp_path):
  before = make_config("pretrain", loss__name="supcon")
  test_rundir.save(tmp_path, before)
  config = make_config("finetune", pretrained=str(tmp_path), **fields)
  if message:
    with pytest.raises(UserError, match=message):
      finetune.resolve_network(config)
  else:
    assert finetune.resolve_network(config)["params"]


def test_a_run_from_before_there_were_other_losses(tmp_path):
  before = make_config("pretrain")
  with before.loss.unlocked():
    del before.loss.name
  test_rundir.save(tmp_path, before)
  config = make_config("finetune", pretrained=str(tmp_path), label_percent=1.0)
  assert finetune.resolve_network(config)["params"]


def test_a_bucket_without_its_package_is_said_of_the_field(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  rundir.claim(make_config("finetune"), tmp_path)
  for stage, field, load in (
    ("finetune", "pretrained", lineage.load_pretrained),
    ("distill", "teacher", distill.load_teacher),
    ("finetune", "pretrained", lambda c: rundir.check_same(c, tmp_path)),
  ):
    config = make_config(stage, **{field: "gs://nope/x"})
    with pytest.raises(UserError) as error:
      load(config)
    assert str(error.value).startswith(
      f"config.{field}: gs://nope/x: needs the package gcsfs"
    )
