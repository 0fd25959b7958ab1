"""Sources: digits, prepared TFDS datasets, decoding.

The TFDS dataset is built here by TFDS itself from encoded bytes, as
array_record and without TensorFlow. The real CIFAR-10 is read where it is.
"""

import dataclasses
import io
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets

from simclr_jax import data
from simclr_jax.config import UserError
from simclr_jax.sources import as_flags, make_source
from simclr_jax.sources import decode as decode_module
from simclr_jax.sources.decode import decode


def encode(image, kind="PNG", **options):
  """A PIL image, or pixels, as the bytes of a file."""
  if isinstance(image, np.ndarray):
    image = PIL.Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def photo(height, width, channels=3):
  """A smooth picture without symmetry, so that JPEG keeps it well."""
  y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
  planes = [120 + 100 * np.sin(3 * x + 2 * y * (c + 1)) for c in range(3)]
  pixels = np.stack(planes, axis=-1).astype(np.uint8)
  return pixels if channels == 3 else pixels[..., 0]


def close(image, expected, *, within):
  assert image.dtype == np.uint8
  assert image.shape == expected.shape
  difference = np.abs(image.astype(int) - expected)
  assert difference.max() <= within


# -- digits -------------------------------------------------------------------


def everything(source):
  examples = source.fetch(range(len(source)))
  images, labels = zip(*examples, strict=True)
  return np.stack(images), np.array(labels)


@pytest.mark.parametrize(
  "split, num_examples", [("train", 1437), ("test", 360)]
)
def test_digits_are_stratified(split, num_examples):
  source = make_source("digits", split=split)
  images, labels = everything(source)
  assert len(source) == num_examples
  assert images.shape == (num_examples, 8, 8, 1)
  assert images.dtype == np.uint8
  assert source.channels == 1
  assert source.label_names == tuple("0123456789")
  assert source.num_classes == 10
  np.testing.assert_array_equal(labels, source.labels)
  assert source.labels.dtype == np.int32
  counts = np.bincount(sklearn.datasets.load_digits().target)
  shares = counts * num_examples / 1797
  assert np.abs(np.bincount(labels) - shares).max() < 1


def test_digits_splits_are_all_of_them_once():
  every = sklearn.datasets.load_digits()
  expected = np.floor(every.images * 255 / 16 + 0.5).astype(np.uint8)
  expected = np.concatenate(
    [expected.reshape(1797, 64), every.target[:, None]], axis=1
  )
  found = []
  for split in ("train", "test"):
    images, labels = everything(make_source("digits", split=split))
    found.append(np.c_[images.reshape(-1, 64), labels])
  found = np.concatenate(found)
  sort = lambda rows: rows[np.lexsort(rows.T)]  # noqa: E731
  np.testing.assert_array_equal(sort(found), sort(expected))


def test_digits_split_is_a_function_of_the_seed():
  names = [
    make_source("digits", split=split, seed=seed).fingerprint
    for split in ("train", "test")
    for seed in (0, 0, 1)
  ]
  assert names[0] == names[1]
  assert names[3] == names[4]
  assert len(set(names)) == 4


def test_a_source_works_like_a_sequence():
  """As Grain and PyTorch want it: __len__, __getitem__, __getitems__."""
  source = make_source("digits", split="test")
  image, label = source[7]
  (again, label_again), _ = source.__getitems__([7, 8])
  np.testing.assert_array_equal(image, again)
  assert label == label_again == source.labels[7]
  assert isinstance(label, int)


@pytest.mark.parametrize(
  "name, split, message",
  [
    ("digits", "val", 'digits has no split "val"; there are: train, test.'),
    (
      "digit",
      "train",
      'data.name is "digit"; it must be digits, tfds:NAME or folder:PATH; did '
      'you mean "digits"?',
    ),
    (
      "",
      "train",
      'data.name is ""; it must be digits, tfds:NAME or folder:PATH.',
    ),
    (
      "tfds:",
      "train",
      'data.name is "tfds:"; it must be digits, tfds:NAME or folder:PATH',
    ),
  ],
)
def test_unknown_names(name, split, message):
  with pytest.raises(UserError) as error:
    make_source(name, split=split)
  assert str(error.value).removesuffix('; did you mean "tfds"?') == message


@pytest.mark.parametrize(
  "options, end",
  [
    ({"labels": "a.csv"}, "Set data.labels= (to nothing)."),
    ({"eval_fraction": 0.2}, "Set data.eval_fraction=0.0."),
  ],
)
def test_options_of_folders_are_refused_elsewhere(options, end):
  with pytest.raises(UserError) as error:
    make_source("digits", split="train", **options)
  (field,) = options
  assert str(error.value) == (
    f"data.{field} is for folder:PATH; digits has labels and splits of its "
    f"own. {end}"
  )


@pytest.mark.parametrize("name", ["digits", "folder:x", "tfds:x"])
def test_a_negative_seed_is_refused_in_one_line(name):
  with pytest.raises(UserError) as error:
    make_source(name, split="train", seed=-1)
  assert str(error.value) == "the seed of a split must not be negative: -1."


def test_fields_become_flags():
  text = (
    "config.data.name, data.labels. data.eval_fraction=0.2, data.eval_split"
  )
  assert as_flags(text, name="--data") == (
    "--data, --labels. --eval_fraction=0.2, data.eval_split"
  )


def test_a_selection_is_a_source():
  source = make_source("digits", split="test")
  part = source.select(np.array([5, 3, 5]))
  assert len(part) == 3
  assert part.describe(1) == "digits test image 3"
  for (image, label), i in zip(part.fetch(range(3)), (5, 3, 5), strict=True):
    np.testing.assert_array_equal(image, source[i][0])
    assert label == source[i][1]
  np.testing.assert_array_equal(part.labels, source.labels[[5, 3, 5]])
  prints = {source.select(np.array(i)).fingerprint for i in ([5, 3], [3, 5])}
  assert len(prints | {source.fingerprint}) == 3


def test_known_labels_count_not_those_of_the_records():
  source = make_source("digits", split="test")
  changed = dataclasses.replace(source, labels=np.full(360, -1, np.int32))
  assert [label for _, label in changed.fetch([0, 7])] == [-1, -1]


# -- TFDS ---------------------------------------------------------------------


def tiny_images():
  """[(encoded bytes, expected RGB pixels)], each of another height."""
  pictures = [photo(12 + i, 20) for i in range(6)]
  images = [PIL.Image.fromarray(pixels) for pixels in pictures]
  best = {"quality": 98, "subsampling": 0}
  gray = images[2].convert("L")
  palette = images[3].quantize(16)
  opaque = images[5].convert("RGBA")
  pictures[2] = np.array(gray.convert("RGB"))
  pictures[3] = np.array(palette.convert("RGB"))
  records = [
    encode(images[0]),
    encode(images[1], "JPEG", **best),
    encode(gray, "JPEG", **best),
    encode(palette),
    encode(images[4].convert("CMYK"), "JPEG", **best),
    encode(opaque),
  ]
  return list(zip(records, pictures, strict=True))


@pytest.fixture(scope="module")
def tfds():
  return pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def prepare(tfds):
  """Writes {split: [(bytes, label), ...]} as TFDS does."""

  class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Pictures made by a test."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, examples, names, **options):
      self.examples, self.names = examples, names
      super().__init__(**options)

    def _info(self):
      features = {"file_name": tfds.features.Text()}
      if self.names:
        features["image"] = tfds.features.Image(shape=(None, None, 3))
        features["label"] = tfds.features.ClassLabel(names=self.names)
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {k: self._generate_examples(k) for k in self.examples}

    def _generate_examples(self, split):
      for i, (image, label) in enumerate(self.examples[split]):
        example = {"file_name": str(i), "image": image, "label": label}
        yield i, example if self.names else {"file_name": str(i)}

  def write(data_dir, examples, names=("dog", "cat")):
    builder = Pictures(
      examples, names, data_dir=data_dir, file_format="array_record"
    )
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    assert "tensorflow" not in sys.modules
    return str(data_dir)

  return write


@pytest.fixture(scope="module")
def tiny(prepare, tmp_path_factory):
  """A folder with the dataset `pictures`: train 6, test 4 (2 unlabelled)."""
  train = [(x[0], i % 2) for i, x in enumerate(tiny_images())]
  test = [
    (encode(np.full((6, 6, 3), v, np.uint8)), v % 3 - 1) for v in range(4)
  ]
  return prepare(
    tmp_path_factory.mktemp("tfds"), {"train": train, "test": test}
  )


def test_tfds_records_are_decoded(tiny):
  source = make_source("tfds:pictures", split="train", data_dir=tiny)
  assert (len(source), source.num_classes, source.channels) == (6, 2, 3)
  assert source.label_names == ("dog", "cat")
  # TFDS shuffles as it writes: the height tells which one it is.
  expected = tiny_images()
  found = []
  for image, label in source.fetch(range(6)):
    i = image.shape[0] - 12
    assert label == i % 2
    close(image, expected[i][1], within=6)
    found.append(i)
  assert sorted(found) == list(range(6))


def test_tfds_records_become_batches(tiny):
  """From a prepared folder to what a training step gets."""
  source = make_source("tfds:pictures", split="train", data_dir=tiny)
  dataset = data.load(source, canvas_size=18)
  (batch,) = data.train_batches(
    dataset, seed=0, batch_size=6, start_step=0, num_steps=1
  )
  # Heights of 12 to 17 pixels, shrunk with the width from 20 to 18.
  assert sorted(batch["size"][:, 0]) == [11, 12, 13, 14, 14, 15]
  assert set(batch["size"][:, 1]) == {18}
  assert sorted(batch["label"]) == [0, 0, 0, 1, 1, 1]
  for image, (height, _) in zip(batch["image"], batch["size"], strict=True):
    assert image[:height].all()
    assert not image[height:].any()


def test_tfds_splits_slices_and_missing_labels(tiny):
  source = make_source("tfds:pictures", split="test", data_dir=tiny)
  labels = {
    int(image[0, 0, 0]): label for image, label in source.fetch(range(4))
  }
  assert labels == {0: -1, 1: 0, 2: 1, 3: -1}
  part = make_source("tfds:pictures", split="test[1:3]", data_dir=tiny)
  assert len(part) == 2
  for i in range(2):
    np.testing.assert_array_equal(part[i][0], source[i + 1][0])
  both = make_source("tfds:pictures", split="train+test", data_dir=tiny)
  assert len(both) == 10
  assert len({s.fingerprint for s in (source, part, both)}) == 3


def test_tfds_ids(tiny):
  source = make_source("tfds:pictures", split="train[2:]", data_dir=tiny)
  names = [name for name, _ in source.read_ids(range(4))]
  assert len(set(names)) == 4 and set(names) < set("012345")
  assert [label for _, label in source.read_ids([1, 3])] == [
    label for _, label in source.fetch([1, 3])
  ]
  selected = source.select(np.array([3, 0]))
  assert [name for name, _ in selected.read_ids([0, 1])] == [names[3], names[0]]


def test_tfds_data_dir_from_the_environment(tiny, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", tiny)
  assert len(make_source("tfds:pictures", split="train")) == 6


def test_tfds_needs_no_tensorflow_and_fingerprints_last(tiny):
  """In a process of its own, with another seed of Python's hashes."""
  source = make_source("tfds:pictures", split="test", data_dir=tiny)
  program = f"""if True:
    import sys
    from simclr_jax import sources
    assert "jax" not in sys.modules, "sources are for readers without JAX too"
    s = sources.make_source("tfds:pictures", split="test", data_dir={tiny!r})
    s.fetch([0])
    assert "tensorflow" not in sys.modules
    print(s.fingerprint)
  """
  result = subprocess.run(
    [sys.executable, "-W", "error", "-c", program],
    env={**os.environ, "PYTHONHASHSEED": "7"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.strip() == source.fingerprint


def test_tfds_fingerprint_follows_the_content(tiny, prepare, tmp_path):
  examples = [(encode(np.zeros((4, 4, 3), np.uint8)), 0)] * 4
  other = prepare(tmp_path, {"test": examples})
  fingerprints = {
    make_source("tfds:pictures", split="test", data_dir=d).fingerprint
    for d in (tiny, other)
  }
  assert len(fingerprints) == 2


BUILD = "pip install tensorflow && tfds build"
WHERE = "set data.data_dir (or TFDS_DATA_DIR) to where it is, or prepare it:"
SPLITS = (
  "or it is empty; there are: train, test, and slices such as train[:10%]."
)
# case: (name, split, data_dir, message), with {tiny} and {empty} to fill in.
MESSAGES = {
  "unknown split": (
    "pictures",
    "validation",
    "{tiny}",
    'tfds:pictures has no split "validation", ' + SPLITS,
  ),
  "empty slice": (
    "pictures",
    "test[:0]",
    "{tiny}",
    'tfds:pictures has no split "test[:0]", ' + SPLITS,
  ),
  "broken slice": (
    "pictures",
    "test[:10%",
    "{tiny}",
    'tfds:pictures has no split "test[:10%", ' + SPLITS,
  ),
  "not prepared": (
    "cifar10",
    "train",
    "{empty}",
    f"tfds:cifar10 is not prepared in {{empty}}; {WHERE} python -m "
    "simclr_jax.datasets prepare cifar10 --data_dir={empty}",
  ),
  "not prepared, with TensorFlow": (
    "cifar100",
    "train",
    "{empty}",
    f"tfds:cifar100 is not prepared in {{empty}}; {WHERE} {BUILD} cifar100 "
    "--file_format=array_record --data_dir={empty}",
  ),
  "from archives, to a path with a space": (
    "imagenet2012_subset/1pct",
    "train",
    "{empty}/a b",
    "tfds:imagenet2012_subset/1pct is not prepared in {empty}/a b; "
    f"{WHERE} {BUILD} imagenet2012_subset/1pct --file_format=array_record "
    "--data_dir='{empty}/a b' --manual_dir=FOLDER_OF_ITS_ARCHIVES",
  ),
  "mistyped": (
    "cifra10",
    "train",
    "{empty}",
    "tfds:cifra10 is neither in {empty} nor a dataset that TFDS knows; did "
    'you mean "cifar10"?',
  ),
  "mistyped, on disk": (
    "picture",
    "train",
    "{tiny}",
    "tfds:picture is neither in {tiny} nor a dataset that TFDS knows; did "
    'you mean "pictures"?',
  ),
  "not a name": (
    "??",
    "train",
    "{empty}",
    "tfds:?? is neither in {empty} nor a dataset that TFDS knows.",
  ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_tfds_messages(case, tiny, tmp_path):
  name, split, data_dir, message = (
    text.format(tiny=tiny, empty=tmp_path) for text in MESSAGES[case]
  )
  with pytest.raises(UserError) as error:
    make_source(f"tfds:{name}", split=split, data_dir=data_dir)
  assert str(error.value) == message
  assert not os.listdir(tmp_path), "nothing is downloaded or written"


def test_tfds_wrong_format(tiny, tmp_path):
  shutil.copytree(tiny, tmp_path / "data")
  info = tmp_path / "data" / "pictures" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(UserError) as error:
    make_source("tfds:pictures", split="train", data_dir=f"{tmp_path}/data/")
  assert str(error.value) == (
    f"tfds:pictures in {tmp_path}/data/ is stored as tfrecord, which cannot be "
    "read by index; prepare it once more and set data.data_dir="
    f"{tmp_path}/data_array_record: {BUILD} pictures "
    f"--file_format=array_record --data_dir={tmp_path}/data_array_record"
  )


def test_tfds_without_images(prepare, tmp_path):
  prepare(tmp_path, {"train": [(None, None)]}, names=None)
  with pytest.raises(UserError) as error:
    make_source("tfds:pictures", split="train", data_dir=str(tmp_path))
  assert str(error.value) == (
    "tfds:pictures has no image feature; it has: file_name."
  )


def test_tfds_damaged_image_is_named(prepare, tmp_path):
  good = encode(photo(9, 9), "JPEG")
  images = [(good, 0), (good[:-40], 1), (good, 0)]
  data_dir = prepare(tmp_path, {"train": images})
  source = make_source("tfds:pictures", split="train", data_dir=data_dir)
  (bad,) = [
    i for i, (record, _) in enumerate(source.read([0, 1, 2])) if record != good
  ]
  with pytest.raises(UserError) as error:
    source.fetch([0, 1, 2])
  assert str(error.value).startswith(
    f"tfds:pictures train record {bad} in {data_dir}/pictures/1.0.0: not a "
    "readable image (image file is truncated"
  )


def test_tfds_damaged_file_is_named(tiny, tmp_path):
  shutil.copytree(tiny, tmp_path / "data")
  folder = tmp_path / "data" / "pictures" / "1.0.0"
  (folder / "pictures-test.array_record-00000-of-00001").unlink()
  source = make_source(
    "tfds:pictures", split="test", data_dir=str(tmp_path / "data")
  )
  with pytest.raises(
    UserError, match=r"record 2 in .* cannot be read"
  ) as error:
    source.fetch([2, 3])
  assert "\n" not in str(error.value)
  assert str(error.value).endswith("prepare the dataset again.")


def test_tfds_damaged_record_is_named(tiny, tmp_path):
  shutil.copytree(tiny, tmp_path / "data")
  folder = tmp_path / "data" / "pictures" / "1.0.0"
  file = folder / "pictures-train.array_record-00000-of-00001"
  content = bytearray(file.read_bytes())
  middle = len(content[: 1 << 16].rstrip(b"\0")) // 2  # Zeros fill blocks.
  for i in range(middle, middle + 20):
    content[i] ^= 255
  file.write_bytes(content)
  source = make_source(
    "tfds:pictures", split="train", data_dir=str(tmp_path / "data")
  )
  with pytest.raises(UserError) as error:
    source.fetch(range(6))
  prefix = f"tfds:pictures train record {{}} in {folder}: cannot be read ("
  (damaged,) = [
    i for i in range(6) if str(error.value).startswith(prefix.format(i))
  ]
  assert 0 < damaged < 5
  for i in set(range(6)) - {damaged}:
    source.fetch([i])


# -- the real CIFAR-10 --------------------------------------------------------

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"


@pytest.mark.parametrize(
  "split, num_examples", [("train", 50000), ("test", 10000)]
)
def test_real_cifar10(shared, tfds, split, num_examples):
  data_dir = str(shared / "tensorflow_datasets")
  source = make_source("tfds:cifar10", split=split, data_dir=data_dir)
  assert len(source) == num_examples
  assert source.label_names == tuple(CIFAR10.split())
  assert source.channels == 3
  labels = [label for _, label in source.read(range(num_examples))]
  np.testing.assert_array_equal(np.bincount(labels), [num_examples // 10] * 10)
  # TFDS's own reader and decoder, for the first and last few.
  oracle = tfds.data_source(
    "cifar10", data_dir=data_dir, split=split, download=False
  )
  for i in (0, 1, 2, num_examples - 1):
    image, label = source[i]
    np.testing.assert_array_equal(image, oracle[i]["image"])
    assert label == oracle[i]["label"]


# -- decoding -----------------------------------------------------------------


HAS_SIMPLEJPEG = decode_module.simplejpeg is not None


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request, monkeypatch):
  """Runs a test with either decoder of JPEGs."""
  if request.param == "pillow":
    monkeypatch.setattr(decode_module, "simplejpeg", None)
  elif not HAS_SIMPLEJPEG:
    pytest.skip("simplejpeg, an optional extra, is not installed")


GRAY16 = (photo(12, 20, channels=1).astype(np.uint16) << 8) + 77


@pytest.mark.parametrize("kind", ["PNG", "WebP", "BMP", "TIFF", "GIF", "PPM"])
def test_lossless_formats(kind):
  rgb = photo(12, 20)
  expected, options = rgb, {}
  if kind == "WebP":
    options = {"lossless": True}
  if kind == "GIF":  # 256 colors, and a second frame to be ignored.
    image = PIL.Image.fromarray(rgb).quantize(64)
    expected = np.array(image.convert("RGB"))
    options = {"save_all": True, "append_images": [image.rotate(180)]}
    record = encode(image, kind, **options)
  else:
    record = encode(rgb, kind, **options)
  np.testing.assert_array_equal(decode(record, channels=3), expected)


@pytest.mark.parametrize(
  "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "transparent P"]
)
def test_modes_become_one_or_three_channels(mode):
  rgb = PIL.Image.fromarray(photo(12, 20))
  gray = photo(12, 20, channels=1)
  options = {}
  if mode in ("I;16", "I"):
    image = PIL.Image.fromarray(GRAY16).convert(mode)
  elif mode == "transparent P":  # Pillow warns if this becomes RGB at once.
    image, options = rgb.convert("P"), {"transparency": bytes([0, 9])}
  elif mode in ("P", "RGB", "RGBA"):
    image = rgb.convert(mode)
  else:
    image = PIL.Image.fromarray(gray).convert(mode)
  kind = "TIFF" if mode == "I" else "PNG"
  record = encode(image, kind, **options)
  if mode in ("I;16", "I"):
    expected = np.stack([gray] * 3, axis=-1)
  else:
    expected = np.array(image.convert("RGB"))
  np.testing.assert_array_equal(decode(record, channels=3), expected)
  if mode not in ("P", "transparent P", "RGB", "RGBA"):
    expected = expected[..., :1]
  else:
    expected = np.array(image.convert("RGB").convert("L"))[..., None]
  np.testing.assert_array_equal(decode(record, channels=1), expected)


def test_pixels_become_one_or_three_channels():
  """A network may take other channels than the images have."""
  rgb, gray = photo(12, 20), photo(12, 20, channels=1)
  three = decode(gray.reshape(12, 20, 1), channels=3)
  np.testing.assert_array_equal(three, gray.reshape(12, 20, 1).repeat(3, 2))
  one = np.array(PIL.Image.fromarray(rgb).convert("L"))[..., None]
  np.testing.assert_array_equal(decode(rgb, channels=1), one)


def test_jpeg_modes(decoder):
  rgb, gray = photo(24, 40), photo(24, 40, channels=1)
  record = encode(rgb, "JPEG", quality=98, subsampling=0)
  close(decode(record, channels=3), rgb, within=8)
  close(
    decode(record, channels=1)[..., 0], rgb @ [0.299, 0.587, 0.114], within=8
  )
  record = encode(gray, "JPEG", quality=98)
  close(decode(record, channels=1)[..., 0], gray, within=6)
  close(decode(record, channels=3), np.stack([gray] * 3, -1), within=6)
  cmyk = PIL.Image.fromarray(rgb).convert("CMYK")
  close(decode(encode(cmyk, "JPEG", quality=98), channels=3), rgb, within=8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, decoder):
  """The stored picture is turned so that EXIF turns it back."""
  upright = PIL.Image.fromarray(photo(24, 40))
  turns = PIL.Image.Transpose
  undo = {
    2: turns.FLIP_LEFT_RIGHT,
    3: turns.ROTATE_180,
    4: turns.FLIP_TOP_BOTTOM,
    5: turns.TRANSPOSE,
    6: turns.ROTATE_90,
    7: turns.TRANSVERSE,
    8: turns.ROTATE_270,
  }
  stored = upright
  if orientation in undo:
    stored = upright.transpose(undo[orientation])
  exif = PIL.Image.Exif()
  exif[0x0112] = orientation
  record = encode(stored, "JPEG", quality=98, subsampling=0, exif=exif)
  close(decode(record, channels=3), np.array(upright), within=8)


needs_simplejpeg = pytest.mark.skipif(
  not HAS_SIMPLEJPEG, reason="simplejpeg is not installed"
)


def decoders_differ(record, monkeypatch, **options):
  """The largest difference of the two decoders, or their unequal shapes."""
  fast = decode(record, **options)
  with monkeypatch.context() as patch:
    patch.setattr(decode_module, "simplejpeg", None)
    slow = decode(record, **options)
  if fast.shape != slow.shape:
    return fast.shape, slow.shape
  return int(np.abs(fast.astype(int) - slow).max())


@needs_simplejpeg
@pytest.mark.parametrize("max_size", [0, 200, 97, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_decoders_give_the_same_pixels(channels, max_size, monkeypatch):
  noise = np.random.default_rng(0).integers(0, 256, (150, 203, 3), np.uint8)
  for pixels in (photo(150, 203), noise, noise[..., 0]):
    for kind in ({"subsampling": 0}, {}, {"progressive": True}):
      record = encode(pixels, "JPEG", quality=75, **kind)
      options = {"channels": channels, "max_size": max_size}
      assert decoders_differ(record, monkeypatch, **options) == 0, kind


@needs_simplejpeg
@pytest.mark.parametrize("channels", [1, 3])
def test_both_decoders_take_the_same_scale(channels, monkeypatch):
  """A half of 511 pixels is 256, which Pillow does not take for 256."""
  sides = (17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 257)
  sizes = [(height, width, 16) for height in sides for width in sides]
  sizes += [(3, side, 16) for side in range(17, 300, 6)]
  sizes += [(511, 511, 256), (1023, 1023, 256), (513, 700, 240)]
  noise = np.random.default_rng(0).integers(0, 256, (1023, 1023, 3), np.uint8)
  differ = {}
  for height, width, max_size in sizes:
    record = encode(noise[:height, :width], "JPEG", quality=75)
    options = {"channels": channels, "max_size": max_size}
    if found := decoders_differ(record, monkeypatch, **options):
      differ[height, width, max_size] = found
  assert not differ, f"{len(differ)} of {len(sizes)}"


def test_exif_is_found_in_jpegs():
  """Where the image may have to be turned, it is not copied or decoded fast."""
  plain = encode(photo(24, 40), "JPEG")
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  turned = encode(photo(24, 40), "JPEG", exif=exif)
  assert [decode_module.has_exif(r) for r in (plain, turned)] == [False, True]
  far = plain + bytes(1 << 16) + b"Exif\0"
  assert not decode_module.has_exif(far), "looked for among the pixels"


@pytest.mark.parametrize(
  "height, width, max_size, expected",
  [
    (60, 80, 80, (60, 80)),
    (60, 80, 0, (60, 80)),
    (60, 80, 20, (15, 20)),
    (80, 60, 21, (21, 16)),
    (3, 300, 50, (1, 50)),  # Never less than a pixel.
  ],
)
def test_large_images_are_shrunk(height, width, max_size, expected, decoder):
  rgb = photo(height, width)
  oracle = PIL.Image.fromarray(rgb)
  if expected != (height, width):
    oracle = oracle.resize(expected[::-1], PIL.Image.Resampling.BILINEAR)
  for record in (encode(rgb, "PNG"), rgb):
    image = decode(record, channels=3, max_size=max_size)
    np.testing.assert_array_equal(image, np.array(oracle))
  record = encode(rgb, "JPEG", quality=98, subsampling=0)
  image = decode(record, channels=3, max_size=max_size)
  assert image.shape[:2] == expected
  if height > 8:  # Of fewer rows, a smaller JPEG keeps little.
    close(image, np.array(oracle), within=9)
  gray = decode(rgb[..., :1], channels=1, max_size=max_size)
  np.testing.assert_array_equal(gray, np.array(oracle)[..., :1])


@pytest.mark.parametrize(
  "record, message",
  [
    (b"", "the image is empty (0 bytes)"),
    (b"this is text", "not a readable image (of no known format)"),
    (
      encode(photo(64, 64), "JPEG")[:-99],
      "not a readable image (image file is ",
    ),
    (encode(photo(64, 64))[:-99], "not a readable image ("),
    (
      encode(PIL.Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
      "not a readable image (float pixels have no known range)",
    ),
  ],
  ids=["empty", "text", "truncated JPEG", "truncated PNG", "float"],
)
def test_damaged_images(record, message, decoder):
  with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
    decode(record, channels=3)
  assert str(error.value).startswith(message)


def test_huge_images_are_refused_by_their_header(decoder, monkeypatch):
  """A JPEG and a PNG of a few hundred bytes that claim 30,000 x 30,000."""
  asked = []
  if decode_module.simplejpeg:  # It would ask for 2.7 GB.
    monkeypatch.setattr(
      decode_module.simplejpeg, "decode_jpeg", lambda *_, **__: asked.append(1)
    )
  jpeg = bytearray(encode(photo(8, 8), "JPEG"))
  at = jpeg.index(b"\xff\xc0") + 5  # Height and width in the frame header.
  jpeg[at : at + 4] = (30000).to_bytes(2, "big") * 2
  with pytest.raises(ValueError, match=r"exceeds limit of .* pixels"):
    decode(bytes(jpeg), channels=3, max_size=256)
  assert not asked
  png = bytearray(encode(photo(8, 8)))
  png[16:24] = (30000).to_bytes(4, "big") * 2
  png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
  with pytest.raises(ValueError, match=r"exceeds limit of .* pixels"):
    decode(bytes(png), channels=3, max_size=256)
