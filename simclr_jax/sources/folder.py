"""folder:PATH: a tree of image files, labelled by folders, by a csv, or not."""

import hashlib
import os
import re

import numpy as np

from simclr_jax import config
from simclr_jax.config import UserError
from simclr_jax.sources.decode import EXTENSIONS, seen_in
from simclr_jax.sources.labels_csv import composed, read_labels, shown
from simclr_jax.sources.source import Source

# Top folders of these names are splits, and the classes are one level below.
_SPLITS = {"train", "val", "valid", "validation", "test"}
# The images of such a folder beside those of classes or splits have no label.
_UNLABELLED = {"unlabeled", "unlabelled"}
_NUMBER_OR_DATE = re.compile(r"\d{4,}([-_.]?\d+)*")
# More bytes than this are not one image.
_MAX_BYTES = 1 << 29
# Image headers that are read to tell gray folders from colored ones.
_NUM_SAMPLED = 64


def open_folder(
  path: str,
  *,
  split: str,
  labels: str = "",
  eval_fraction: float = 0.0,
  seed: int = 0,
) -> Source:
  """Opens a tree of image files; reads names, and a few headers.

  Symbolic links out of the tree, and to folders, are not followed. Hidden
  files and other kinds of files are passed over.

  Args:
    path: of the folder.
    split: "train", "test" or what the csv or the top folders say; "all" is
      every image.
    labels: where labels come from. "": labels.csv in the folder if there is
      one, else its first level of folders if they look like classes, else
      nowhere. "folders", "none", or the path of a csv (relative to the folder
      or to where one is).
    eval_fraction: part of each class's labelled images that is split "test";
      without effect where a csv or the top folders name splits.
    seed: of that choice.

  Returns:
    A `Source`; its note says what was understood. Class names are sorted.

  Raises:
    UserError: no such folder or split, no image, a mistake in the csv, no
      such part.
  """
  if not 0 <= eval_fraction < 1:  # nan neither
    raise UserError(
      "data.eval_fraction must be 0 or more and below 1, got "
      f"{eval_fraction:g}; 0.2 holds out a fifth."
    )
  root = os.path.realpath(os.path.expanduser(path))
  if not os.path.isdir(root):
    raise UserError(f"data.name: there is no folder {shown(path)}.")
  files, stats, folders, num_links = _scan(root)
  if not files:
    raise UserError(
      f"folder:{shown(path)} has no image file (their names end in "
      f"{' '.join(EXTENSIONS)})"
      + (f"; {_links(num_links)}." if num_links else ".")
    )
  csv = _find_csv(root, labels)
  if csv:
    classes, splits = read_labels(csv, files)
    how = f"{shown(os.path.basename(csv))} labels {sum(map(bool, classes))}"
    other = ""
  else:
    classes, splits, how, other = _by_folders(files, folders, labels)
  names = tuple(sorted(set(classes) - {""}))
  if len(names) == 1:
    raise UserError(
      f'folder:{shown(path)} has one class only, "{shown(names[0])}" ({how}); '
      "label images of two classes or more, or set data.labels=none."
    )
  number = {name: k for k, name in enumerate(names)}
  numbers = np.array([number.get(c, -1) for c in classes], np.int32)
  named = any(splits)
  if not named:
    held_out = _held_out(files, numbers, fraction=eval_fraction, seed=seed)
    splits = ["test" if h else "train" for h in held_out]
  chosen = np.flatnonzero([split in (s, "all") for s in splits])
  if not len(chosen):
    raise UserError(
      f'folder:{shown(path)} has no split "{split}"; there are: '
      f"{', '.join(sorted({*splits, 'all'}))}."
      + ("" if named or split != "test" else _hold_out(eval_fraction))
    )
  sampled = files[:: -(-len(files) // _NUM_SAMPLED)]  # all over the folder
  channels, dark = seen_in(os.path.join(root, file) for file in sampled)
  counts = np.bincount(numbers[numbers >= 0], minlength=len(names))
  note = (
    f"folder:{shown(path)}: {len(files)} "
    f"{'gray ' if channels == 1 else ''}images, {how}"
    + (f" ({_class_list(names, counts)})" if names else "")
    + "".join(
      f', {splits.count(s)} in split "{s}"'
      for s in sorted({*splits} - {"train"})
    )
    + (f"; {_links(num_links)}" if num_links else "")
    + (f". {other}" if other else ".")
    + (f" {dark}" if dark else "")
  )
  return _source(
    path,
    root=root,
    split=split,
    files=[files[i] for i in chosen],
    stats=[stats[i] for i in chosen],
    labels=numbers[chosen],
    label_names=names,
    channels=channels,
    note=note,
  )


def _source(
  path, *, root, split, files, stats, labels, label_names, channels, note
):
  def describe(index):
    return shown(os.path.join(path, files[index]))

  def read(indices):
    examples = []
    for index in indices:
      try:
        with open(os.path.join(root, files[index]), "rb") as file:
          record = file.read(_MAX_BYTES + 1)
      except OSError as error:
        raise UserError(
          f"{describe(index)}: cannot be read ({error.strerror})"
        ) from error
      if len(record) > _MAX_BYTES:
        raise UserError(
          f"{describe(index)}: more than {_MAX_BYTES >> 20} MiB is not read as "
          "one image"
        )
      examples.append((record, int(labels[index])))
    return examples

  digest = hashlib.sha256(f"{split} {channels} {label_names}".encode())
  for file, stat in zip(files, stats, strict=True):
    digest.update(os.fsencode(file) + b"\0%d %d\0" % stat)
  digest.update(labels.tobytes())
  return Source(
    name=f"folder:{path}",
    split=split,
    num_examples=len(files),
    read=read,
    describe=describe,
    label_names=label_names,
    channels=channels,
    fingerprint=f"folder:{len(files)}:{digest.hexdigest()[:32]}",
    labels=labels,
    note=note,
    read_ids=lambda indices: [(files[i], int(labels[i])) for i in indices],
  )


def _hold_out(fraction):
  """How to get a split "test" where nothing names splits."""
  if fraction:
    return (
      f" data.eval_fraction={fraction:g} of its labelled images is none; label "
      "more, or raise it."
    )
  return (
    " Hold out a part of the labelled images with data.eval_fraction=0.2, or "
    "add a column split to the csv."
  )


def _scan(root):
  """(image files sorted, their (size, mtime), folders, links left out)."""
  found, folders, num_links = [], [""], 0
  inside = os.path.join(root, "")
  for folder in folders:  # It grows on the way.
    try:
      with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
          if entry.name.startswith((".", "__MACOSX")):
            continue
          relative = os.path.join(folder, entry.name)
          if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if not target.startswith(inside) or not os.path.isfile(target):
              num_links += 1
              continue
          elif entry.is_dir():
            folders.append(relative)
            continue
          suffix = os.path.splitext(entry.name)[1].lower()
          if suffix in EXTENSIONS and entry.is_file():
            stat = entry.stat()
            found.append((relative, (stat.st_size, stat.st_mtime_ns)))
    except OSError as error:
      raise UserError(
        f"{shown(os.path.join(root, folder))}: cannot be listed "
        f"({error.strerror})."
      ) from error
  found.sort()
  files, stats = map(list, zip(*found, strict=True)) if found else ([], [])
  return files, stats, folders[1:], num_links


def _links(number):
  return (
    f"{number} symbolic link{'s' * (number > 1)} (broken, to a folder or out "
    "of the tree) not followed"
  )


def _find_csv(root, labels):
  """The csv that `data.labels` means, or "" for none."""
  if labels in ("folders", "none"):
    return ""
  candidates = [os.path.join(root, labels or "labels.csv")]
  if labels:
    candidates.append(os.path.abspath(os.path.expanduser(labels)))
  for candidate in candidates:
    if os.path.isfile(candidate):
      return candidate
  if labels:
    raise UserError(
      f'data.labels is "{shown(labels)}"; there is no such csv, neither in the '
      "folder nor from here. Other values: folders, none, or nothing"
      f"{config.nearest(labels, ['folders', 'none'])}"
    )
  return ""


def _by_folders(files, folders, labels):
  """Returns (classes, splits, how labels were found, how to override that).

  Classes and splits are of each file, "" for none.
  """
  parts = [file.split(os.sep) for file in files]
  tops = {p[0] for p in parts if len(p) > 1}
  split_folders = (
    "train" in tops
    and tops <= _SPLITS | _UNLABELLED
    and all(len(p) > 1 for p in parts)
  )
  splits = [""] * len(files)
  if split_folders:
    splits = [p[0] if p[0] in _SPLITS else "train" for p in parts]
    parts = [p[1:] if p[0] in _SPLITS else p[-1:] for p in parts]
  classes = [composed(p[0]) if len(p) > 1 else "" for p in parts]
  classes = ["" if c.lower() in _UNLABELLED else c for c in classes]
  level = "second" if split_folders else "first"
  depth = 2 if split_folders else 1
  if labels == "none":
    why = "as data.labels says"
  elif labels == "folders":
    why = ""
    if not any(classes):
      raise UserError(
        "data.labels is folders, but the images are in no folders of their own."
      )
  else:
    why = _why_unlabelled(classes)
  if why:
    other = ""
    if labels != "none":
      other = (
        "To label some, write file,label lines into labels.csv in the folder"
        + ("; if its folders are classes, data.labels=folders." * any(classes))
      )
      other = other if other.endswith(".") else other + "."
    return [""] * len(files), splits, f"unlabelled, {why}", other
  empty = {
    composed(os.path.basename(f))
    for f in folders
    if f.count(os.sep) == depth - 1
  }.difference(classes, _UNLABELLED)
  how = f"classes from its {level} level of folders"
  if not all(classes):
    how += f", {classes.count('')} unlabelled"
  other = "If its folders mean nothing: data.labels=none."
  if empty:
    other = (
      f"No image, so no class: {', '.join(map(shown, sorted(empty)))}. {other}"
    )
  return classes, splits, how, other


def _why_unlabelled(classes):
  """Why folders of these names are not taken for classes, or ""."""
  names = set(classes) - {""}
  if not names:
    return "as they are in no folders of their own"
  if len(names) == 1:
    return "as there is one folder only"
  if all(_NUMBER_OR_DATE.fullmatch(name) for name in names):
    return "as the names of its folders are numbers or dates"
  if len(classes) - classes.count("") < 2 * len(names):
    return "as most of its folders have a single image"
  return ""


def _held_out(files, labels, *, fraction, seed):
  """bool [n], True where held out: `fraction` of each class.

  At least one image of each class stays in training.
  An image is drawn by a hash of its name, so that further images and labels
  move few of those that were there.
  """
  mask = np.zeros(len(files), bool)
  labelled = np.flatnonzero(labels >= 0)
  if not fraction or not len(labelled):
    return mask
  classes, counts = np.unique(labels[labelled], return_counts=True)
  shares = counts * fraction
  quotas = np.floor(shares).astype(int)
  by_remainder = np.argsort(quotas - shares, kind="stable")
  quotas[by_remainder[: round(shares.sum()) - quotas.sum()]] += 1
  quotas = np.minimum(quotas, counts - 1)
  prefix = b"%d " % seed
  draws = {
    i: hashlib.sha256(prefix + os.fsencode(files[i])).digest() for i in labelled
  }
  for label, quota in zip(classes, quotas, strict=True):
    members = labelled[labels[labelled] == label]
    mask[sorted(members, key=draws.get)[:quota]] = True
  return mask


def _class_list(names, counts):
  """At most eight "name count", for a message."""
  listed = [f"{shown(n)} {c}" for n, c in zip(names, counts, strict=True)]
  if len(listed) > 8:
    listed = [*listed[:7], f"... {len(names)} classes"]
  return ", ".join(listed)
