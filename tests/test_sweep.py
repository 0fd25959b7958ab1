"""The sweep: its grid, failures and locks, and a real one that is killed."""

import csv
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import matplotlib.figure
import pytest

from simclr_jax import cli
from simclr_jax import config as config_lib
from simclr_jax.sweep import claims as claims_lib
from simclr_jax.sweep import figure as figure_lib
from simclr_jax.sweep import findings as findings_lib
from simclr_jax.sweep import grid, results, running
from simclr_jax.sweep.__main__ import _part, main

SIZES = ["18x0.125", "34x0.25"]


def cells(**changes):
  return grid.make_cells(
    **{
      "recipe": "digits",
      "sizes": SIZES,
      "percents": [1.0, 100.0],
      "seeds": [0, 3],
      "methods": list(grid.METHODS),
    }
    | changes
  )


class Fakes:
  """Stages that leave a result at once; `broken` names those that fail."""

  def __init__(self):
    self.ran, self.broken, self.error = [], set(), RuntimeError("out of luck")

  def train(self, config, workdir):
    workdir = pathlib.Path(workdir)
    self.ran.append(workdir.name)
    if workdir.name in self.broken:
      raise self.error
    needs = config.get("teacher") or config.pretrained
    assert not needs or (pathlib.Path(needs) / "result.json").exists()
    leave(workdir, 0.5 + 0.1 * config.seed)


def leave(folder, top1):
  folder.mkdir(exist_ok=True)
  result = dict(top1=top1, top5=1.0, num_steps=3, seconds=1.5)
  (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def fakes(monkeypatch):
  fakes = Fakes()
  module = types.SimpleNamespace(train_and_evaluate=fakes.train)
  monkeypatch.setattr(running, "STAGES", dict.fromkeys(running.STAGES, module))
  monkeypatch.setattr(cli, "setup", lambda: None)
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
  return fakes


def start(workdir, *flags):
  return main([f"--workdir={workdir}", "--sizes=18x0.125,34x0.25", *flags])


def test_the_grid_is_complete_and_every_command_parses(tmp_path):
  names = [cell.name for cell in cells()]
  # Per size and seed one encoder, and 2 fractions of 5 methods or, where the
  # network is the small one already, 4.
  assert len(names) == len(set(names)) == 2 * (1 + 2 * 4) + 2 * (1 + 2 * 5)
  for i, cell in enumerate(cells()):
    assert cell.needs is None or cell.needs in names[:i]
    flags = grid.command(cell, tmp_path)
    config, folder = cli.parse(flags, stage=cell.stage)
    assert folder == str(tmp_path / cell.name)
    assert config.seed == cell.seed
    if cell.stage == "finetune":
      assert config.label_percent == cell.percent
      assert (config.freeze_after_block == 4) == (cell.method == "linear")
    if cell.method in ("pretrain", "scratch"):
      size = f"{config.model.depth}x{config.model.width:g}"
      assert size == cell.size
    elif cell.method == "distill":
      assert (config.model.depth, config.model.width) == (18, 0.125)
    else:
      assert config.model.depth == 0  # the network's that it starts from


def test_a_method_brings_what_it_needs():
  few = cells(methods=["distill"], percents=[1.0], seeds=[0])
  assert [cell.method for cell in few] == [
    "pretrain",
    "finetune",
    "self_distill",
    "distill",
  ]
  assert {cell.size for cell in few} == {"34x0.25"}


def test_fields_reach_the_runs_of_their_stage(tmp_path):
  fields = [("config", "num_steps=7"), ("distill", "loss.temperature=0.5")]
  for cell in cells(fields=fields):
    config, _ = cli.parse(grid.command(cell, tmp_path), stage=cell.stage)
    assert config.num_steps == 7
    if cell.stage == "distill":
      assert config.loss.temperature == 0.5


def test_parts_of_a_grid(tmp_path):
  parts = [_part(cells(), f"{i}/3") for i in range(3)]
  assert sorted(c.name for part in parts for c in part) == sorted(
    c.name for c in cells()
  )
  for part in parts:
    names = {c.name for c in part}
    assert all(c.needs is None or c.needs in names for c in part)
  assert _part(cells(), "") == cells()


def test_finished_cells_are_not_repeated(fakes, tmp_path):
  assert start(tmp_path) == 0
  ran = list(fakes.ran)
  assert sorted(ran) == sorted(
    c.name for c in cells(seeds=[0, 1, 2], percents=[1, 10, 100])
  )
  (tmp_path / ran[4] / "result.json").unlink()
  assert start(tmp_path) == 0
  assert fakes.ran[len(ran) :] == [ran[4]]


def test_a_failure_does_not_end_the_others(fakes, tmp_path, capsys):
  flags = ("--seeds=0", "--labels=1")
  fakes.broken = {"finetune_18x0.125_1_seed0"}
  assert start(tmp_path, *flags) == 1
  assert "self_distill_18x0.125_1_seed0" not in fakes.ran
  assert "distill_34x0.25_1_seed0" in fakes.ran
  out, err = capsys.readouterr()
  assert "failed: self_distill_18x0.125_1_seed0 needs finetune_18" in out
  assert "RuntimeError: out of luck" in err
  assert err.count("/error.txt") == 1  # the other has none
  report = tmp_path / "finetune_18x0.125_1_seed0" / "error.txt"
  assert "Traceback" in report.read_text()
  assert report.read_text().startswith("$ python -m simclr_jax.finetune --conf")
  ran, fakes.broken = len(fakes.ran), set()
  assert start(tmp_path, *flags) == 0
  assert fakes.ran[ran:] == [
    "finetune_18x0.125_1_seed0",
    "self_distill_18x0.125_1_seed0",
  ]
  assert not report.exists()


def test_a_cell_of_another_process_is_waited_for(fakes, tmp_path, monkeypatch):
  name = "pretrain_18x0.125_seed0"
  (tmp_path / ".locks").mkdir()
  handle = (tmp_path / ".locks" / name).open("w")
  fcntl.flock(handle, fcntl.LOCK_EX)
  waits = []

  def finish(seconds):
    """What the other process does while this one waits."""
    waits.append(list(fakes.ran))
    leave(tmp_path / name, 0.9)
    handle.close()

  monkeypatch.setattr(running.time, "sleep", finish)
  some = cells(sizes=SIZES[:1], percents=[1.0], seeds=[0])
  assert running.run_cells(some, tmp_path) == []
  # Only what does not need it ran before; it was not run here at all.
  assert waits == [["scratch_18x0.125_1_seed0"]]
  assert name not in fakes.ran
  assert len(fakes.ran) == 4


def test_a_file_system_without_locks(fakes, tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(38, "Function not implemented")

  monkeypatch.setattr(fcntl, "flock", refuse)
  assert start(tmp_path, "--seeds=0") == 2
  assert "without locks (Function not implemented)" in capsys.readouterr().err
  assert start(tmp_path, "--seeds=0", "--task=0/2") == 0
  assert {name.split("_")[-2] for name in fakes.ran} >= {"18x0.125"}
  assert not any("34x0.25" in name for name in fakes.ran)


def test_csv_table_and_figure(fakes, tmp_path, capsys):
  start(
    tmp_path, "--seeds=0,1,2", "--labels=1,10", "--methods=scratch,finetune"
  )
  with (tmp_path / "label_efficiency.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 2 * 3 * (1 + 2 * 2)
  assert rows[1] == {
    "method": "scratch",
    "size": "18x0.125",
    "label_percent": "1.0",
    "seed": "0",
    "top1": "0.5",
    "top5": "1.0",
    "num_steps": "3",
    "seconds": "1.5",
    "run": "scratch_18x0.125_1_seed0",
  }
  # 0.5, 0.6 and 0.7 over the seeds.
  out = capsys.readouterr().out
  assert "from scratch  18x0.125      1%  60.0% ± 10.0%      3" in out
  figure = matplotlib.figure.Figure()
  figure_lib.draw(
    figure,
    results.collect(cells(seeds=[0, 1, 2], percents=[1.0, 10.0]), tmp_path),
  )
  assert [ax.get_title() for ax in figure.axes] == [
    "from scratch",
    "fine-tuned",
  ]
  for ax in figure.axes:
    lines = [c.lines[0] for c in ax.containers]
    assert len(lines) == len(SIZES)
    for line in lines:
      assert line.get_xydata().tolist() == [
        pytest.approx([1, 0.6]),
        pytest.approx([10, 0.6]),
      ]
  svg = (tmp_path / "label_efficiency.svg").read_bytes()
  assert b"<svg" in svg
  png = (tmp_path / "label_efficiency.png").read_bytes()
  assert png[:4] == b"\x89PNG"
  start(
    tmp_path, "--seeds=0,1,2", "--labels=1,10", "--methods=scratch,finetune"
  )
  assert (tmp_path / "label_efficiency.svg").read_bytes() == svg


CLAIMS = {"recipe": "digits", "sizes": SIZES, "percents": [1.0, 100.0]}


def test_the_runs_of_the_claims(tmp_path):
  planned = claims_lib.make_claim_cells(**CLAIMS, seeds=[0, 3])
  names = [cell.name for cell in planned]
  assert len(names) == len(set(names))
  configs = {}
  for i, cell in enumerate(planned):
    assert cell.needs is None or cell.needs in names[:i]
    flags = grid.command(cell, tmp_path)
    configs[cell.name], _ = cli.parse(flags, stage=cell.stage)
  for claim in claims_lib.make_claims(**CLAIMS):
    for method, size in (claim.better, claim.worse):
      for seed in (0, 3):
        name = grid.cell_name(method, size, claim.percent, seed)
        config = configs.pop(name, None) or configs[name + "?"]
        configs[name + "?"] = config  # seen
        assert config.seed == seed
        if "finetune" in name:
          assert config.label_percent == claim.percent
  compared = {name for name in configs if name[-1] == "?"}
  left = {name.split("_seed")[0] for name in configs.keys() - compared}
  assert left == {  # what the others start from
    "pretrain_18x0.125",
    "pretrain_34x0.25",
    "pretrain_head2_34x0.25",
    "pretrain_head1_34x0.25",
    "self_distill_34x0.25_1",
  }


def test_a_claim_differs_in_one_thing(tmp_path):
  """Beside what it is about, both runs have the same config."""
  planned = claims_lib.make_claim_cells(**CLAIMS, seeds=[0])
  configs = {}
  for cell in planned:
    flags = grid.command(cell, tmp_path)
    config, _ = cli.parse(flags, stage=cell.stage)
    configs[cell.name] = config_lib.flat(config)
  different = {}
  for claim in claims_lib.make_claims(**CLAIMS):
    sides = [
      configs[grid.cell_name(*side, claim.percent, 0)]
      for side in (claim.better, claim.worse)
    ]
    different[claim.text, claim.percent] = {
      name
      for name in sides[0].keys() | sides[1].keys()
      if sides[0].get(name) != sides[1].get(name)
    }
  head = "a head of 3 layers is better than of"
  layer = (
    "fine-tuning from the head's first layer is better than from its input"
  )
  assert different[f"{head} 2 layers", 1.0] == {"pretrained"}
  assert different[f"{head} 1 layer", 1.0] == {"pretrained", "head_layer"}
  assert different[layer, 1.0] == different[layer, 100.0] == {"head_layer"}
  labelled = "distilling on all images is better than on the labelled ones"
  assert different[labelled, 1.0] == {
    "only_labelled",
    "num_epochs",
    "optim.warmup_epochs",
  }
  # Heads are compared with few labels alone.
  all_labels = CLAIMS | {"percents": [100.0], "seeds": [0]}
  names = [cell.name for cell in claims_lib.make_claim_cells(**all_labels)]
  assert not any("head" in name for name in names)
  first = "self-distilling the teacher first is better"
  assert different[first, 1.0] == {"teacher"}
  assert configs["distill_labelled_34x0.25_1_seed0"]["num_epochs"] == 1500


def test_verdicts_of_claims(fakes, tmp_path, capsys):
  flags = ["--claims", "--seeds=0,1", "--labels=10"]
  assert start(tmp_path, *flags) == 0
  # Every accuracy is the same for a seed, so that nothing gains.
  assert capsys.readouterr().out.count("does not hold") == 7

  def accuracies(method, *values):
    for seed, top1 in enumerate(values):
      leave(tmp_path / f"{method}_34x0.25_10_seed{seed}", top1)

  accuracies("finetune", 0.8, 0.9)
  accuracies("finetune_head1", 0.7, 0.6)
  accuracies("finetune_head2", 0.81, 0.6)
  assert start(tmp_path, *flags) == 0
  table = (tmp_path / "claims.md").read_text()
  head = "| a head of 3 layers is better than of"
  assert (
    f"{head} 1 layer | 10% | 85.0% ± 7.1% | 65.0% ± 7.1% | +20.0% ± 14.1% | "
    "holds |"
  ) in table
  assert f"{head} 2 layers | 10% | 85.0% ± 7.1% | 70.5% ± 14.8%" in table
  assert "| +14.5% ± 21.9% | not for each seed |" in table
  with (tmp_path / "claims.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 7 * 2
  assert findings_lib.to_markdown(
    findings_lib.to_table(findings_lib.read_csv(tmp_path / "claims.csv"))
  ) == table.rstrip("\n")


def test_the_page_shows_grid_and_claims(fakes, tmp_path):
  flags = ["--seeds=0,1", "--labels=1,10"]
  assert start(tmp_path, *flags) == 0
  page = (tmp_path / "report.html").read_text()
  assert page.count("<svg") == 1
  assert "self-distilled" in page
  assert "Claims" not in page
  ran = len(fakes.ran)
  assert start(tmp_path, *flags, "--claims") == 0
  repeated = set(fakes.ran[:ran]) & set(fakes.ran[ran:])
  assert not repeated  # both use the same cells
  page = (tmp_path / "report.html").read_text()
  assert page.count("<svg") == 1
  assert "fine-tuning from the head&#39;s first layer is better" in page


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--claims", "--methods=linear"], "--methods does not go with --claims"),
    (["--labels=0"], "--labels: above 0 and at most 100, got 0."),
    (["--claims", "--sizes=18x1"], "claims compare two sizes"),
    (["--methods=scrach"], 'did you mean "scratch"?'),
    (["--sizes=18"], 'depth x width, such as 18x0.25'),
    (["--sizes=19x1"], "19"),
    (["--labels=1,ten"], "--labels: numbers"),
    (["--task=2/2"], "--task: I/N with I from 0 to N - 1"),
    (["--frobnicate"], "unknown flag --frobnicate"),
    (["--pretrain.num_step=3"], "did you mean"),
    (["--pretrain.num_steps=few"], "num_steps"),
    (["--recipe=imagenet"], "--sizes is missing"),
    (["--recipe=digit"], 'did you mean "digits"?'),
    (["--pretrain.foo=1"], "unknown field --pretrain.foo"),
    (["--config.foo=1"], "unknown field --config.foo"),
    (["--pretrain.num_steps=few"], "--pretrain.num_steps"),
    (["--pretrain.batch_size=-1"], "error: pretrain.batch_size must be ab"),
    (["--config.batch_size=-1"], "error: config.batch_size must be above 0"),
    (["--seeds=-1"], "--seeds: 0 or more and below 2**32, got -1."),
    (["--seeds=0,4294967296"], "--seeds: 0 or more and below 2**32, got 0,429"),
    (["--sizes=18xinf"], 'depth x width, such as 18x0.25'),
    (["--sizes=18x1e308"], 'depth x width, such as 18x0.25'),
    (["--config.seed=3"], "--config.seed cannot be given: the grid sets it, "),
    (["--finetune.label_percent=5"], "the grid sets it, from --labels."),
    (["--pretrain.model.width=1"], "the grid sets it, from --sizes."),
    (["--finetune.pretrained=runs/x"], "from the cells that each one needs."),
    (["--distill.loss.label_weight=3"], "loss.label_weight must be at most 1"),
    (["--config.recipe=cifar10"], "--config.recipe cannot be given; it is"),
    (["--task=²/3"], "--task: I/N with I from 0 to N - 1"),
  ],
)  # fmt: skip
def test_mistakes(fakes, tmp_path, flags, message, capsys):
  assert main([f"--workdir={tmp_path}", *flags]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
  assert fakes.ran == []


def test_a_folder_that_cannot_be_written(fakes, tmp_path, capsys, monkeypatch):
  file = tmp_path / "file"
  file.write_text("mine")
  monkeypatch.chdir(tmp_path)
  for workdir, message in (
    (file, f"--workdir={file} cannot be written: Not a directory."),
    (file / "x", f"--workdir={file}/x cannot be written: Not a directory."),
    (
      "gs://b/x",
      "--workdir=gs://b/x is in a bucket, which has no locks; give a",
    ),
    ("", "--workdir is empty; name a folder."),
  ):
    assert start(workdir) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
  assert fakes.ran == []
  assert os.listdir(tmp_path) == ["file"]


def test_a_finished_sweep_that_cannot_be_written(
  fakes, tmp_path, capsys, monkeypatch
):
  flags = ("--seeds=0", "--labels=1", "--methods=scratch")
  assert start(tmp_path, *flags) == 0

  def refuse(*_):
    raise OSError(30, "Read-only file system")

  monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
  assert start(tmp_path, *flags) == 2
  assert capsys.readouterr().err == (
    f"error: --workdir={tmp_path} cannot be written: Read-only file system.\n"
  )


def test_a_folder_that_cannot_be_looked_into(fakes, capsys, monkeypatch):
  """As it is where another user's home is named."""

  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "exists", refuse)
  assert start("/elsewhere/x") == 2
  assert capsys.readouterr().err == (
    "error: --workdir=/elsewhere/x cannot be written: Permission denied.\n"
  )


def test_what_is_given_twice_counts_once(fakes, tmp_path, capsys):
  flags = ["--seeds=0,0", "--labels=1,1.0", "--methods=scratch"]
  sizes = "--sizes=18x0.125,18x0.125"
  assert main([f"--workdir={tmp_path}", sizes, *flags]) == 0
  assert fakes.ran == ["scratch_18x0.125_1_seed0"]
  assert "\n1 of 1 cells" in capsys.readouterr().out


def test_another_sweep_in_the_same_folder_is_refused(fakes, tmp_path, capsys):
  cell = cells()[0]
  config, folder = cli.parse(grid.command(cell, tmp_path), stage=cell.stage)
  os.makedirs(folder)
  file = pathlib.Path(folder) / "config.json"
  file.write_text(json.dumps(config.to_dict()))
  assert start(tmp_path) == 0
  assert start(tmp_path, "--pretrain.num_epochs=3") == 2
  error = capsys.readouterr().err
  assert "holds another run: config.num_epochs was 35.0, is 3.0" in error
  file.write_text('{"a":')
  assert start(tmp_path) == 2
  error = capsys.readouterr().err
  assert re.fullmatch(r"error: .*config.json is damaged: .*workdir\.\n", error)


def test_pretraining_may_begin_from_other_weights(tmp_path):
  made = cells(fields=[("pretrain", "pretrained=runs/official")])
  config, _ = cli.parse(grid.command(made[0], tmp_path), stage="pretrain")
  assert config.pretrained == "runs/official"


@pytest.mark.slow
def test_a_sweep_that_is_killed_is_continued_by_two(tmp_path):
  command = [
    *(sys.executable, "-m", "simclr_jax.sweep", f"--workdir={tmp_path}"),
    *("--sizes=18x0.0625", "--labels=10", "--seeds=0"),
    *("--config.num_steps=3", "--config.batch_size=32"),
    *("--config.model.conv=xla", "--pretrain.data.image_size=8"),
  ]
  env = os.environ | {"XLA_FLAGS": ""}
  first = subprocess.Popen(command, env=env)
  end = time.monotonic() + 300
  while not (found := list(tmp_path.glob("*/result.json"))):
    assert first.poll() is None and time.monotonic() < end
    time.sleep(0.1)
  while len(list(tmp_path.glob("*/config.json"))) < 2:
    assert first.poll() is None and time.monotonic() < end
    time.sleep(0.02)
  first.send_signal(signal.SIGKILL)
  first.wait()
  before = {file: file.stat().st_mtime_ns for file in found}
  both = [
    subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  outputs = [process.communicate(timeout=500)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert {file: file.stat().st_mtime_ns for file in found} == before
  ran = [
    line for out in outputs for line in out.splitlines() if line[:2] == "$ "
  ]
  assert len(ran) == len(set(ran)) == 5 - len(found)  # each by one of the two
  assert all("5 of 5 cells" in out for out in outputs)
