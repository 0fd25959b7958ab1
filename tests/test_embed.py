"""Features in a file: their values, resuming, damage, memory, messages."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from etils import epath
from made_run import apply, make_run

from simclr_jax import augment, embed, evaluate, feature_file, network
from simclr_jax.config import UserError
from simclr_jax.data import order

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM = 37
BATCH = 16


def write_images(folder, num, *, classes=("cat", "dog"), side=8):
  rng = np.random.default_rng(0)
  for name in classes:
    (folder / name).mkdir(parents=True)
  for i in range(num):
    low, high = np.sort(rng.integers(0, 256, (2, 3)), axis=0)
    pixels = rng.integers(low, high + 1, (side, side, 3)).astype(np.uint8)
    name = folder / classes[i % len(classes)] / f"{i:05}.png"
    PIL.Image.fromarray(pixels).save(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(folder, settings, variables): run/ knows cow and dog, images/ cat, dog."""
  folder = tmp_path_factory.mktemp("embed")
  settings, variables = make_run(
    folder / "run", num_classes=2, names=["cow", "dog"]
  )
  write_images(folder / "images", NUM)
  return folder, settings, variables


def run(made, output, **options):
  folder = made[0]
  options = {"batch_size": BATCH} | options
  return embed.embed(
    folder / "run", f"folder:{folder / 'images'}", output, **options
  )


@pytest.fixture(scope="module")
def whole(made):
  path = made[0] / "whole.npz"
  return run(made, path), path


def test_a_row_is_what_the_network_says_of_that_file(made, whole):
  folder, settings, variables = made
  result, path = whole
  assert (result["num_images"], result["num_skipped"]) == (NUM, 0)
  with np.load(path, allow_pickle=False) as file:
    got = dict(file)
  assert set(got) == {
    *("features", "files", "labels", "predictions", "label_names", "about")
  }
  assert len(set(got["files"])) == NUM
  images = np.stack(
    [np.asarray(PIL.Image.open(folder / "images" / f)) for f in got["files"]]
  )
  views = augment.eval_view(images, size=8)
  want = apply(settings, variables, views, num_classes=2)
  assert got["features"].dtype == np.float32
  np.testing.assert_allclose(got["features"], want["h"], atol=2e-5)
  assert np.std(want["h"], axis=0).max() > 0.01  # images do differ
  np.testing.assert_array_equal(got["predictions"], want["logits"].argmax(1))
  # The classifier's names come first, then what only the folder has.
  assert got["label_names"].tolist() == ["cow", "dog", "cat"]
  folders = [got["label_names"][k] for k in got["labels"]]
  assert folders == [f.split("/")[0] for f in got["files"]]


def test_what_made_the_file_stands_in_it(made, whole):
  _, path = whole
  about = feature_file.read(path).about
  assert about["checkpoint"]["step"] == 7
  assert about["layer"] == "h"
  assert about["versions"]["jax"]
  assert about["device"].startswith("8 x ")
  assert "commit" in about


@pytest.mark.parametrize("layer, size", [("head_1", 32), ("z", 8)])
def test_other_layers_and_parquet(made, tmp_path, layer, size):
  run(made, tmp_path / "a.npz", layer=layer)
  run(made, tmp_path / "a.parquet", layer=layer)
  a, b = (feature_file.read(tmp_path / f"a.{s}") for s in ("npz", "parquet"))
  assert a.features.shape == (NUM, size)
  for field in ("features", "labels", "predictions"):
    np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert getattr(a, field).dtype == getattr(b, field).dtype
  assert a.label_names == b.label_names
  assert a.about == b.about


class Stop(Exception):
  """Stands for whatever ends a process."""


def stop_after(monkeypatch, num_batches):
  """Has the stream end so; returns the list of what it was asked for."""
  real, starts = network.stream, []

  def stream(*args, start, **options):
    starts.append(start)
    for i, rows in enumerate(real(*args, start=start, **options)):
      if i == num_batches:
        raise Stop
      yield rows

  monkeypatch.setattr(network, "stream", stream)
  return starts


def test_the_same_command_continues(made, whole, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(embed, "_PART_SECONDS", 0)  # a part a batch
  output = tmp_path / "out.npz"
  with monkeypatch.context() as patch:
    stop_after(patch, 2)
    with pytest.raises(Stop):
      run(made, output)
  assert not output.exists()
  parts = sorted((tmp_path / "out.npz.parts").glob("*.npz"))
  assert len(parts) == 2
  before = [part.read_bytes() for part in parts]

  with pytest.raises(UserError, match=r"another command's.*other: layer"):
    run(made, output, layer="z")
  assert [part.read_bytes() for part in parts] == before

  starts = stop_after(monkeypatch, 99)
  run(made, output)
  assert starts == [2 * BATCH]
  assert "continuing after 32 images" in capsys.readouterr().out
  assert list(tmp_path.iterdir()) == [output]
  with np.load(output) as got, np.load(whole[1]) as want:
    for name in ("features", "files", "labels", "predictions"):
      np.testing.assert_array_equal(got[name], want[name])


def test_a_batch_is_no_larger_than_what_there_is(made, whole, tmp_path):
  """Nothing of the size that was asked for is made, and no row changes."""
  output = tmp_path / "out.npz"
  assert run(made, output, batch_size=8 * 10**12)["num_images"] == NUM
  with np.load(output) as got, np.load(whole[1]) as want:
    for name in ("files", "labels", "predictions"):
      np.testing.assert_array_equal(got[name], want[name])
    np.testing.assert_allclose(got["features"], want["features"], atol=1e-6)
  make_run(tmp_path / "run", stage="pretrain", channels=1)
  scores = [
    evaluate.evaluate(
      checkpoint=str(tmp_path / "run"), probe_names="knn", batch_size=size
    )["results"][0]["top1"]
    for size in (8 * 10**12, 1440)
  ]
  assert scores[0] == scores[1]


@pytest.mark.parametrize(
  "batch_size, num_examples, want",
  [
    (16, 37, 16),
    (40, 37, 40),
    (48, 37, 40),
    (10**30, 37, 40),
    (10**30, 40, 40),
    (10**30, 0, 8),
    (12, 5, 12),  # no multiple, as is said of it later
    (0, 5, 0),
    (-8, 5, -8),
  ],
)
def test_what_a_batch_is_cut_to(batch_size, num_examples, want):
  got = order.at_most(batch_size, num_examples=num_examples, num_devices=8)
  assert got == want


def test_a_host_makes_its_own_part_of_the_positions():
  class Three:
    def __len__(self):
      return 3

    def gather(self, indices):
      return {"label": indices}

  hosts = 2**40
  for index, label, weight in ((0, 0, 1), (2, 2, 1), (hosts - 1, 0, 0)):
    (batch,) = order.eval_batches(
      Three(), batch_size=hosts, process_index=index, process_count=hosts
    )
    assert batch["label"] == [label] and batch["weight"] == [weight]


@pytest.mark.parametrize("option", [{"layer": "q"}, {"batch_size": -1}])
def test_evaluate_refuses_what_a_file_of_features_has_already(whole, option):
  with pytest.raises(UserError) as error:
    evaluate.evaluate(features=str(whole[1]), **option)
  assert str(error.value) == "--layer and --batch_size go with --checkpoint"


@pytest.mark.parametrize("mistake", ["damaged", "unreadable"])
def test_a_start_without_a_row_blocks_nothing(tmp_path, made, mistake):
  """The images are mended, and the same command is given again."""
  folder, output = tmp_path / "images", tmp_path / "new" / "out.npz"
  write_images(folder, NUM)
  files = sorted(folder.rglob("*.png"))
  hurt = files[:1] if mistake == "damaged" else files
  whole = {file: file.read_bytes() for file in hurt}
  options = {"on_error": "raise" if mistake == "damaged" else "skip"}
  mine = (made[0] / "run", f"folder:{folder}", output)
  for file in hurt:
    file.write_bytes(b"no image")
  with pytest.raises(UserError, match=r"can be read|not a readable image"):
    embed.embed(*mine, batch_size=BATCH, **options)
  assert not list((tmp_path / "new").iterdir())
  for file, content in whole.items():
    file.write_bytes(content)
  result = embed.embed(*mine, batch_size=BATCH, **options)
  assert result["num_images"] == NUM
  assert list((tmp_path / "new").iterdir()) == [output]


@pytest.mark.parametrize("left", ["", '{"checkpoint": {"wor', "{}", "5"])
def test_what_a_kill_left_without_a_row_blocks_nothing(made, tmp_path, left):
  parts = tmp_path / "out.npz.parts"
  parts.mkdir()
  (parts / "command.json").write_text(left)
  (parts / "command.draft").write_text("{")
  (parts / "000000000000-000000000016.draft").write_text("PK")
  assert run(made, tmp_path / "out.npz")["num_images"] == NUM
  assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


@pytest.mark.parametrize("content", ["", '{"checkpoint": {"wor', "5", None])
def test_rows_without_their_command(made, tmp_path, monkeypatch, content):
  output, parts = tmp_path / "out.npz", tmp_path / "out.npz.parts"
  monkeypatch.setattr(embed, "_PART_SECONDS", 0)
  with monkeypatch.context() as patch:
    stop_after(patch, 2)
    with pytest.raises(Stop):
      run(made, output)
  command = parts / "command.json"
  command.unlink()
  if content is not None:
    command.write_text(content)
  before = {path: path.read_bytes() for path in parts.iterdir()}
  with pytest.raises(UserError, match=r"command\.json is damaged; .*remove"):
    run(made, output)
  assert {path: path.read_bytes() for path in parts.iterdir()} == before


def test_the_command_is_noted_whole_or_not_at_all(made, tmp_path, monkeypatch):
  """Killed before the rename, and after it."""
  seen = []
  path_type = type(epath.Path())
  real = path_type.replace

  def replace(path, target):
    if target.name == "command.json":
      seen.append((target.exists(), path.read_text()))
    return real(path, target)

  monkeypatch.setattr(path_type, "replace", replace)
  run(made, tmp_path / "out.npz")
  ((existed, text),) = seen
  assert not existed
  assert json.loads(text)["layer"] == "h"


def test_skipped_images_alone_are_no_part(made, tmp_path, monkeypatch):
  monkeypatch.setattr(embed, "_PART_SECONDS", 0)  # a part a batch
  folder, output = tmp_path / "images", tmp_path / "out.npz"
  write_images(folder, NUM)
  for file in sorted(folder.rglob("*.png"))[: BATCH + 2]:
    file.write_bytes(b"no image")
  mine = (made[0] / "run", f"folder:{folder}", output)
  with monkeypatch.context() as patch:
    stop_after(patch, 1)
    with pytest.raises(Stop):
      embed.embed(*mine, batch_size=BATCH, on_error="skip")
  assert not output.with_name("out.npz.parts").exists()
  result = embed.embed(*mine, batch_size=BATCH, on_error="skip")
  assert result["num_skipped"] == BATCH + 2


def test_rows_of_other_images_are_not_continued(made, tmp_path, monkeypatch):
  monkeypatch.setattr(embed, "_PART_SECONDS", 0)
  folder, output = tmp_path / "images", tmp_path / "out.npz"
  write_images(folder, NUM)
  mine = (made[0] / "run", f"folder:{folder}", output)
  with monkeypatch.context() as patch:
    stop_after(patch, 1)
    with pytest.raises(Stop):
      embed.embed(*mine, batch_size=BATCH)
  (folder / "dog" / "00021.png").unlink()
  with pytest.raises(UserError, match=r"other: files of --data\); .*remove it"):
    embed.embed(*mine, batch_size=BATCH)
  (part,) = output.with_name("out.npz.parts").glob("*.npz")
  assert part.name == "000000000000-000000000016.npz"


def test_files_of_others_stay_in_the_folder_of_parts(made, tmp_path):
  parts = tmp_path / "out.npz.parts"
  parts.mkdir()
  (parts / "mine.txt").write_text("mine")
  with pytest.raises(UserError, match="no split"):
    run(made, tmp_path / "out.npz", split="tset")
  with embed._claimed(parts, {"a": 1}):
    pass
  assert [path.name for path in parts.iterdir()] == ["mine.txt"]


def test_two_processes_do_not_write_the_same_file(made, tmp_path):
  parts = tmp_path / "out.npz.parts"
  with embed._claimed(parts, {"a": 1}):
    with pytest.raises(UserError, match="written by another process"):
      run(made, tmp_path / "out.npz")


def test_a_damaged_image(made, tmp_path, whole):
  folder = tmp_path / "images"
  write_images(folder, NUM)
  (folder / "dog" / "00021.png").write_bytes(b"no image")
  mine = (made[0] / "run", f"folder:{folder}", tmp_path / "out.npz")
  with pytest.raises(UserError, match=r"dog/00021\.png.*--on_error=skip"):
    embed.embed(*mine, batch_size=BATCH)
  result = embed.embed(*mine, batch_size=BATCH, on_error="skip")
  assert (result["num_images"], result["num_skipped"]) == (NUM - 1, 1)
  with np.load(mine[2]) as got, np.load(whole[1]) as want:
    good = want["files"] != "dog/00021.png"
    assert good.sum() == NUM - 1
    for name in ("features", "files", "labels", "predictions"):
      np.testing.assert_array_equal(got[name], want[name][good])


def test_a_network_without_a_classifier(tmp_path):
  make_run(tmp_path / "run", stage="pretrain", channels=1)
  embed.embed(
    tmp_path / "run", "digits", tmp_path / "d.npz", split="test", batch_size=120
  )
  found = feature_file.read(tmp_path / "d.npz")
  assert found.features.shape == (360, 32)
  assert found.predictions is None
  assert found.label_names == tuple("0123456789")
  assert np.bincount(found.labels).min() > 30
  with np.load(tmp_path / "d.npz") as file:
    assert file["files"][359] == "digits/test/359"


def test_mistakes_get_one_line_and_touch_nothing(made, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  taken = tmp_path / "taken.npz"
  taken.write_text("mine")
  with pytest.raises(UserError, match=r"taken\.npz exists already"):
    run(made, taken)
  assert taken.read_text() == "mine"
  out = tmp_path / "x.npz"
  for options, message in (
    ({"layer": "head_3"}, "this network has h, head_1, head_2, z"),
    ({"batch_size": 12}, "multiple of the 8 devices"),
    ({"batch_size": -8}, "--batch_size: got -8, must be a multiple"),
    ({"eval_fraction": float("nan")}, "--eval_fraction: got nan, must be from"),
    ({"eval_fraction": 1.0}, "--eval_fraction: got 1, must be from 0 to below"),
    ({"eval_fraction": -0.2}, "--eval_fraction: got -0.2, must be from 0"),
    ({"on_error": "drop"}, 'allowed are "raise" and "skip"'),
    ({"split": "tset"}, 'no split "tset"'),
  ):
    with pytest.raises(UserError, match=message):
      run(made, out, **options)
  with pytest.raises(UserError, match=r"ends in \.npz or \.parquet"):
    run(made, tmp_path / "x.csv")
  with pytest.raises(UserError, match=r"gs://mine/x\.npz must be a local file"):
    run(made, "gs://mine/x.npz")
  with pytest.raises(UserError, match="--data: there is no folder"):
    embed.embed(made[0] / "run", f"folder:{tmp_path}/none", out)
  with pytest.raises(UserError, match=r"--checkpoint: .*no checkpoints"):
    embed.embed(tmp_path, "digits", out)
  assert [path.name for path in tmp_path.iterdir()] == ["taken.npz"]


def test_flags_are_called_what_they_are_here(made, tmp_path, capsys):
  """In the note about a tree, and in the advice about its splits."""
  write_images(tmp_path / "images", 12, classes=("a", "b"))
  tree = f"folder:{tmp_path / 'images'}"
  out = tmp_path / "x.npz"
  embed.embed(made[0] / "run", tree, out, batch_size=BATCH)
  printed = capsys.readouterr().out
  assert "If its folders mean nothing: --labels=none." in printed
  with pytest.raises(UserError) as error:
    embed.embed(made[0] / "run", tree, tmp_path / "y.npz", split="test")
  assert str(error.value).endswith(
    'no split "test"; there are: all, train. Hold out a part of the labelled '
    "images with --eval_fraction=0.2, or add a column split to the csv."
  )


def test_names_that_the_classifier_repeats(tmp_path):
  """No name after the second "crane" moves up."""
  names = ["crane", "dog", "crane", "cat", "ox"]
  make_run(tmp_path / "run", num_classes=5, names=names)
  write_images(tmp_path / "images", 12, classes=("ant", "cat", "dog"))
  data = f"folder:{tmp_path / 'images'}"
  embed.embed(tmp_path / "run", data, tmp_path / "a.npz", batch_size=BATCH)
  found = feature_file.read(tmp_path / "a.npz")
  assert found.label_names == (*names, "ant")
  with np.load(tmp_path / "a.npz") as file:
    folders = [name.split("/")[0] for name in file["files"]]
  assert [found.label_names[k] for k in found.labels] == folders
  net = network.load(tmp_path / "run")
  source = network.open_source(net, data)
  (rows,) = network.stream(net, source, batch_size=BATCH)
  assert rows["predictions"].max() >= 2, "none is after the second crane"
  np.testing.assert_array_equal(found.predictions, rows["predictions"])


def test_gray_images_reach_an_rgb_network(made):
  net = network.load(made[0] / "run")
  source = network.open_source(net, "digits", split="test")
  (image, _), *_ = source.fetch([0])
  assert image.shape == (8, 8, 3)
  assert image.any()
  assert (image == image[..., :1]).all()


def test_the_command_ends_with_2(tmp_path, capsys):
  with pytest.raises(SystemExit) as end:
    embed.main(
      [
        f"--checkpoint={tmp_path}/no",
        "--data=digits",
        f"--output={tmp_path}/a.npz",
      ]
    )
  assert end.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("error: --checkpoint: there is no directory")
  assert error.count("\n") == 1


# -- programs -----------------------------------------------------------------

# Parts of a second, and the memory that has been in use at most.
PROGRAM = """
import resource, sys
from simclr_jax import embed
embed._PART_SECONDS = 1
embed.main(sys.argv[1:])
print("MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def start(folder, images, output):
  argv = [
    f"--checkpoint={folder / 'run'}",
    f"--data=folder:{images}",
    f"--output={output}",
    "--batch_size=64",
  ]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, *argv],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    text=True,
  )


def finish(process):
  out, _ = process.communicate(timeout=400)
  assert process.returncode == 0
  return out


@pytest.mark.slow
def test_ten_thousand_images_in_flat_memory_and_killed(tmp_path):
  """As much memory as for 1,000, not ten times; then -9 in the middle."""
  # On canvases of 128 pixels, 10,000 take 470 MiB.
  make_run(
    tmp_path / "run", num_classes=2, names=["a", "b"], data__canvas_size=128
  )
  write_images(tmp_path / "many", 10_000, side=128)
  write_images(tmp_path / "few", 1_000, side=128)
  peak = {}
  finish(start(tmp_path, tmp_path / "few", tmp_path / "compiles.npz"))
  for name in ("few", "many"):
    out = finish(start(tmp_path, tmp_path / name, tmp_path / f"{name}.npz"))
    peak[name] = int(out.split("MiB")[1])
  assert peak["many"] < peak["few"] + 120, peak  # of 470
  print(f"peak MiB: {peak}")

  killed = tmp_path / "killed.npz"
  process = start(tmp_path, tmp_path / "many", killed)
  end = time.monotonic() + 200
  while not list(tmp_path.glob("killed.npz.parts/*.npz")):
    assert time.monotonic() < end and process.poll() is None
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert not killed.exists()
  assert "continuing after" in finish(
    start(tmp_path, tmp_path / "many", killed)
  )
  with np.load(killed) as got, np.load(tmp_path / "many.npz") as want:
    assert len(got["files"]) == 10_000
    for name in ("features", "files", "labels", "predictions"):
      np.testing.assert_array_equal(got[name], want[name])
