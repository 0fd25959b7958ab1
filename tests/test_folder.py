"""folder:PATH: what is understood of a tree, its csv, and damaged files."""

import json
import os
import re
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
from test_sources import close, encode, photo

from simclr_jax import (
  checkpoint,
  cli,
  data,
  distill,
  finetune,
  pretrain,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError
from simclr_jax.sources import folder as folder_module
from simclr_jax.sources import make_source


def write_tree(root, files):
  """Writes {relative path: gray value or bytes or lines}; returns the root."""
  for name, content in files.items():
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, int):
      content = encode(np.full((4, 5, 3), (content, 0, 9), np.uint8))
    if isinstance(content, str):
      content = content.encode()
    file.write_bytes(content)
  return root


def open_tree(root, split="train", **options):
  return make_source(f"folder:{root}", split=split, **options)


def contents(source):
  """{red value of the first pixel: label} of all images."""
  examples = source.fetch(range(len(source)))
  found = {int(image[0, 0, 0]): label for image, label in examples}
  assert len(found) == len(source)
  return found


def message_of(root, *args, **options):
  with pytest.raises(UserError) as error:
    open_tree(root, *args, **options)
  text = str(error.value)
  assert "\n" not in text
  return text


PETS = {"dog/b.png": 1, "dog/x/y/a.png": 2, "cat/a.png": 3, "cat/b.PNG": 4}


# -- what a tree means --------------------------------------------------------


def test_classes_are_the_first_level(tmp_path):
  write_tree(tmp_path, PETS | {"dog/notes.txt": "no image"})
  source = open_tree(tmp_path)
  assert source.label_names == ("cat", "dog")
  assert contents(source) == {1: 1, 2: 1, 3: 0, 4: 0}
  np.testing.assert_array_equal(source.labels, [0, 0, 1, 1])
  assert source.describe(3) == f"{tmp_path}/dog/x/y/a.png"
  assert source.channels == 3
  assert source.note == (
    f"folder:{tmp_path}: 4 images, classes from its first level of folders "
    "(cat 2, dog 2). If its folders mean nothing: data.labels=none."
  )


def test_images_beside_the_classes_are_unlabelled(tmp_path):
  write_tree(tmp_path, PETS | {"more.png": 5, "unlabeled/z.png": 6})
  source = open_tree(tmp_path)
  assert contents(source) == {1: 1, 2: 1, 3: 0, 4: 0, 5: -1, 6: -1}
  assert "first level of folders, 2 unlabelled (cat 2, dog 2)." in source.note


@pytest.mark.parametrize(
  "files, why",
  [
    ({"a.png": 1, "b.png": 2}, "as they are in no folders of their own"),
    ({"all/a.png": 1, "all/b.png": 2}, "as there is one folder only"),
    (
      {"2024-01-31/a.png": 1, "2024-01-31/b.png": 2, "0002/c.png": 3}
      | {"0002/d.png": 4},
      "as the names of its folders are numbers or dates",
    ),
    (
      {"x/a.png": 1, "y/b.png": 2, "y/c.png": 3},
      "as most of its folders have a single image",
    ),
  ],
)
def test_folders_without_meaning(tmp_path, files, why):
  source = open_tree(write_tree(tmp_path, files))
  assert set(contents(source).values()) == {-1}
  assert source.label_names == ()
  how = ""
  if len(files) > 2 or "all/a.png" in files:
    how = "; if its folders are classes, data.labels=folders"
  assert source.note == (
    f"folder:{tmp_path}: {len(files)} images, unlabelled, {why}. To label some,"
    f" write file,label lines into labels.csv in the folder{how}."
  )


def test_saying_otherwise(tmp_path):
  write_tree(tmp_path, {"2024/a.png": 1, "2025/b.png": 2, "c.png": 3})
  source = open_tree(tmp_path, labels="folders")
  assert source.label_names == ("2024", "2025")
  assert contents(source) == {1: 0, 2: 1, 3: -1}
  write_tree(tmp_path / "pets", PETS)
  source = open_tree(tmp_path / "pets", labels="none")
  assert set(contents(source).values()) == {-1}
  assert source.note == (
    f"folder:{tmp_path}/pets: 4 images, unlabelled, as data.labels says."
  )
  write_tree(tmp_path / "flat", {"a.png": 1})
  assert message_of(tmp_path / "flat", labels="folders") == (
    "data.labels is folders, but the images are in no folders of their own."
  )


def test_folders_that_are_splits(tmp_path):
  files = {f"train/{k}": v for k, v in PETS.items()}
  write_tree(tmp_path, files | {"test/cat/e.png": 7, "unlabeled/cat/x.png": 8})
  source = open_tree(tmp_path, eval_fraction=0.5)
  assert contents(source) == {1: 1, 2: 1, 3: 0, 4: 0, 8: -1}
  assert contents(open_tree(tmp_path, "test")) == {7: 0}
  assert "second level of folders" in source.note
  assert ', 1 in split "test".' in source.note
  assert len(open_tree(tmp_path, "all")) == 6


def test_an_empty_class_is_no_class(tmp_path):
  write_tree(tmp_path, PETS)
  (tmp_path / "bird").mkdir()
  source = open_tree(tmp_path)
  assert source.label_names == ("cat", "dog")
  assert source.note.endswith(
    "(cat 2, dog 2). No image, so no class: bird. If its folders mean nothing: "
    "data.labels=none."
  )


def test_one_single_class(tmp_path):
  write_tree(tmp_path, {"cat/a.png": 1, "cat/b.png": 2})
  assert message_of(tmp_path, labels="folders") == (
    f'folder:{tmp_path} has one class only, "cat" (classes from its first level'
    " of folders); label images of two classes or more, or set "
    "data.labels=none."
  )


def test_no_image(tmp_path):
  write_tree(tmp_path, {"a.txt": "text"})
  assert message_of(tmp_path) == (
    f"folder:{tmp_path} has no image file (their names end in .bmp .gif .jfif "
    ".jpe .jpeg .jpg .png .tif .tiff .webp)."
  )
  assert message_of(tmp_path / "none") == (
    f"data.name: there is no folder {tmp_path}/none."
  )


def test_many_classes_are_cut_short(tmp_path):
  files = {f"c{k}/{i}.png": 1 for k in range(9) for i in range(2)}
  source = open_tree(write_tree(tmp_path, files))
  assert "(c0 2, c1 2, c2 2, c3 2, c4 2, c5 2, c6 2, ... 9 classes)" in (
    source.note
  )


@pytest.mark.parametrize(
  "modes, channels", [(["L", "1", "LA"], 1), (["L", "P"], 3), (["RGB"], 3)]
)
def test_gray_folders_stay_gray(tmp_path, modes, channels):
  for i, mode in enumerate(modes):
    image = PIL.Image.fromarray(photo(4, 4)).convert(mode)
    image.save(tmp_path / f"{i}.png")
  (tmp_path / "bad.png").write_bytes(b"")
  source = open_tree(tmp_path)
  assert source.channels == channels
  assert source[0][0].shape == (4, 4, channels)
  assert ("gray images" in source.note) == (channels == 1)


def test_colors_at_the_end_are_seen(tmp_path):
  """Of 127 images, fewer than twice as many as are looked at."""
  for i in range(127):
    image = PIL.Image.fromarray(photo(4, 4)).convert("RGB" if i > 63 else "L")
    file = tmp_path / f"{'b' if i > 63 else 'a'}" / f"{i:03}.png"
    file.parent.mkdir(exist_ok=True)
    image.save(file)
  assert open_tree(tmp_path).channels == 3


@pytest.mark.parametrize("factor", [1, 16])
def test_12_bits_in_16_are_said_to_be_dark(tmp_path, factor):
  for i in range(3):
    pixels = np.full((4, 5), (4095 - i) * factor, np.uint16)
    PIL.Image.fromarray(pixels).save(tmp_path / f"{i}.png")
  source = open_tree(tmp_path)
  assert source.channels == 1
  assert source[0][0].max() == 4095 * factor >> 8
  dark = (
    " Images of 16 bits have no value above 4095 of 65535, so they are nearly "
    "black; store them scaled to all 16 bits."
  )
  assert source.note.endswith(dark) == (factor == 1)
  assert ("16 bits" in source.note) == (factor == 1)


# -- what is left out ---------------------------------------------------------


def test_links_and_hidden_files(tmp_path):
  outside = write_tree(tmp_path / "outside", {"secret.png": 9, "d/e.png": 10})
  root = write_tree(
    tmp_path / "root",
    {"a.png": 1, ".hidden.png": 2, ".git/x.png": 3, "__MACOSX/y.png": 4},
  )
  (root / "out.png").symlink_to(outside / "secret.png")
  (root / "folder").symlink_to(outside)
  (root / "broken.png").symlink_to(root / "gone.png")
  (root / "loop").symlink_to(root)
  (root / "inside.png").symlink_to(root / "a.png")
  os.mkfifo(root / "pipe.png")  # Reading it would never end.
  source = open_tree(root)
  assert [source.describe(i) for i in range(len(source))] == [
    f"{root}/a.png",
    f"{root}/inside.png",
  ]
  assert "; 4 symbolic links (broken, to a folder or out of the tree) not " in (
    source.note
  )
  # The folder itself may be reached by a link.
  (tmp_path / "link").symlink_to(root)
  assert len(open_tree(tmp_path / "link")) == 2
  (root / "a.png").unlink()
  (root / "inside.png").unlink()
  assert message_of(root).endswith(
    "; 4 symbolic links (broken, to a folder or out of the tree) not followed."
  )


def test_a_sibling_with_the_same_start_is_outside(tmp_path):
  write_tree(tmp_path, {"data/a.png": 1, "data-private/b.png": 2})
  (tmp_path / "data" / "b.png").symlink_to(tmp_path / "data-private" / "b.png")
  assert len(open_tree(tmp_path / "data")) == 1


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
  write_tree(tmp_path, PETS)
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith("cat"):
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(folder_module.os, "scandir", refuse)
  assert message_of(tmp_path) == (
    f"{tmp_path}/cat: cannot be listed (Permission denied)."
  )


# -- labels.csv ---------------------------------------------------------------

FLAT = {f"{c}.png": i for i, c in enumerate("abcdef", start=1)}


def test_csv_of_few_labels(tmp_path):
  text = "file,label\nb.png,dog\n\n./a.png , cat \nc.png,\n"
  write_tree(tmp_path, FLAT | {"labels.csv": text})
  source = open_tree(tmp_path)
  assert source.label_names == ("cat", "dog")
  assert contents(source) == {1: 0, 2: 1, 3: -1, 4: -1, 5: -1, 6: -1}
  assert source.note == (
    f"folder:{tmp_path}: 6 images, labels.csv labels 2 (cat 1, dog 1)."
  )
  # It is a folder of classes too, if its csv is not to count.
  write_tree(tmp_path, PETS)
  assert open_tree(tmp_path, labels="folders").label_names == ("cat", "dog")
  assert open_tree(tmp_path, labels="none").label_names == ()


@pytest.mark.parametrize(
  "text",
  [
    "\ufefffile,label\r\na.png,x\r\nb.png,y\r\n",
    'Label,comment,FILE\nx,,a.png\n"y","two\nlines","b.png"\n',
  ],
  ids=["Excel", "other order"],
)
def test_csv_dialects(tmp_path, text):
  write_tree(tmp_path, FLAT)
  (tmp_path / "other").mkdir()
  csv = tmp_path / "other" / "mine.csv"
  csv.write_text(text, encoding="utf-8", newline="")
  for given in ("other/mine.csv", str(csv)):  # In the folder; absolute.
    source = open_tree(tmp_path, labels=given)
    assert source.label_names == ("x", "y")
    np.testing.assert_array_equal(source.labels[:2], [0, 1])


def test_csv_path_from_here(tmp_path, monkeypatch):
  write_tree(tmp_path / "data", FLAT)
  write_tree(tmp_path, {"mine.csv": "file,label\na.png,x\nb.png,y\n"})
  monkeypatch.chdir(tmp_path)
  assert open_tree("data", labels="mine.csv").label_names == ("x", "y")


def test_csv_with_splits(tmp_path):
  text = (
    "file,label,split\na.png,x,train\nb.png,y,\nc.png,x,test\nd.png,y,val\n"
    "e.png,,train\n"
  )
  write_tree(tmp_path, FLAT | {"labels.csv": text})
  # The column wins over data.eval_fraction.
  source = open_tree(tmp_path, eval_fraction=0.5)
  assert contents(source) == {1: 0, 2: 1, 5: -1, 6: -1}
  assert source.note.endswith(
    'labels.csv labels 4 (x 2, y 2), 1 in split "test", 1 in split "val".'
  )
  assert contents(open_tree(tmp_path, "test")) == {3: 0}
  assert contents(open_tree(tmp_path, "val")) == {4: 1}
  assert message_of(tmp_path, "vall") == (
    f'folder:{tmp_path} has no split "vall"; there are: all, test, train, val.'
  )


def test_a_split_that_is_not_there(tmp_path):
  """How to get one is said of "test" alone."""
  write_tree(tmp_path, PETS)
  start = f'folder:{tmp_path} has no split "{{}}"; there are: all, train.'
  assert message_of(tmp_path, "") == start.format("")
  assert message_of(tmp_path, "test") == start.format("test") + (
    " Hold out a part of the labelled images with data.eval_fraction=0.2, or "
    "add a column split to the csv."
  )
  # Half an image of each class.
  assert message_of(tmp_path, "test", eval_fraction=0.1) == (
    start.format("test")
    + " data.eval_fraction=0.1 of its labelled images is none; label more, or "
    "raise it."
  )


def test_what_nobody_sees_makes_no_class_of_its_own(tmp_path):
  """An accent apart from its letter, and spaces without width."""
  text = "file,label\na.png,caf\u00e9\nb.png,cafe\u0301\u200b\nc.png,x\n"
  write_tree(tmp_path / "csv", FLAT | {"labels.csv": text})
  assert open_tree(tmp_path / "csv").label_names == ("caf\u00e9", "x")
  files = {f"{c}/{i}.png": i for i in range(2) for c in ("cafe\u0301", "x")}
  write_tree(tmp_path / "tree", files | {"caf\u00e9/7.png": 7})
  source = open_tree(tmp_path / "tree")
  assert source.label_names == ("caf\u00e9", "x")
  assert np.bincount(source.labels).tolist() == [3, 2]
  assert "No image" not in source.note
  assert len(source.fetch(range(5))) == 5


@pytest.mark.parametrize(
  "text, message",
  [
    ("", " is empty; its first line is file,label."),
    (
      "file,label, Label\na.png,x,y\n",
      ': its first line has "label" more than once; keep one of these columns.',
    ),
    (
      "file,label,file\na.png,x,b.png\n",
      ': its first line has "file" more than once; keep one of these columns.',
    ),
    (
      "a.png,cat\nb.png,dog\n",
      ": its first line must be file,label or file,label,split; it is "
      '"a.png,cat".',
    ),
    (
      "file;label\na.png;x\n",
      ": its first line must be file,label or file,label,split; it is "
      '"file;label".',
    ),
    (
      "file,label\na.png,x\nnone.png,y\n",
      " line 3: there is no image none.png in the folder; paths are relative "
      "to it.",
    ),
    (
      "file,label\nz.png,x\n",
      ' line 2: there is no image z.png in the folder; did you mean "s/z.png"?',
    ),
    (
      "file,label\nsame.png,x\n",
      " line 2: there is no image same.png in the folder, but 2 of that name, "
      "such as s/same.png and t/same.png; write the path.",
    ),
    (
      "file,label\n../x/a.png,x\n",
      " line 2: there is no image ../x/a.png in the folder; did you mean "
      '"a.png"?',
    ),
    (
      "file,label\na.png,x\nb.png,y\na.png,y\n",
      ' line 4: a.png is in line 2 too, as "x"; keep one of them.',
    ),
    (
      "file,label\na.png,x,y\n",
      " line 2: 3 fields where the first line has 2; put a name with a comma "
      'in it in "quotes".',
    ),
    (
      "file,label,split\na.png,,test\n",
      ' line 2: an image of split "test" needs a label.',
    ),
    (
      'file,label\n"a.png,x\n',
      " line 2: 1 fields where the first line has 2; put a name with a comma "
      'in it in "quotes".',
    ),
  ],
)
def test_csv_messages(tmp_path, text, message):
  nested = {"s/z.png": 1, "s/same.png": 2, "t/same.png": 3}
  write_tree(tmp_path, FLAT | nested | {"labels.csv": text})
  assert message_of(tmp_path) == f"{tmp_path}/labels.csv{message}"


@pytest.mark.parametrize(
  "content, message",
  [
    (
      "file,label\na.png,x\nb.png,B\xe4r\n".encode("latin-1"),
      ' line 3: the label "B\\udce4r" is not UTF-8; save the csv as UTF-8.',
    ),
    (
      "file,label,split\na.png,x,\nb.png,y,\xfc\n".encode("latin-1"),
      ' line 3: the split "\\udcfc" is not UTF-8; save the csv as UTF-8.',
    ),
    (
      "file,label\ncaf\xe9.png,x\n".encode("latin-1"),
      " line 2: there is no image caf\\udce9.png in the folder, and the name "
      "is not UTF-8; save the csv as UTF-8.",
    ),
    (
      "file,label\na.png,x\n".encode("utf-16"),
      " is UTF-16; save it as UTF-8.",
    ),
    (
      "file,label\na.png,x\n".encode("utf-16-be"),
      " is not text in UTF-8; save it as a csv in UTF-8.",
    ),
    (
      b"PK\x03\x04\0\0\n",
      " is not text in UTF-8; save it as a csv in UTF-8.",
    ),
  ],
  ids=["label", "split", "file", "UTF-16", "UTF-16 unmarked", "spreadsheet"],
)
def test_csv_in_another_encoding(tmp_path, content, message):
  write_tree(tmp_path, FLAT | {"labels.csv": content})
  assert message_of(tmp_path) == f"{tmp_path}/labels.csv{message}"


def test_csv_columns_that_are_ignored_have_any_encoding(tmp_path):
  text = "file,label,gr\xf6\xdfe\na.png,x,\xe4\nb.png,y,\n".encode("latin-1")
  write_tree(tmp_path, FLAT | {"labels.csv": text})
  assert open_tree(tmp_path).label_names == ("x", "y")


def test_csv_of_one_class(tmp_path):
  text = "file,label\na.png,x\nb.png,x\n"
  write_tree(tmp_path, FLAT | {"labels.csv": text})
  assert message_of(tmp_path) == (
    f'folder:{tmp_path} has one class only, "x" (labels.csv labels 2); label '
    "images of two classes or more, or set data.labels=none."
  )


def test_csv_that_is_not_there(tmp_path):
  write_tree(tmp_path, FLAT)
  assert message_of(tmp_path, labels="folder") == (
    'data.labels is "folder"; there is no such csv, neither in the folder nor '
    "from here. Other values: folders, none, or nothing; did you mean "
    '"folders"?'
  )


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_names_of_any_bytes(tmp_path):
  """Not UTF-8, with a line break and a quote, very long, and by a Mac."""
  names = [b"caf\xe9.png", b'two\nlines".png', b"x" * 251 + b".png"]
  root = os.fsencode(tmp_path)
  for i, name in enumerate(names):
    with open(os.path.join(root, name), "wb") as file:
      file.write(encode(np.full((2, 2, 3), i, np.uint8)))
  composed, apart = "\u00e9.png", "e\u0301.png"
  write_tree(tmp_path, {apart: 7})
  (tmp_path / "labels.csv").write_bytes(
    b'file,label\ncaf\xe9.png,x\n"two\nlines"".png",y\n'
    + composed.encode()
    + b",z\n"
  )
  source = open_tree(tmp_path)
  assert contents(source) == {0: 0, 1: 1, 2: -1, 7: 2}
  shown = {source.describe(i) for i in range(4)}
  assert shown == {
    f"{tmp_path}/caf\\udce9.png",
    f'{tmp_path}/two\\nlines".png',
    f"{tmp_path}/{'x' * 251}.png",
    f"{tmp_path}/{apart}",
  }
  for name in shown:
    assert name.encode("utf-8")  # It can be printed.


# -- the hold-out -------------------------------------------------------------


def labelled_tree(root, counts):
  value = 0
  files = {}
  for name, count in counts.items():
    for i in range(count):
      value += 1
      files[f"{name}/{i}.png"] = value
  return write_tree(root, files)


@pytest.mark.parametrize(
  "counts, fraction, expected",
  [
    ({"a": 10, "b": 5, "c": 5}, 0.2, [2, 1, 1]),
    ({"a": 5, "b": 5, "c": 5}, 0.1, [1, 1, 0]),  # 1.5 rounds to 2.
    ({"a": 7, "b": 4}, 0.5, [4, 2]),  # 3.5 and 2, 6 in all.
    ({"a": 1, "b": 3}, 0.9, [0, 2]),  # One of each stays.
  ],
)
def test_hold_out_is_stratified(tmp_path, counts, fraction, expected):
  labelled_tree(tmp_path, counts)
  write_tree(tmp_path, {"more.png": 200})
  options = {"eval_fraction": fraction, "labels": "folders"}
  train = open_tree(tmp_path, **options)
  test = open_tree(tmp_path, "test", **options)
  held_out = np.bincount(test.labels, minlength=len(counts))
  np.testing.assert_array_equal(held_out, expected)
  every = contents(open_tree(tmp_path, "all", **options))
  assert contents(train) | contents(test) == every
  assert len(train) + len(test) == len(every)
  assert f', {len(test)} in split "test".' in train.note


@pytest.mark.parametrize("fraction", [float("nan"), -1.0, 1.0, 2.0])
def test_hold_out_of_no_part(tmp_path, fraction):
  write_tree(tmp_path, PETS)
  assert message_of(tmp_path, eval_fraction=fraction) == (
    "data.eval_fraction must be 0 or more and below 1, got "
    f"{fraction:g}; 0.2 holds out a fifth."
  )


def test_hold_out_is_seeded_and_lasts(tmp_path):
  labelled_tree(tmp_path, {"a": 20, "b": 20})

  def held_out(seed=0):
    test = open_tree(tmp_path, "test", eval_fraction=0.25, seed=seed)
    return {test.describe(i) for i in range(len(test))}

  before = held_out()
  assert before == held_out()
  assert len({frozenset(held_out(seed)) for seed in range(5)}) == 5
  # Four more images of a class: its share grows by one.
  write_tree(tmp_path, {f"a/new{i}.png": 100 + i for i in range(4)})
  assert len(before - held_out()) <= 4


def test_nothing_is_held_out_unasked(tmp_path):
  write_tree(tmp_path, PETS)
  assert len(open_tree(tmp_path)) == 4
  assert 'has no split "test"; there are: all, train.' in (
    message_of(tmp_path, "test")
  )


# -- the fingerprint ----------------------------------------------------------


def test_fingerprint_follows_the_content(tmp_path):
  root = write_tree(tmp_path / "a", PETS)
  prints = [open_tree(root).fingerprint, open_tree(root).fingerprint]
  assert prints[0] == prints[1]
  # Another place alone changes nothing.
  root = root.rename(tmp_path / "b")
  assert open_tree(root).fingerprint == prints[0]
  os.utime(root / "dog/b.png", ns=(0, 1))
  prints.append(open_tree(root).fingerprint)
  write_tree(root, {"dog/new.png": 9})
  prints.append(open_tree(root).fingerprint)
  prints.append(open_tree(root, labels="none").fingerprint)
  prints.append(open_tree(root, eval_fraction=0.5).fingerprint)
  assert len(set(prints)) == 5


# -- formats and faults, as files ---------------------------------------------

RGB, GRAY = photo(12, 20), photo(12, 20, channels=1)
IMAGE = PIL.Image.fromarray(RGB)
BEST = {"quality": 98, "subsampling": 0}


def rotated():
  exif = PIL.Image.Exif()
  exif[0x0112] = 6
  stored = IMAGE.transpose(PIL.Image.Transpose.ROTATE_90)
  return encode(stored, "JPEG", exif=exif, **BEST)


def broken_exif():
  exif = PIL.Image.Exif()
  exif[0x0112] = 1
  record = bytearray(encode(IMAGE, "JPEG", exif=exif, **BEST))
  at = record.index(b"Exif\0\0") + 6
  record[at : at + 8] = b"\xff" * 8
  return bytes(record)


def bomb():
  record = bytearray(encode(RGB))
  record[16:24] = (30000).to_bytes(4, "big") * 2
  record[29:33] = zlib.crc32(record[12:29]).to_bytes(4, "big")
  return bytes(record)


PALETTE = IMAGE.quantize(32)
ANIMATION = {"save_all": True, "append_images": [PALETTE.rotate(180)]}
GRAY16 = PIL.Image.fromarray((GRAY.astype(np.uint16) << 8) + 77)
# name: (content, pixels, largest difference)
RIGHT = {
  "photo.jpg": (encode(RGB, "JPEG", **BEST), RGB, 6),
  "lossless.png": (encode(RGB), RGB, 0),
  "picture.webp": (encode(RGB, "WebP", lossless=True), RGB, 0),
  "picture.bmp": (encode(RGB, "BMP"), RGB, 0),
  "picture.tiff": (encode(RGB, "TIFF"), RGB, 0),
  "animated.gif": (
    encode(PALETTE, "GIF", **ANIMATION),
    np.array(PALETTE.convert("RGB")),
    0,
  ),
  "gray.png": (encode(GRAY), np.stack([GRAY] * 3, -1), 0),
  "palette.png": (encode(PALETTE), np.array(PALETTE.convert("RGB")), 0),
  "rgba.png": (encode(IMAGE.convert("RGBA")), RGB, 0),
  "cmyk.jpg": (encode(IMAGE.convert("CMYK"), "JPEG", **BEST), RGB, 6),
  "16 bit.png": (encode(GRAY16), np.stack([GRAY] * 3, -1), 0),
  "16 bit.tif": (encode(GRAY16, "TIFF"), np.stack([GRAY] * 3, -1), 0),
  "rotated by EXIF.jpg": (rotated(), RGB, 6),
  "broken EXIF.jpg": (broken_exif(), RGB, 6),
  "a PNG in disguise.jpg": (encode(RGB), RGB, 0),
  "1 pixel.png": (encode(RGB[:1, :1]), RGB[:1, :1], 0),
  "1 pixel high.png": (encode(RGB[:1]), RGB[:1], 0),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", RIGHT)
def test_right_pixels(tmp_path, name):
  content, pixels, within = RIGHT[name]
  # Beside colored ones, or a folder of gray images would stay gray.
  write_tree(tmp_path, {name: content, "z1.png": 0, "z2.png": 0})
  (image, label), *_ = open_tree(tmp_path).fetch([0])
  close(image, pixels, within=within)
  assert label == -1


@pytest.mark.parametrize(
  "name, content, message",
  [
    (
      "truncated.jpg",
      encode(photo(64, 64), "JPEG")[:-99],
      r"not a readable image \(image file is truncated \(\d+ bytes not "
      r"processed\)\)",
    ),
    (
      "truncated.png",
      encode(photo(64, 64))[:-99],
      r"not a readable image \(image file is truncated\)",
    ),
    ("empty.png", b"", r"the image is empty \(0 bytes\)"),
    (
      "text.jpg",
      b"this is no image\n",
      r"not a readable image \(of no known format\)",
    ),
    (
      "bomb.png",
      bomb(),
      r"not a readable image \(Image size \(900000000 pixels\) exceeds limit "
      r"of \d+ pixels, could be decompression bomb DOS attack.\)",
    ),
    ("huge.png", b"\0" * 1025, "more than 0 MiB is not read as one image"),
  ],
)
def test_faults_name_the_file(tmp_path, monkeypatch, name, content, message):
  if name == "huge.png":
    monkeypatch.setattr(folder_module, "_MAX_BYTES", 1024)
  root = write_tree(tmp_path, {"cat/a.png": 1, f"cat/{name}": content})
  source = open_tree(root, labels="none")
  with pytest.raises(UserError) as error:
    source.fetch([0, 1])
  assert re.fullmatch(
    re.escape(f"{root}/cat/{name}: ") + message, str(error.value)
  )
  assert contents(source.select([0])) == {1: -1}, "the other one is read"


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
  source = open_tree(write_tree(tmp_path, {"a.png": 1, "b.png": 2, "c.png": 3}))
  (tmp_path / "b.png").unlink()
  with pytest.raises(UserError) as error:
    source.fetch([0, 1])
  assert str(error.value) == (
    f"{tmp_path}/b.png: cannot be read (No such file or directory)"
  )
  (tmp_path / "c.png").chmod(0)
  if os.access(tmp_path / "c.png", os.R_OK):  # Root may read everything.

    def refuse(*_):
      raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_module, "open", refuse, raising=False)
  with pytest.raises(UserError) as error:
    source.fetch([2])
  assert str(error.value) == (
    f"{tmp_path}/c.png: cannot be read (Permission denied)"
  )


def test_opening_reads_no_pixels(tmp_path, monkeypatch):
  root = write_tree(tmp_path, {f"{i:03}.png": i for i in range(200)})
  opened = []
  image_open = PIL.Image.open
  monkeypatch.setattr(
    PIL.Image, "open", lambda f: opened.append(f) or image_open(f)
  )
  assert len(open_tree(root)) == 200
  assert len(opened) == 50  # of the whole tree
  assert opened[-1] == f"{root}/196.png"


# -- training on a folder -----------------------------------------------------


def run(module, recipe, workdir, **fields):
  stage = module.__name__.rpartition(".")[2]
  config = cli.load_recipe(recipe, stage=stage)
  for name, value in ({"report": False} | fields).items():
    config_lib.set_field(config, name, value)
  return module.train_and_evaluate(config, workdir)


def test_derived_epochs():
  for stage, table in {
    "pretrain": {50_000: 200, 1_000: 1000, 2_000_000: 100, 30_000: 333},
    "distill": {50_000: 200},
    "finetune": {300: 67, 30: 667, 12_811: 60, 128_116: 30},
  }.items():
    for num_examples, epochs in table.items():
      config = cli.load_recipe("folder", stage=stage)
      steps = config_lib.num_steps(config, num_examples)
      assert config.num_epochs == epochs
      assert steps == num_examples * epochs // config.batch_size + 1


def test_the_folder_recipe_is_the_same_in_all_stages():
  """Or images that one stage holds out have been trained on in another."""
  configs = [
    cli.load_recipe("folder", stage=stage)
    for stage in ("pretrain", "finetune", "distill")
  ]
  for field in ("split", "eval_split", "eval_fraction", "labels", "name"):
    assert len({config.data[field] for config in configs}) == 1
  peaks = {
    config.stage: config.optim.learning_rate * config.batch_size**0.5
    for config in configs
  }
  assert peaks["finetune"] == pytest.approx(0.16)


def test_labels_chosen_are_the_same_from_all_images_or_the_labelled():
  """Fine-tuning opens the labelled alone, distillation all of them."""
  labels = np.random.default_rng(0).integers(-1, 4, 300)
  labelled = np.flatnonzero(labels >= 0)
  for percent in (5, 30, 100):
    options = {"percent": percent, "seed": 2}
    np.testing.assert_array_equal(
      data.label_subset(labels, **options),
      labelled[data.label_subset(labels[labelled], **options)],
    )


@pytest.mark.parametrize(
  "files, fields, message",
  [
    (PETS, {}, 'has 4 images in split "train", fewer than config.batch_size'),
    ({}, {}, "has no image file"),
    (PETS, {"data.eval_split": "test"}, 'has no split "test"; there are: all'),
    (
      PETS,
      {"data.eval_split": "test"},
      "give another, or nothing (config.data.eval_split=) not to evaluate.",
    ),
    (PETS, {"data.split": ""}, 'has no split ""; there are: all, train.'),
    (PETS, {"data.labels": "x.csv"}, 'data.labels is "x.csv"; there is no'),
    (PETS, {"data.eval_fraction": 1.0}, "data.eval_fraction must be below 1"),
    (PETS, {"data.on_error": "ignore"}, "must be one of raise, skip; got"),
    (PETS, {"data.memory_gib": -1.0}, "data.memory_gib must not be negative"),
    (PETS | {"cat/z.png": b"x"}, {}, "cat/z.png: not a readable image (of no "),
  ],
)
def test_mistakes_leave_nothing_behind(tmp_path, files, fields, message):
  root = tmp_path / "images"
  root.mkdir()
  fields = {"data.eval_fraction": 0.0, "data.eval_split": ""} | fields
  fields["data.name"] = f"folder:{write_tree(root, files)}"
  with pytest.raises(UserError) as error:
    run(pretrain, "folder", tmp_path / "run", **fields)
  assert message in str(error.value)
  assert "\n" not in str(error.value)
  assert os.listdir(tmp_path) == ["images"]


def test_finetuning_needs_labels(tmp_path):
  write_tree(tmp_path / "images", FLAT)
  with pytest.raises(UserError) as error:
    run(
      finetune,
      "folder",
      tmp_path / "run",
      **{"data.name": f"folder:{tmp_path}/images"},
    )
  assert str(error.value) == (
    f'folder:{tmp_path}/images has no labelled image in split "train"; write a '
    "labels.csv (columns file,label) into it, or sort images into a folder for "
    "each class."
  )


def test_a_file_of_ids_chooses_the_labels(tmp_path):
  """Of the training split alone; a student's labels are its teacher's."""
  root = write_tree(tmp_path / "images", PETS)
  (tmp_path / "ids").write_text("dog/b.png\ncat/b.PNG\n")
  config = cli.load_recipe("folder", stage="finetune")
  for name, value in {
    "data.name": f"folder:{root}",
    "data.label_ids": str(tmp_path / "ids"),
    "data.canvas_size": 8,
    "data.image_size": 8,
    "data.eval_fraction": 0.0,
    "data.eval_split": "all",
  }.items():
    config_lib.set_field(config, name, value)
  train, test = data.open_splits(config, tmp_path / "run")
  assert finetune._protocol(config) == "supervised on listed labels"
  assert train.labels.tolist() == [0, 1]
  assert train.images[:, 0, 0, 0].tolist() == [4, 1]
  assert test.labels.tolist() == [0, 0, 1, 1]
  for weight, expected in ((0.0, ""), (0.5, config.data.label_ids)):
    student = cli.load_recipe("folder", stage="distill")
    config_lib.set_field(student, "loss.label_weight", weight)
    distill.resolve_student(student, config)
    assert student.data.label_ids == expected


def test_gray_views_are_announced(tmp_path, capsys):
  config = cli.load_recipe("digits", stage="pretrain")
  data.open_splits(config, tmp_path / "run")
  assert capsys.readouterr().out == (
    "pretrain: images of 1 channel: saturation, hue and grayscale need RGB and "
    "are left out of the views\n"
  )


def test_the_recipe_needs_a_folder(tmp_path):
  with pytest.raises(UserError) as error:
    run(pretrain, "folder", tmp_path / "run")
  assert str(error.value) == (
    'data.name is "folder:"; name the folder of the images: folder:PATH.'
  )


@pytest.mark.slow
@pytest.mark.parametrize("memory_gib", [0.0, 1e-9], ids=["memory", "streamed"])
def test_the_chain_with_five_labels_a_class(tmp_path, memory_gib, capsys):
  """Pretrain, fine-tune, distil: 60 PNGs, 3 classes, one file damaged."""
  rng = np.random.default_rng(0)
  files, rows = {}, ["file,label"]
  for i in range(60):
    shape = (*rng.integers(8, 20, 2), 3)
    pixels = rng.integers(0, 60, shape) + 60 * np.eye(3, dtype=int)[i % 3] * 3
    files[f"{i:02}.png"] = encode(pixels.astype(np.uint8))
    if i < 15:
      rows.append(f"{i:02}.png,{('red', 'green', 'blue')[i % 3]}")
  files["57.png"] = b"damaged"
  root = write_tree(tmp_path / "images", files)
  (root / "labels.csv").write_text("\n".join(rows))
  fields = {
    "data.name": f"folder:{root}",
    "data.on_error": "skip",
    "data.memory_gib": memory_gib,
    "num_steps": 4,
    "model.conv": "xla",
    "log_every_steps": 1,
  }
  results = {}
  results["pretrain"] = run(
    pretrain,
    "folder,depth=18,width=0.0625",
    tmp_path / "pretrain",
    **fields | {"batch_size": 32, "data.image_size": 8},
  )
  results["finetune"] = run(
    finetune,
    "folder",
    tmp_path / "finetune",
    **fields | {"pretrained": str(tmp_path / "pretrain"), "batch_size": 16},
  )
  results["distill"] = run(
    distill,
    "folder",
    tmp_path / "distill",
    **fields | {"teacher": str(tmp_path / "finetune"), "batch_size": 32},
  )
  for name, result in results.items():
    # One of each class is held out: 0.2 of 5.
    assert round(3 * result["top1"], 6) in (0, 1, 2, 3)
    config, _, about = checkpoint.load_described(tmp_path / name)
    assert about["label_names"] == ["blue", "green", "red"]
    assert (config.data.image_size, config.data.canvas_size) == (8, 8)
  assert results["finetune"]["metrics"]["num_labels"] == 12
  printed = capsys.readouterr().out
  assert (
    "60 images, labels.csv labels 15 (blue 5, green 5, red 5), 3 in split "
    '"test"'
  ) in printed
  assert ("images are streamed" in printed) == (memory_gib > 0)
  # The damaged one is in the two stages that see unlabelled images.
  line = f"{root}/57.png: not a readable image (of no known format)\n"
  for name in ("pretrain", "distill"):
    assert (tmp_path / name / "skipped.txt").read_text() == line
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    replaced = sum(json.loads(text).get("replaced", 0) for text in lines)
    assert 1 <= replaced <= 4  # 128 images are drawn, two epochs of 57.
  assert not (tmp_path / "finetune" / "skipped.txt").exists()
  # Without any label at all, the same folder can be pretrained on.
  (root / "labels.csv").unlink()
  result = run(
    pretrain,
    "folder,depth=18,width=0.0625",
    tmp_path / "unlabelled",
    **fields | {"batch_size": 32, "data.image_size": 8},
  )
  assert result["top1"] is None
  # And distilled on: the classes are the teacher's.
  result = run(
    distill,
    "folder",
    tmp_path / "distill2",
    **fields | {"teacher": str(tmp_path / "finetune"), "batch_size": 32},
  )
  assert result["top1"] is None
  _, _, about = checkpoint.load_described(tmp_path / "distill2")
  assert about["label_names"] == ["blue", "green", "red"]
