"""The datasets command: check, pack, and CIFAR-10 from its archive."""

import hashlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile

import numpy as np
import PIL.Image
import pytest
from test_folder import PETS, open_tree, write_tree
from test_sources import CIFAR10, close, encode, photo

from simclr_jax import cli, data, datasets
from simclr_jax.config import UserError
from simclr_jax.datasets import __main__ as command
from simclr_jax.datasets import cifar10, packing
from simclr_jax.sources import make_source


@pytest.fixture
def tree(tmp_path):
  files = PETS | {
    "cat/same.png": encode(photo(30, 40)),
    "dog/same.png": encode(photo(30, 40)),
    "dog/bad.jpg": encode(photo(30, 40), "JPEG")[:-50],
    "cat/text.jpg": b"no image",
    "dog/gray.png": encode(photo(9, 200, channels=1)),
  }
  return write_tree(tmp_path / "images", files)


def test_check(tree):
  report = datasets.check(open_tree(tree), image_size=96, images_per_second=1)
  assert report["num_examples"] == 9
  bad, text = sorted(report["damaged"], reverse=True)
  assert bad.startswith(f"{tree}/dog/bad.jpg: not a readable image (image file")
  assert text == (
    f"{tree}/cat/text.jpg: not a readable image (of no known format)"
  )
  assert report["duplicates"] == [
    [f"{tree}/cat/same.png", f"{tree}/dog/same.png"]
  ]
  assert report["classes"] == {"cat": 3, "dog": 4}
  assert report["heights"] == (4, 4, 30)
  assert report["widths"] == (5, 5, 200)
  assert report["modes"] == {"RGB": 6, "L": 1}
  assert report["canvas_size"] == 144  # 3/2 of 96.
  assert report["canvas_gib"] == 9 * 144 * 144 * 3 / 2**30
  assert report["feeds"]
  slow = datasets.check(open_tree(tree), image_size=224, images_per_second=1e9)
  assert slow["canvas_size"] == 200, "no more than the images have"
  assert slow["feeds"] is False


def run_main(*argv):
  with pytest.raises(SystemExit) as done:
    command.main(argv)
  return done.value.code


def test_check_as_a_command(tree, capsys):
  name = f"folder:{tree}"
  assert run_main("check", name, "--image_size=8") == 2  # Two are damaged.
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].startswith(f"{name}: 9 images, classes from its first")
  assert printed[1:6] == [
    f"{name} all: 9 images",
    "heights: 4 to 30 pixels, median 4",
    "widths: 5 to 200 pixels, median 5",
    "stored as L 1, RGB 6; read as 3 channel(s)",
    "classes: cat 3, dog 4",
  ]
  assert printed[6] == "damaged: 2"
  assert printed[9] == "contents that are there more than once: 1"
  assert printed[-1] == (
    "take config.data.canvas_size=8: 0.00 GiB, kept in memory"
  )
  for bad in ("bad.jpg", "text.jpg"):
    next(tree.rglob(bad)).unlink()
  command.main(["check", name, "--images_per_second=1e9"])
  assert (
    "does not feed a step of 1e+09 images/s if streamed: about"
    in (capsys.readouterr().out.splitlines()[-1])
  )
  assert run_main("check", "folder:/none") == 2
  assert (
    capsys.readouterr().err
    == "error: the dataset's name: there is no folder /none.\n"
  )


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--image_size=-3", "--image_size must be 0 or more, got -3."),
    ("--images_per_second=-3", "--images_per_second must be 0 or more, got -3"),
    (
      "--images_per_second=nan",
      "--images_per_second must be 0 or more, got na",
    ),
    (
      "--images_per_second=inf",
      "--images_per_second must be 0 or more, got in",
    ),
    ("--eval_fraction=nan", "--eval_fraction must be 0 or more and below 1"),
  ],
)
def test_check_of_no_such_number(tree, flag, message, capsys):
  assert run_main("check", f"folder:{tree}", flag) == 2
  error = capsys.readouterr().err
  assert error.startswith(f"error: {message}")
  assert error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_class_names_of_any_bytes(tmp_path, monkeypatch):
  """Folders whose names are not UTF-8, and one with a line break."""
  for name in (b"caf\xe9", b"two\nlines"):
    os.makedirs(os.path.join(os.fsencode(tmp_path / "images"), name))
    for i in range(2):
      file = os.path.join(os.fsencode(tmp_path / "images"), name, b"%d.png" % i)
      with open(file, "wb") as target:
        target.write(encode(photo(4, 5 + i)))
  name = f"folder:{tmp_path}/images"
  printed = io.BytesIO()  # with its encoding; that of pytest takes anything
  strict = io.TextIOWrapper(printed, encoding="utf-8", errors="strict")
  monkeypatch.setattr(sys, "stdout", strict)
  command.main(["check", name])
  command.main(["pack", name, f"--output={tmp_path}/out", "--canvas_size=8"])
  assert b"classes: caf\\udce9 2, two\\nlines 2\n" in printed.getvalue()
  packed = make_source("tfds:packed", split="train", data_dir=f"{tmp_path}/out")
  assert packed.label_names == ("caf\\udce9", "two\\nlines")


def test_check_of_pixels():
  report = datasets.check(make_source("digits", split="test"))
  assert report["damaged"] == []
  assert sum(report["classes"].values()) == 360
  assert report["modes"] == {"L": 360}
  assert report["feeds"] is None


# -- pack ---------------------------------------------------------------------


def upside_down():
  """A JPEG of `photo(40, 40)` that is stored so that EXIF turns it back."""
  exif = PIL.Image.Exif()
  exif[0x0112] = 3
  return encode(photo(40, 40)[::-1, ::-1], "JPEG", quality=98, exif=exif)


@pytest.fixture
def photos(tmp_path):
  files = {
    f"{'ab'[i % 2]}/{i:02}.png": photo(10 + i, 20) // 2 + 4 * i
    for i in range(30)
  }
  files = {k: encode(v.astype(np.uint8)) for k, v in files.items()}
  files["a/small.jpg"] = encode(photo(16, 16), "JPEG", quality=80)
  files["a/turned.jpg"] = upside_down()
  return write_tree(tmp_path / "photos", files)


@pytest.mark.parametrize("lossless", [False, True])
def test_packed_images_are_those_of_the_source(
  photos, tmp_path, lossless, monkeypatch
):
  monkeypatch.setattr(packing, "_SHARD_SIZE", 10)
  options = {"eval_fraction": 0.25}
  splits = {s: open_tree(photos, s, **options) for s in ("train", "test")}
  datasets.pack(
    splits, output=tmp_path / "out", canvas_size=24, lossless=lossless
  )
  for split, source in splits.items():
    packed = make_source(
      "tfds:packed", split=split, data_dir=str(tmp_path / "out")
    )
    assert len(packed) == len(source)
    assert packed.label_names == ("a", "b")
    found = packed.fetch(range(len(packed)))
    for wanted, wanted_label in source.fetch(range(len(source)), max_size=24):
      same = [e for e in found if e[0].shape == wanted.shape]
      distances = [np.abs(e[0].astype(int) - wanted).mean() for e in same]
      image, label = same[int(np.argmin(distances))]
      assert label == wanted_label
      close(image, wanted, within=0 if lossless else 60)
      assert min(distances) < 10
      found = [e for e in found if e[0] is not image]
    assert not found
  part = make_source(
    "tfds:packed", split="train[:50%]", data_dir=str(tmp_path / "out")
  )
  assert len(part) == len(splits["train"]) // 2
  assert {label for _, label in part.read(range(len(part)))} == {0, 1}


def test_tfds_itself_reads_a_pack(photos, tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  source = open_tree(photos)
  folder = datasets.pack(
    {"train": source}, output=tmp_path, canvas_size=64, name="mine"
  )
  assert folder == tmp_path / "mine" / "1.0.0"
  builder = tfds.builder_from_directory(str(folder))
  examples = builder.as_data_source(
    split="train",
    decoders={"image": tfds.decode.SkipDecoding()},
  )
  assert len(examples) == 32
  names = {e["file_name"].decode(): e for e in examples}
  assert {f"{photos}/{name}" for name in names} == {
    source.describe(i) for i in range(32)
  }
  # A JPEG that needs no change is copied; one that is turned is not.
  small = names["a/small.jpg"]
  assert small["image"] == (photos / "a" / "small.jpg").read_bytes()
  assert builder.info.features["label"].int2str(small["label"]) == "a"
  turned = names["a/turned.jpg"]["image"]
  difference = (
    np.array(PIL.Image.open(io.BytesIO(turned))) - photo(40, 40) * 1.0
  )
  assert np.abs(difference).mean() < 8


def test_a_stopped_pack_is_continued(photos, tmp_path, monkeypatch):
  monkeypatch.setattr(packing, "_SHARD_SIZE", 10)
  source = open_tree(photos)
  whole = datasets.pack({"train": source}, output=tmp_path / "a", canvas_size=9)
  packed = packing._packed
  calls = []

  def stop(*args, **kwargs):
    calls.append(len(args[1]))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return packed(*args, **kwargs)

  monkeypatch.setattr(packing, "_packed", stop)
  options = {"output": tmp_path / "b", "canvas_size": 9}
  with pytest.raises(KeyboardInterrupt):
    datasets.pack({"train": source}, **options)
  with pytest.raises(UserError, match="tfds:packed"):
    make_source("tfds:packed", split="train", data_dir=str(tmp_path / "b"))
  folder = datasets.pack({"train": source}, **options)
  assert calls == [10, 10, 10, 10, 2], "the first two were there"
  for file in whole.glob("*.array_record*"):
    assert (folder / file.name).read_bytes() == file.read_bytes()
  assert not list(folder.glob("partial*"))
  with pytest.raises(UserError) as error:
    datasets.pack({"train": source}, **options | {"canvas_size": 10})
  assert str(error.value) == (
    f"{folder} holds a pack of other images or of another size; give another "
    "--output or --as, or delete it."
  )


def test_pack_and_damaged_images(tree, tmp_path, capsys):
  output = f"--output={tmp_path}/out"
  pack = ["pack", f"folder:{tree}", output, "--canvas_size=16"]
  assert run_main(*pack) == 2
  error = capsys.readouterr().err
  assert "not a readable image (" in error
  assert error.endswith(
    "; mend or remove it, or leave such images out with --skip.\n"
  )
  command.main([*pack, "--skip"])
  printed = capsys.readouterr().out
  assert printed.count("skipped: ") == 2
  packed = make_source("tfds:packed", split="train", data_dir=f"{tmp_path}/out")
  assert len(packed) == 7
  assert run_main(*pack, "--as=My Set") == 2


def test_what_can_not_be_written_to(photos, tmp_path, capsys):
  file = tmp_path / "file"
  file.write_text("mine")
  pack = ["pack", f"folder:{photos}", "--canvas_size=8"]
  for output in (file, file / "x"):
    assert run_main(*pack, f"--output={output}") == 2
    assert capsys.readouterr().err == (
      f"error: --output={output} cannot be written: Not a directory.\n"
    )
  prepare = ["prepare", "cifar10", f"--archive={file}"]
  for flag, argv in (("--output", pack), ("--data_dir", prepare)):
    for output in ("gs://bucket/x", "s3://bucket/x"):
      assert run_main(*argv, f"{flag}={output}") == 2
      assert capsys.readouterr().err == (
        f"error: {flag}={output} is in a bucket; give a folder of this machine "
        "and copy it there.\n"
      )
    assert run_main(*argv, f"{flag}=") == 2
    assert (
      capsys.readouterr().err == f"error: {flag} is empty; name a folder.\n"
    )
  assert file.read_text() == "mine"
  assert sorted(os.listdir(tmp_path)) == ["file", "photos"]


def test_a_full_disk_leaves_what_is_complete(photos, tmp_path, monkeypatch):
  monkeypatch.setattr(packing, "_SHARD_SIZE", 10)
  source, out = open_tree(photos), tmp_path / "out"
  packed = packing._packed
  calls = []

  def fill(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
      raise OSError(28, "No space left on device")
    return packed(*args, **kwargs)

  monkeypatch.setattr(packing, "_packed", fill)
  with pytest.raises(UserError) as error:
    datasets.pack({"train": source}, output=out, canvas_size=9)
  assert str(error.value) == (
    f"--output={out} cannot be written: No space left on device."
  )
  names = sorted(os.listdir(out / "packed" / "1.0.0"))
  assert names == ["packed-train.array_record-00000-of-00004", "source.txt"]
  datasets.pack({"train": source}, output=out, canvas_size=9)
  assert len(calls) == 5


def test_an_error_of_array_record_is_one_line(photos, tmp_path, monkeypatch):
  class Writer:
    def __init__(self, *args):
      pass

    def write(self, record):
      pass

    def close(self):
      raise RuntimeError("write() failed: File too large; writing x; at byte 9")

  from array_record.python import array_record_module

  monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Writer)
  with pytest.raises(UserError, match=r"write\(\) failed: File too large\.$"):
    datasets.pack(
      {"train": open_tree(photos)}, output=tmp_path / "out", canvas_size=9
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--canvas_size=0"], "--canvas_size must be 1 pixel or more, got 0."),
    (["--canvas_size=-5"], "--canvas_size must be 1 pixel or more, got -5."),
    (["--splits=all"], '--splits: "all" is TFDS\'s name for all splits'),
    (["--eval_fraction=2"], "--eval_fraction must be 0 or more and below 1"),
    (
      ["--splits=train,test"],
      'folder:{photos} has no split "test"; there are: all, train. Hold out a '
      "part of the labelled images with --eval_fraction=0.2, or add a column",
    ),
  ],
)
def test_pack_of_no_such_number_or_split(
  photos, tmp_path, flags, message, capsys
):
  argv = ["pack", f"folder:{photos}", f"--output={tmp_path}/out"]
  assert run_main(*argv, "--canvas_size=8", *flags) == 2
  error = capsys.readouterr().err
  assert error.startswith(f"error: {message.format(photos=photos)}")
  assert error.count("\n") == 1
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "classes, flags, count",
  [
    ("ab", [], (32, None)),
    ("ab", ["--splits=train,test", "--eval_fraction=0.25"], (24, 8)),
    ("", [], (12, None)),
  ],
)
def test_a_pack_says_how_to_train_on_it(
  photos, tmp_path, classes, flags, count, capsys
):
  """With flags that are right for the recipe `folder`, as printed."""
  root = photos
  if not classes:
    files = {f"{i}.png": encode(photo(8, 9)) for i in range(12)}
    root = write_tree(tmp_path / "flat", files)
  pack = ["pack", f"folder:{root}", f"--output={tmp_path}/my out", *flags]
  command.main([*pack, "--canvas_size=8"])
  out = capsys.readouterr().out
  assert out.count(f"folder:{root}: ") == 1, "said once, for all splits"
  assert "data.labels" not in out
  printed = shlex.split(out.partition("train on it with ")[2])
  argv = ["--config=pretrain.py:folder", f"--workdir={tmp_path}/run"]
  argv += [*printed, "--config.data.canvas_size=8"]
  config, _ = cli.parse(argv, stage="pretrain")
  train, test = data.open_splits(config, tmp_path / "run")
  assert (len(train), test and len(test)) == count


def test_names_of_splits_are_said_to_the_recipe(photos, tmp_path, capsys):
  """Whatever the recipe calls them."""
  rows = [f"a/{i:02}.png,a,{'fit' if i else 'rate'}" for i in range(0, 30, 2)]
  rows += [f"b/{i:02}.png,b,{'fit' if i > 1 else 'rate'}" for i in (1, 3, 5)]
  (photos / "labels.csv").write_text("\n".join(["file,label,split", *rows]))
  command.main(
    [
      *("pack", f"folder:{photos}", f"--output={tmp_path}/out"),
      *("--canvas_size=8", "--splits=fit,rate", "--as=mine"),
    ]
  )
  assert capsys.readouterr().out.endswith(
    f"train on it with --config.data.name=tfds:mine "
    f"--config.data.data_dir={tmp_path}/out --config.data.split=fit "
    "--config.data.eval_split=rate --config.data.eval_fraction=0.0\n"
  )


def test_messages_name_what_the_command_has(photos, tmp_path, capsys):
  command.main(["check", f"folder:{photos}"])
  out = capsys.readouterr().out
  assert "If its folders mean nothing: --labels=none." in out
  assert run_main("check", "photos") == 2
  assert capsys.readouterr().err == (
    'error: the dataset\'s name is "photos"; it must be digits, tfds:NAME or '
    "folder:PATH.\n"
  )


@pytest.mark.parametrize("name", ["check", "pack", "prepare"])
def test_every_option_is_explained(name, capsys):
  """With its default, unless it must be given."""
  assert run_main(name, "--help") == 0
  text = capsys.readouterr().out.partition("\noptions:")[2]
  needed = ["-h,", "--output", "--canvas_size"] + ["--data_dir"] * (
    name[1] == "r"
  )
  options = [option.split() for option in re.split(r"\n  (?=-)", text)[1:]]
  assert len(options) > 2
  for flag, *words in options:
    assert len(words) > 2, f"{flag} has no help"
    assert flag in needed or "default:" in words, flag


def test_a_slice_is_no_name_of_a_split(tmp_path):
  with pytest.raises(UserError) as error:
    datasets.pack(
      {"test[:50%]": make_source("digits", split="test")},
      output=tmp_path / "out",
      canvas_size=8,
    )
  assert str(error.value) == (
    '--splits: "test[:50%]" is no name of a split (letters, digits, _ and -); '
    "pack the whole split and take a slice of the pack."
  )
  assert not (tmp_path / "out").exists()


def test_a_pack_without_an_image_is_none(photos, tmp_path, capsys):
  bad = {f"{c}/{i}.png": b"no image" for c in "ab" for i in range(2)}
  source = f"folder:{write_tree(tmp_path / 'bad', bad)}"
  (tmp_path / "there").mkdir()
  for folder in ("new/deep", "there"):
    output = f"--output={tmp_path}/{folder}"
    assert run_main("pack", source, output, "--canvas_size=8", "--skip") == 2
    out, error = capsys.readouterr()
    assert out.count("skipped: ") == 4  # They say why.
    assert error == (
      f"error: none of the 4 images of {source} train can be read; nothing is "
      "packed.\n"
    )
  assert sorted(os.listdir(tmp_path)) == ["bad", "photos", "there"]
  assert not os.listdir(tmp_path / "there")
  # Nor is one of which a split has none.
  splits = {"train": open_tree(photos), "test": open_tree(tmp_path / "bad")}
  with pytest.raises(UserError, match="none of the 4 images"):
    datasets.pack(splits, output=tmp_path / "x", canvas_size=8, on_skip=print)
  assert not (tmp_path / "x").exists()


def test_an_image_is_mended_and_packed_in_the_same_place(
  tree, tmp_path, capsys
):
  pack = ["pack", f"folder:{tree}", f"--output={tmp_path}/out"]
  assert run_main(*pack, "--canvas_size=8") == 2
  assert "mend or remove it" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
  for bad in ("bad.jpg", "text.jpg"):
    next(tree.rglob(bad)).write_bytes(encode(photo(5, 5)))
  command.main([*pack, "--canvas_size=8"])


def test_a_folder_of_something_else_is_left_alone(photos, tmp_path):
  folder = tmp_path / "packed" / "1.0.0"
  folder.mkdir(parents=True)
  (folder / "dataset_info.json").write_text("{}")
  with pytest.raises(UserError, match="holds a pack of other images"):
    datasets.pack({"train": open_tree(photos)}, output=tmp_path, canvas_size=8)
  assert os.listdir(folder) == ["dataset_info.json"]


def test_pack_without_labels_trains(tmp_path):
  files = {f"{i}.png": encode(photo(8, 9, channels=1)) for i in range(12)}
  source = open_tree(write_tree(tmp_path / "x", files))
  datasets.pack({"train": source}, output=tmp_path / "y", canvas_size=8)
  packed = make_source(
    "tfds:packed", split="train", data_dir=str(tmp_path / "y")
  )
  assert (packed.channels, packed.num_classes) == (1, 0)
  dataset = data.load(packed, canvas_size=8)
  assert (dataset.labels == -1).all()
  assert set(map(tuple, dataset.sizes)) == {(7, 8)}


# -- CIFAR-10 -----------------------------------------------------------------

NAMES = CIFAR10.split()


def cifar_archive(file, per_file=7):
  """The official layout: a byte of the label, 3,072 of planes, a record."""
  rng = np.random.default_rng(0)
  contents = {"batches.meta.txt": "\n".join([*NAMES, ""]).encode()}
  every = {"train": [], "test": []}
  for k in range(1, 7):
    name = f"data_batch_{k}.bin" if k < 6 else "test_batch.bin"
    records = rng.integers(0, 256, (per_file, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    contents[name] = records.tobytes()
    every["train" if k < 6 else "test"] += list(records)
  with tarfile.open(file, "w:gz") as tar:
    for name, content in contents.items():
      member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return every


@pytest.mark.parametrize("downloaded", [False, True])
def test_cifar10_from_an_archive(tmp_path, downloaded):
  """In a process of its own: TensorFlow is not imported."""
  archive = tmp_path / "cifar-10-binary.tar.gz"
  every = cifar_archive(archive)
  digest = hashlib.sha256(archive.read_bytes()).hexdigest()
  given = (
    f"url={archive.as_uri()!r}" if downloaded else f"archive={str(archive)!r}"
  )
  program = f"""if True:
    import sys
    from simclr_jax import datasets
    datasets.prepare_cifar10(
      {str(tmp_path / "data")!r}, sha256={digest!r}, {given}
    )
    assert "tensorflow" not in sys.modules
  """
  subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True
  )
  assert os.listdir(tmp_path / "data") == ["cifar10"]
  for split, records in every.items():
    source = make_source(
      "tfds:cifar10", split=split, data_dir=str(tmp_path / "data")
    )
    assert source.label_names == tuple(NAMES)
    expected = {
      r[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes(): int(r[0])
      for r in records
    }
    found = {
      image.tobytes(): label
      for image, label in source.fetch(range(len(source)))
    }
    assert found == expected


def test_another_archive_is_refused(tmp_path, capsys):
  archive = tmp_path / "cifar-10-binary.tar.gz"
  cifar_archive(archive)
  digest = hashlib.sha256(archive.read_bytes()).hexdigest()
  where = f"--data_dir={tmp_path}/data"
  assert run_main("prepare", "cifar10", where, f"--archive={archive}") == 2
  assert capsys.readouterr().err == (
    f"error: {archive} is not the official cifar-10-binary.tar.gz: "
    f"its SHA-256 is {digest}, not {cifar10.SHA256}.\n"
  )
  assert run_main("prepare", "cifar10", where, "--archive=/none.gz") == 2
  assert capsys.readouterr().err == (
    "error: /none.gz: cannot be read (No such file or directory).\n"
  )
  assert not (tmp_path / "data").exists()


def test_cifar10_into_a_file(tmp_path, capsys):
  """Told before anything is downloaded."""
  file = tmp_path / "file"
  file.write_text("mine")
  for where in (file, file / "x"):
    assert run_main("prepare", "cifar10", f"--data_dir={where}") == 2
    assert capsys.readouterr().err.startswith(
      f"error: --data_dir={where} cannot be written: "
    )


def test_a_download_that_fails(tmp_path):
  url = (tmp_path / "gone.tar.gz").as_uri()
  with pytest.raises(UserError) as error:
    datasets.prepare_cifar10(tmp_path / "data", url=url)
  assert str(error.value).startswith(f"{url} cannot be downloaded (")
  assert str(error.value).endswith("and name it with --archive.")
  assert not os.listdir(tmp_path / "data")
