"""The datasets command: check, pack, and CIFAR-10 from its archive."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import PIL.Image
import pytest
from test_folder import PETS, open_tree, write_tree
from test_sources import CIFAR10, close, encode, photo

from simclr_jax import data, datasets
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
    capsys.readouterr().err == "error: data.name: there is no folder /none.\n"
  )


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


def test_a_download_that_fails(tmp_path):
  url = (tmp_path / "gone.tar.gz").as_uri()
  with pytest.raises(UserError) as error:
    datasets.prepare_cifar10(tmp_path / "data", url=url)
  assert str(error.value).startswith(f"{url} cannot be downloaded (")
  assert str(error.value).endswith("and name it with --archive.")
  assert not os.listdir(tmp_path / "data")
