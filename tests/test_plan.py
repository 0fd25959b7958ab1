"""The plan of a run: what it says holds for the run, and mistakes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from made_run import make_run

from simclr_jax import build, cli, flops, parallel, plan, pretrain
from simclr_jax.config import UserError, set_field


@pytest.fixture(scope="module")
def config():
  """The tiniest network; 8 devices with 4 images each."""
  config = cli.load_recipe("digits", stage="pretrain")
  config.batch_size = 32
  config.model.width = 0.0625
  config.model.dtype = "float32"
  return config


@pytest.fixture(scope="module")
def planned(config):
  return plan.plan(config, peak_tflops=1.0, utilisation=0.5, memory_gib=1.0)


def test_the_sums_are_those_of_the_run(config, planned):
  """State and batch as bytes of the real ones; steps and hours by hand."""
  config = config.copy_and_resolve_references()
  build.resolve(config)
  model = build.make_model(config, num_classes=10, head_layer=0, probe=True)
  shape = (1, 16, 16, 1)
  images = np.zeros(shape, np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  size = 4 * sum(x.size for x in jax.tree.leaves(variables))
  params = 4 * sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert planned["state"] - size - params in (4, 8)  # step, and LARS's count
  assert planned["input"] == 3 * 4 * (8 * 8 + 2 * 4 + 4)
  parts = [planned[k] for k in ("state", "input", "activations")]
  assert planned["total"] == sum(parts)
  assert planned["num_steps"] == 1437 * 35 // 32 + 1
  seconds = planned["flops"] * planned["num_steps"] / 0.5e12
  assert planned["hours"] == pytest.approx(seconds / 3600)
  assert planned["fits"] is True
  assert planned["ways"] == {}


def test_flops_are_three_forward_passes(config, planned):
  """Of 8 views a device; the first gradient of all is not needed."""
  config = config.copy_and_resolve_references()
  config.model.conv = "xla"
  build.resolve(config)
  model = build.make_model(config, num_classes=10, head_layer=0, probe=True)
  views = jax.ShapeDtypeStruct((8, 16, 16, 1), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), views)
  forward = flops.count(model.apply, variables, views)
  assert 2.8 * forward < planned["flops"] < 3.2 * forward


def test_nothing_of_the_size_of_the_batch_is_allocated(config, monkeypatch):
  """A batch of 2**24 images, by its shapes alone, without compiling."""
  seen = []

  class Stop(Exception):
    pass

  def stub(step, donate_argnums):
    class Lowered:
      def lower(self, *shapes):
        seen.append(shapes)
        raise Stop

    return Lowered()

  monkeypatch.setattr(parallel, "pmap", stub)
  large = config.copy_and_resolve_references()
  large.batch_size = 2**24
  with pytest.raises(Stop):
    plan.plan(large)
  leaves = jax.tree.leaves(seen)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  assert sum(x.size for x in leaves) > 2**30


def test_ways_are_what_is_not_done_yet(config):
  names = [name for name, _ in plan.ways(config, num_devices=8)]
  assert names == [
    "model.dtype=bfloat16",
    "model.remat=true",
    "all of these",
    "16 devices",
    "32 devices",
  ]
  other = config.copy_and_resolve_references()
  other.batch_size = 4096
  other.model.update(dtype="bfloat16", remat=True)
  ways = dict(plan.ways(other, num_devices=8))
  assert ways["loss.block_size=256"] == {"loss.block_size": 256}
  assert ways["64 devices"] == {"batch_size": 512}
  assert "all of these" not in ways


def test_ways_are_tried_where_it_does_not_fit(config, monkeypatch, capsys):
  needs = {"float32": 3 * 2**30, "bfloat16": 2**30}

  def estimate(config, **_):
    total = needs[config.model.dtype]
    return dict.fromkeys(("state", "input", "activations"), 0) | {
      "total": total,
      "flops": 1e12,
      "seconds": 1.0,
    }

  monkeypatch.setattr(plan, "estimate", estimate)
  found = plan.plan(config, memory_gib=2)
  assert found["fits"] is False
  assert found["ways"]["model.dtype=bfloat16"] == 2**30
  assert found["ways"]["model.remat=true"] == 3 * 2**30
  assert plan.plan(config, memory_gib=3)["fits"] is True
  lines = capsys.readouterr().out.splitlines()
  assert any("bfloat16" in line and line.endswith("yes") for line in lines)
  assert any("remat" in line and line.endswith("no") for line in lines)


@pytest.mark.slow
def test_every_kind_of_step_is_planned(config, monkeypatch):
  """The memory of negatives belongs to the state."""
  calls = []
  make_step = pretrain.make_step

  def spy(*args, **options):
    calls.append(args)
    return make_step(*args, **options)

  monkeypatch.setattr(pretrain, "make_step", spy)
  config = config.copy_and_resolve_references()
  config.memory.size = 64
  build.resolve(config)
  known = {"num_devices": 8, "num_classes": 10, "channels": 1}
  plain = plan.estimate(config, **known)
  assert len(calls) == 1
  queue = 64 * config.head.dim * 4
  assert plain["state"] > 3 * queue
  # A CPU has no bfloat16; what an accelerator needs is half as much.
  config.model.dtype = "bfloat16"
  halved = plan.estimate(config, **known)
  assert halved["activations"] == plain["activations"] // 2


@pytest.mark.parametrize(
  "options, message",
  [
    ({"utilisation": 40.0}, "--utilisation=40 must be above 0 and at most 1"),
    ({"utilisation": float("nan")}, "--utilisation=nan must be above 0"),
    ({"memory_gib": -1.0}, "--memory_gib=-1.0 must be from 0 to 1000000"),
    ({"memory_gib": float("nan")}, "--memory_gib=nan must be from 0 to"),
    ({"peak_tflops": float("nan")}, "--peak_tflops=nan must be from 0 to"),
    ({"peak_tflops": float("inf")}, "--peak_tflops=inf must be from 0 to"),
    ({"images": 10**400}, "000 must be from 0 to 1000000000000"),
    ({"devices": -1}, "--devices=-1 must be from 0 to 4096"),
    ({"devices": 3}, "--devices=3, but JAX has 8 here"),
  ],
)
def test_mistakes_get_one_line(config, options, message):
  with pytest.raises(UserError) as error:
    plan.plan(config, **options)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--device=2"], 'flag --device; did you mean "devices"? Flags: --config'),
    ([], "--config is missing"),
    (["--config=digits", "--output={}"], "is a folder; give a file's name"),
    (["--config=digits", "--output={}/no/a"], "there is no such folder"),
    (["--config=digits", "--images=many"], "--images takes int, as --images=N"),
  ],
)
def test_mistakes_end_the_command(argv, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    plan.main([arg.format(tmp_path) for arg in argv])
  assert ended.value.code == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
  "number", ["5000", "1000000", "9" * 20, "-" + "9" * 20]
)
def test_no_device_is_made_of_a_number_out_of_range(
  number, monkeypatch, capsys
):
  """A million would take JAX hours."""
  made = []
  monkeypatch.setattr(jax.config, "update", lambda *args: made.append(args))
  with pytest.raises(SystemExit) as ended:
    plan.main(["--config=pretrain.py:digits", f"--devices={number}"])
  assert ended.value.code == 2 and not made
  error = capsys.readouterr().err
  assert error == f"error: --devices={number} must be from 0 to 4096.\n"


def test_a_dataset_that_is_not_there_leaves_hours_out(config, tmp_path, capsys):
  images = plan._images(config, 0)
  assert images == (1437, {"num_classes": 10, "channels": 1})
  other = config.copy_and_resolve_references()
  other.data.update(name="tfds:cifar10", data_dir=str(tmp_path))
  assert plan._images(other, 0) == (0, {})
  assert "give --images=N" in capsys.readouterr().out
  assert plan._images(other, 7) == (7, {})


def test_the_bare_recipe_of_a_folder_is_not_planned(monkeypatch, capsys):
  """Unless the number of images is given; what is assumed then is said."""
  monkeypatch.setattr(
    plan,
    "estimate",
    lambda config, **known: (
      known
      | dict.fromkeys(("total", "state", "input", "activations", "seconds"), 0)
      | {"flops": 1.0}
    ),
  )
  config = cli.load_recipe("folder", stage="pretrain")
  with pytest.raises(UserError) as error:
    plan.plan(config)
  assert str(error.value) == (
    'config.data.name is "folder:"; name the folder of the images '
    "(--config.data.name=folder:PATH), or say how many: --images=N."
  )
  found = plan.plan(config, images=5120)
  out = capsys.readouterr().out
  assert found["channels"] == 3 and found["num_classes"] == 1000
  assert (
    "plan: assuming 3 channels and 1000 classes, as folder: cannot be opened\n"
  ) in out
  assert "such as 312 (A100), 989 (H100)" in out


def test_the_network_of_a_checkpoint_is_planned(config, monkeypatch):
  def resolve_network(config):
    set_field(config, "model.width", 0.125)

  def estimate(config, **options):
    return {
      "total": config.model.width,
      "flops": 1.0,
      "seconds": 0.0,
    } | dict.fromkeys(("state", "input", "activations"), 0)

  monkeypatch.setattr(pretrain, "resolve_network", resolve_network)
  monkeypatch.setattr(plan, "estimate", estimate)
  assert plan.plan(config)["total"] == 0.125


@pytest.mark.slow
def test_the_command(tmp_path):
  """Flags like a stage's, JSON, exit code 2 and one line for a mistake."""

  def run(*flags):
    return subprocess.run(
      [sys.executable, "-m", "simclr_jax.plan", *flags],
      capture_output=True,
      text=True,
      env={"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path), "PATH": "/bin"},
    )

  output = tmp_path / "plan.json"
  done = run(
    "--config=pretrain.py:digits",
    "--config.model.width=0.0625",
    "--devices=2",
    "--peak_tflops=100",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr
  assert "2 cpu device(s)" in done.stdout
  assert "hours at 40% of 100 TFLOP/s" in done.stdout
  assert json.loads(output.read_text())["num_steps"] == 197
  for flags, message in (
    (["--config=digits", "--memory_gib=x"], "--memory_gib takes float, as --m"),
    (["--config=digits", "--memory=1"], "unknown flag --memory"),
    (["--config=digits", f"--output={tmp_path}/no/x"], "no such folder"),
  ):
    done = run(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.slow
def test_the_other_stages_are_planned(tmp_path):
  """State by hand: frozen parameters have no momentum, a teacher has none."""

  def numbers(variables):
    return 4 * sum(x.size for x in jax.tree.leaves(variables))

  names = [str(i) for i in range(10)]
  _, before = make_run(tmp_path / "before", stage="pretrain", channels=1)
  _, tuned = make_run(
    tmp_path / "tuned", channels=1, num_classes=10, names=names
  )
  config = cli.load_recipe("digits,linear", stage="finetune")
  config.pretrained = str(tmp_path / "before")
  config.label_percent, config.num_steps, config.num_epochs = 10.0, 0, 9.0
  found = plan.plan(config)
  classifier = 4 * 10 * (32 + 1)  # kernel and bias, with Adam's two moments
  assert 0 <= found["state"] - numbers(before) - 3 * classifier <= 16
  assert found["num_steps"] == 9 * 143 // 64 + 1  # of a tenth of the images
  config = cli.load_recipe("digits", stage="distill")
  config.teacher = str(tmp_path / "tuned")
  found = plan.plan(config)
  student = numbers(tuned) + numbers(tuned["params"])
  assert 0 <= found["state"] - student - numbers(tuned) <= 8
  assert found["flops"] > 0
