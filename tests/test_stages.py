"""The stages as users run them, on digits with a tiny network."""

import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from simclr_jax import (
  build,
  checkpoint,
  cli,
  data,
  distill,
  finetune,
  loop,
  models,
  network,
  parallel,
  predict,
  pretrain,
  probes,
)
from simclr_jax.config import UserError, flat, set_field
from simclr_jax.train_state import TrainState

TINY = {
  "batch_size": 32,
  "num_steps": 3,
  "model.conv": "xla",
  "data.split": "train",
  "log_every_steps": 2,
  "report": False,
}


def run(module, recipe, workdir, **fields):
  stage = module.__name__.rpartition(".")[2]
  config = cli.load_recipe(recipe, stage=stage)
  for name, value in (TINY | fields).items():
    set_field(config, name, value)
  return module.train_and_evaluate(config, workdir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Directory and results of a chain of all stages."""
  folder = tmp_path_factory.mktemp("chain")
  results = {}
  results["pretrain"] = run(
    pretrain,
    "digits,width=0.0625",
    folder / "pretrain",
    **{"data.image_size": 8},
  )
  given = {"pretrained": str(folder / "pretrain")}
  results["finetune"] = run(
    finetune, "digits,labels=1", folder / "finetune", **given
  )
  results["linear"] = run(finetune, "digits,linear", folder / "linear", **given)
  results["distill"] = run(
    distill,
    "digits",
    folder / "distill",
    **{"teacher": str(folder / "finetune"), "loss.label_weight": 0.5},
  )
  return folder, results


def test_every_stage_leaves_its_result(runs):
  folder, results = runs
  protocols = {
    "pretrain": "knn",
    "finetune": "finetune 1%",
    "linear": "linear",
    "distill": "distill",
  }
  for name, protocol in protocols.items():
    stored = json.loads((folder / name / "result.json").read_text())
    assert stored == results[name]
    assert stored["protocol"] == protocol
    assert stored["dataset"] == "digits"
    assert stored["num_steps"] == 3
    assert 0 <= stored["top1"] <= stored["top5"] <= 1
  assert results["finetune"]["metrics"]["num_labels"] == 14
  assert results["linear"]["metrics"]["num_labels"] == 1437


def test_the_network_comes_from_the_checkpoint(runs):
  folder, _ = runs
  for name in ("finetune", "linear", "distill"):
    config, _ = checkpoint.load(folder / name)
    assert config.model.depth == 18
    assert config.model.width == 1 / 16
    assert config.model.stem == "cifar"
    assert config.model.dtype == "float32"
    assert (config.data.image_size, config.data.canvas_size) == (8, 8)
    assert config.head.num_layers == 3


def test_linear_evaluation_changes_the_classifier_alone(runs):
  folder, _ = runs
  _, before = checkpoint.load(folder / "pretrain")
  _, after = checkpoint.load(folder / "linear")
  for part in ("encoder", "projection_head"):
    for kind in ("params", "batch_stats"):
      jax.tree.map(
        np.testing.assert_array_equal, before[kind][part], after[kind][part]
      )
  assert np.any(after["params"]["classifier"]["kernel"])
  _, tuned = checkpoint.load(folder / "finetune")
  moved = jax.tree.map(
    lambda a, b: np.any(a != b),
    before["params"]["encoder"],
    tuned["params"]["encoder"],
  )
  assert all(jax.tree.leaves(moved))


def test_the_checkpoint_names_its_teacher_and_classes(runs):
  folder, _ = runs
  _, _, about = checkpoint.load_described(folder / "distill")
  _, _, teacher = checkpoint.load_described(folder / "finetune")
  assert about["teacher"]["hash"] == teacher["hash"]
  assert about["teacher"]["step"] == 3
  assert about["label_names"] == [str(i) for i in range(10)]
  assert about["labels_used"] == {"percent": 1.0, "seed": 0}


def test_distilling_on_the_labelled_images_alone(runs, tmp_path, monkeypatch):
  """They are those that the teacher was fine-tuned on; the batch repeats."""
  folder, _ = runs
  seen = {}

  def fit(state, step_fn, batches, **options):
    seen["images"] = next(batches(0))["image"]
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, "run", fit)
  teacher = {"teacher": str(folder / "finetune")}
  for only in (True, False):
    with pytest.raises(KeyboardInterrupt):
      run(
        distill, "digits", tmp_path / str(only), **teacher, only_labelled=only
      )
    distinct = len({image.tobytes() for image in seen["images"]})
    assert distinct == (14 if only else 32)
  used = {"percent": 1.0, "seed": 0}
  config, _ = checkpoint.load(folder / "finetune")
  train, _ = data.open_splits(config, tmp_path)
  labelled = train.images[data.label_subset(train.labels, **used)]
  with pytest.raises(KeyboardInterrupt):
    run(distill, "digits", tmp_path / "again", **teacher, only_labelled=True)
  assert {image.tobytes() for image in seen["images"]} == {
    image.tobytes() for image in labelled
  }


def test_what_a_student_is_given(runs, tmp_path, monkeypatch):
  """Its own network and its teacher's, the loss, and no label but theirs."""
  seen = {}

  def fit(state, step_fn, batches, **options):
    seen.update(step_fn.keywords, batches=list(batches(0)))
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, "run", fit)
  loss = {"temperature": 3.0, "scale_by_temperature": True}
  fields = {
    "teacher": str(runs[0] / "finetune"),
    "num_steps": 45,  # a whole epoch
    "model.width": 0.125,
    "loss.label_weight": 0.25,
  } | {f"loss.{name}": value for name, value in loss.items()}
  with pytest.raises(KeyboardInterrupt):
    run(distill, "digits", tmp_path / "run", **fields)
  widths = [seen[name].encoder.width for name in ("model", "teacher")]
  assert widths == [1 / 8, 1 / 16]
  assert seen["label_weight"] == 0.25
  assert seen["distillation_fn"].keywords == loss
  labelled = {
    image.tobytes()
    for batch in seen["batches"]
    for image, label in zip(batch["image"], batch["label"], strict=True)
    if label >= 0
  }
  assert len(labelled) == 14


def resolved(stage, **fields):
  config = cli.load_recipe("digits", stage=stage)
  for name, value in fields.items():
    set_field(config, name.replace("__", "."), value)
  if stage == "finetune":
    finetune.resolve_network(config)
  build.resolve(config)
  return config


def test_fields_of_pretraining_reach_its_step():
  def options(**fields):
    config = resolved("pretrain", loss__temperature=0.3, **fields)
    model = pretrain.make_model(config, num_classes=10)
    assert (model.head_layer, model.detach_classifier) == (0, True)
    return pretrain.make_step(config, model, None, probe=True).keywords

  loss = {"temperature": 0.3, "axis_name": parallel.AXIS}
  plain = options(loss__block_size=16)["nt_xent_fn"].keywords
  assert plain == loss | {"block_size": 16}
  assert options(loss__name="supcon")["supcon_fn"].keywords == loss
  kept = options(memory__size=256, memory__momentum=0.9)
  assert kept["momentum"] == 0.9
  assert kept["nt_xent_fn"].keywords == loss | {"block_size": None}


def test_fields_of_fine_tuning_reach_its_network():
  config = resolved(
    "finetune", head_layer=2, freeze_after_block=1, train_head_layer=False
  )
  model = finetune.make_model(config, num_classes=10)
  assert (model.head_layer, model.encoder.freeze_after_block) == (2, 1)
  assert model.classifier.kernel_init is nn.initializers.zeros
  params = {
    "encoder": {"block_group1": 0, "block_group2": 0},
    "projection_head": {"dense_1": 0},
  }
  assert finetune.make_trainable(config)(params) == {
    "encoder": {"block_group1": False, "block_group2": True},
    "projection_head": {"dense_1": False},
  }


def test_seed_and_augmentation_are_those_of_the_config(tmp_path):
  config = resolved("pretrain", seed=5, augment__contrast=0.3)
  assert build.make_views(config).keywords == {
    "size": 16,
    "dtype": np.float32,
    **config.augment,
  }
  train, _ = data.open_splits(config, tmp_path / "run")
  batch = next(build.host_batches(config, train, 1)(0))
  order = data.batch_indices(
    seed=5, step=0, batch_size=config.batch_size, num_examples=len(train)
  )
  np.testing.assert_array_equal(batch["image"], train.images[order])
  model = pretrain.make_model(config, num_classes=10)
  images = jax.ShapeDtypeStruct((1, 16, 16, 1), np.float32)
  jax.tree.map(
    np.testing.assert_array_equal,
    build.init(config, model, train),
    models.init(model, jax.random.key(5), images),
  )


def test_the_neighbours_are_those_of_the_config(tmp_path, monkeypatch):
  """The pixels of training images, where the network says nothing else."""

  def pixels(dataset):
    return dataset.images.reshape(len(dataset), -1).astype(np.float32)

  monkeypatch.setattr(
    predict,
    "make_predict",
    lambda *_, **__: lambda _, dataset, **__: {"h": pixels(dataset)},
  )
  config = resolved("pretrain", knn__num_neighbors=3, probe=False)
  train, test = data.open_splits(config, tmp_path / "run")
  model = pretrain.make_model(config, num_classes=10)
  evaluate = pretrain._make_evaluate(config, model, train, test)
  args = (pixels(train), train.labels, pixels(test), test.labels)
  want = probes.knn(*args, num_classes=10, k=3)
  assert evaluate(TrainState(0, {}, {}, ())) == want
  assert probes.knn(*args, num_classes=10)["top1"] < want["top1"] < 1


def test_metrics_of_pretraining(runs):
  folder, _ = runs
  text = (folder / "pretrain" / "metrics.jsonl").read_text()
  first, *_, last = [json.loads(line) for line in text.splitlines()]
  assert first["step"] == 1
  assert 0 < first["loss"] < 20
  assert first["learning_rate"] == 0
  assert {"contrastive_accuracy", "probe_accuracy"} <= first.keys()
  assert {"eval_top1", "eval_probe_top1"} <= last.keys()


def test_a_complete_run_is_not_repeated(runs, capsys):
  folder, results = runs
  again = run(
    distill,
    "digits",
    folder / "distill",
    **{"teacher": str(folder / "finetune"), "loss.label_weight": 0.5},
  )
  assert again == results["distill"]
  assert "is complete: 3 steps" in capsys.readouterr().out


def test_the_home_is_expanded(runs, monkeypatch):
  folder, results = runs
  monkeypatch.setenv("HOME", str(folder))
  fields = {"data.image_size": 8}
  again = run(pretrain, "digits,width=0.0625", "~/pretrain", **fields)
  assert again == results["pretrain"]


def test_a_run_cannot_end_before_where_it_is(runs, tmp_path):
  folder, _ = runs
  shutil.copytree(folder / "pretrain", tmp_path / "run")
  fields = {"data.image_size": 8, "num_steps": 2}
  with pytest.raises(UserError, match="done 3 steps already, more than the 2"):
    run(pretrain, "digits,width=0.0625", tmp_path / "run", **fields)
  stored = json.loads((tmp_path / "run" / "result.json").read_text())
  assert stored["num_steps"] == 3


@pytest.mark.parametrize(
  "name, images",
  [("pretrain", 1437), ("finetune", 14), ("linear", 1437), ("distill", 1437)],
)
def test_checkpoints_keep_what_was_trained_on(runs, name, images):
  extra = checkpoint.latest(runs[0] / name)[2]
  assert extra["num_images"] == images
  assert extra["label_names"] == list("0123456789")


def test_a_complete_run_tells_of_other_data(runs, monkeypatch, capsys):
  folder, results = runs
  monkeypatch.setattr(data.Dataset, "__len__", lambda self: 1438)
  fields = {"data.image_size": 8}
  again = run(pretrain, "digits,width=0.0625", folder / "pretrain", **fields)
  assert again == results["pretrain"]
  assert "began with 1437 images to train on" in capsys.readouterr().out
  before = (folder / "pretrain" / "config.json").read_text()
  with pytest.raises(UserError, match="began with 1437 images to train on"):
    run(
      pretrain,
      "digits,width=0.0625",
      folder / "pretrain",
      **fields,
      num_steps=4,
    )
  assert (folder / "pretrain" / "config.json").read_text() == before


def test_linear_evaluation_goes_on_where_its_network_was_trained_further(
  runs, tmp_path, capsys
):
  before, workdir = tmp_path / "before", tmp_path / "linear"
  shutil.copytree(runs[0] / "pretrain", before)
  shutil.copytree(runs[0] / "linear", workdir)
  fields = {"pretrained": str(before)}
  run(finetune, "digits,linear", workdir, **fields, num_steps=4)  # it moved
  longer = {"data.image_size": 8, "num_steps": 4}
  run(pretrain, "digits,width=0.0625", before, **longer)
  assert "another network" not in capsys.readouterr().out
  run(finetune, "digits,linear", workdir, **fields, num_steps=5)
  assert "another network than when this run began" in capsys.readouterr().out
  began = [checkpoint.latest(d)[2] for d in (runs[0] / "linear", workdir)]
  assert began[0]["pretrained"] == began[1]["pretrained"]


def test_a_student_keeps_its_teacher(runs, tmp_path, monkeypatch):
  folder, _ = runs
  shutil.copytree(folder / "distill", tmp_path / "run")
  load = checkpoint.load_described

  def trained_on(*args, **options):
    config, variables, about = load(*args, **options)
    return config, variables, about | {"hash": "another", "step": 5}

  monkeypatch.setattr(checkpoint, "load_described", trained_on)
  fields = {"teacher": str(folder / "finetune"), "loss.label_weight": 0.5}
  with pytest.raises(UserError, match=r"was at step 3 when .* now \(step 5\)"):
    run(distill, "digits", tmp_path / "run", **fields, num_steps=4)


def test_a_recipe_of_ones_own_continues_a_network(runs):
  folder, _ = runs
  config = cli.load_recipe("digits", stage="pretrain")
  set_field(config, "recipe", "mine")
  set_field(config, "pretrained", str(folder / "pretrain"))
  with pytest.raises(UserError, match=r"model.width is .*, but the checkpoint"):
    pretrain.resolve_network(config)  # its own fields were given
  stored, _ = checkpoint.load(folder / "pretrain")
  for name in (*build.ENCODER, *build.HEAD, *build.VIEW):
    set_field(config, name, flat(stored)[name])
  assert pretrain.resolve_network(config)["params"]


def test_the_bank_is_drawn_from_all_classes():
  config = cli.load_recipe("digits", stage="pretrain")
  labels = np.repeat(np.arange(-1, 10), 50)  # class by class
  set_field(config, "knn.bank_size", 1000)
  all_of_them = np.arange(50, 550)
  np.testing.assert_array_equal(pretrain._bank(config, labels), all_of_them)
  set_field(config, "knn.bank_size", 100)
  bank = pretrain._bank(config, labels)
  assert len(set(bank)) == 100 and np.all(np.diff(bank) > 0)
  assert set(labels[bank]) == set(range(10))
  np.testing.assert_array_equal(bank, pretrain._bank(config, labels))


def test_a_run_without_probe_and_bank_evaluates_nothing(tmp_path):
  """A line of nothing would be written again at each start."""
  fields = {"probe": False, "knn.bank_size": 0, "eval_every_steps": 2}
  fields |= {"data.image_size": 8}
  result = run(pretrain, "digits,width=0.0625", tmp_path, **fields)
  assert result["top1"] is None
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [sorted(json.loads(line))[:1] for line in lines] == [["alignment"]] * 3
  assert all(len(json.loads(line)) > 5 for line in lines)


def test_a_workdir_of_another_run_is_refused_before_data_is_read(
  runs, monkeypatch
):
  def open_splits(*args, **options):
    raise AssertionError("read")

  folder, _ = runs
  monkeypatch.setattr(data, "open_splits", open_splits)
  fields = {"data.image_size": 8, "seed": 3}
  with pytest.raises(UserError, match=r"config.seed was 0, is 3"):
    run(pretrain, "digits,width=0.0625", folder / "pretrain", **fields)
  with pytest.raises(UserError, match="holds a pretrain run, this is finetune"):
    run(finetune, "digits", folder / "pretrain")


@pytest.mark.parametrize(
  "config, found",
  [
    (cli.load_recipe("digits", stage="finetune"), "a config of finetune"),
    ({"seed": 0}, "a dict without a stage"),
    ("digits", "a str without a stage"),
    (None, "a NoneType without a stage"),
  ],
)
def test_a_config_of_another_stage(config, found, tmp_path):
  with pytest.raises(UserError, match=f"a config of pretrain, got {found};"):
    pretrain.train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_run_has_a_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for stage in (pretrain, finetune, distill):
    with pytest.raises(UserError, match="directory is empty; name a folder"):
      run(stage, "digits", "")
  with pytest.raises(UserError, match="directory is empty; name a folder"):
    checkpoint.load("")
  assert not list(tmp_path.iterdir())


def test_a_network_names_its_fields_and_prints_in_a_line(runs):
  folder, _ = runs
  with pytest.raises(UserError, match='"dtpye"; did you mean "dtype"'):
    network.load(folder / "finetune", dtpye="bfloat16")
  assert len(repr(network.load(folder / "finetune"))) < 500


def test_a_config_lacks_fields(tmp_path):
  config = cli.load_recipe("digits", stage="pretrain").unlock()
  config = config.copy_and_resolve_references()
  with config.unlocked():
    del config.knn, config.seed
  with pytest.raises(UserError, match=r"lacks knn.bank_size, knn.* seed"):
    pretrain.train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("text", ["", '{"a', "5"])
def test_a_damaged_file_of_a_run_is_named(runs, tmp_path, name, text):
  folder, _ = runs
  shutil.copytree(folder / "pretrain", tmp_path / "run")
  (tmp_path / "run" / name).write_text(text)
  with pytest.raises(UserError, match=f"{name} is damaged"):
    run(
      pretrain,
      "digits,width=0.0625",
      tmp_path / "run",
      **{"data.image_size": 8},
    )


def test_an_evaluation_split_has_labels(tmp_path):
  for i, place in enumerate(("train/a", "train/b", "test")):
    (tmp_path / place).mkdir(parents=True)
    for j in range(4):
      Image.new("RGB", (8, 8), (60 * i, 60 * j, 9)).save(
        tmp_path / place / f"{j}.png"
      )
  config = cli.load_recipe("folder", stage="pretrain")
  set_field(config, "data.name", f"folder:{tmp_path}")
  set_field(config, "data.eval_fraction", 0.0)
  set_field(config, "data.canvas_size", 8)
  with pytest.raises(UserError, match=r'"test" of .* no labelled image'):
    data.open_splits(config, tmp_path / "run")
  set_field(config, "data.eval_split", "")
  train, test = data.open_splits(config, tmp_path / "run")
  assert (len(train), test) == (8, None)


@pytest.mark.parametrize(
  "module, recipe, fields, message",
  [
    (
      finetune,
      "digits",
      {"pretrained": "{}/finetune"},
      "holds a finetune run, which has been trained on labels",
    ),
    (
      finetune,
      "digits",
      {"pretrained": "{}/none"},
      "config.pretrained: there is no directory",
    ),
    (
      finetune,
      "digits",
      {"pretrained": "{}/pretrain", "head_layer": 4},
      "head_layer is 4, but the head in the checkpoint",
    ),
    (
      finetune,
      "digits",
      {"pretrained": "{}/pretrain", "model.depth": 50},
      "config.model.depth is 50, but the checkpoint",
    ),
    (
      finetune,
      "digits",
      {"labels_per_class": 500},
      "labels_per_class is 500, but class",
    ),
    (
      finetune,
      "digits,labels=1",
      {"labels_per_class": 2},
      "give one of the two",
    ),
    (
      distill,
      "digits",
      {"teacher": "{}/pretrain"},
      "holds a pretrain run, which has no classifier",
    ),
    (distill, "digits", {}, "config.teacher is empty"),
    (
      distill,
      "digits",
      {"teacher": "{}/finetune", "pretrained": "{}/none"},
      "config.pretrained: there is no directory",
    ),
    (
      distill,
      "digits",
      {
        "teacher": "{}/finetune",
        "pretrained": "{}/pretrain",
        "model.depth": 34,
      },
      "block_2",
    ),
    (
      distill,
      "digits",
      {"teacher": "{}/finetune", "loss.label_weight": 2.0},
      "config.loss.label_weight must be at most 1, got 2.0",
    ),
    (
      pretrain,
      "digits",
      {"batch_size": 2000},
      'has 1437 images in split "train", fewer than config.batch_size=2000',
    ),
    (pretrain, "digits", {"batch_size": 30}, "which 8 devices do not divide"),
    (pretrain, "digits", {"model.depth": 19}, "model.depth: got 19, allowed"),
    (pretrain, "digits", {"head.width": 0.0}, "head.width: got 0.0, must be"),
    (
      pretrain,
      "digits",
      {"model.bn_group_size": 3},
      "config.model.bn_group_size is 3, which does not divide the 8 devices",
    ),
    (
      pretrain,
      "digits",
      {"augment.area_range": (0.0, 1.0)},
      "augment.area_range is (0.0, 1.0)",
    ),
    (
      finetune,
      "digits",
      {"pretrained": "{}/pretrain", "augment.flip_probability": 2.0},
      "flip_probability",
    ),
    (
      finetune,
      "digits",
      {"pretrained": "{}/pretrain", "freeze_after_block": 7},
      "freeze_after_block: got 7",
    ),
    (
      distill,
      "digits",
      {"teacher": "{}/finetune", "augment.area_range": (0.5, 0.2)},
      "augment.area_range is (0.5, 0.2)",
    ),
    (
      distill,
      "digits",
      {"teacher": "{}/finetune", "model.width": -0.5},
      "width",
    ),
    (
      pretrain,
      "cifar10",
      {"data.data_dir": "{}"},
      "datasets prepare cifar10",
    ),
  ],
)
def test_mistakes_leave_nothing_behind(
  runs, tmp_path, module, recipe, fields, message
):
  folder, _ = runs
  fields = {
    k: v.format(folder) if isinstance(v, str) else v for k, v in fields.items()
  }
  workdir = tmp_path / "run"
  with pytest.raises(UserError) as error:
    run(module, recipe, workdir, **fields)
  assert message in str(error.value)
  assert "\n" not in str(error.value)
  assert not workdir.exists()
