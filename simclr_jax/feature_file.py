"""Files of features: .npz or .parquet, with a row an image.

Columns: "features" float32 [n, C], "files", "labels" int32 (-1 unknown) and,
from a network with a classifier, "predictions" int32. Beside them stand
"label_names" and "about", a JSON object of what made the file. The first
about["num_outputs"] names are those of the classifier's outputs;
about["data_classes"] are the dataset's own classes, as numbers in its order.
"""

import dataclasses
import itertools
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simclr_jax.config import UserError

SUFFIXES = (".npz", ".parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """What such a file holds.

  Attributes:
    features: float32 [n, C].
    labels: int32 [n], -1 where unknown.
    label_names: of labels and predictions.
    predictions: int32 [n], None without a classifier.
    about: what made it; {} where it does not say.
  """

  features: np.ndarray
  labels: np.ndarray
  label_names: tuple[str, ...]
  predictions: np.ndarray | None
  about: dict[str, Any]


def read(path, *, field: str = "--features") -> Features:
  """Reads a file that `write` or somebody else has made.

  Only "features" is asked of it; labels may be missing.

  Args:
    path: .npz or .parquet.
    field: the name of the option that gave it, for messages.

  Raises:
    UserError: no such file, or it holds no features, or a label without name.
  """
  path = Path(path).expanduser()
  try:
    if path.suffix == ".parquet":
      columns = _read_parquet(path)
    else:
      with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file}
  except FileNotFoundError:
    raise UserError(f"{field}: there is no file {path}") from None
  except Exception as error:  # NumPy, zipfile and pyarrow raise many types
    reason = " ".join(str(error).split())[:160]
    raise UserError(
      f"{field}: {path} is not a file of features ({reason}); "
      "python -m simclr_jax.embed makes one"
    ) from None
  features = columns.get("features")
  if features is None:
    raise UserError(
      f'{field}: {path} has no "features", only '
      f"{', '.join(map(repr, columns)) or 'nothing'}"
    )
  if (
    features.ndim != 2
    or not features.shape[1]
    or not np.issubdtype(features.dtype, np.floating)
  ):
    raise UserError(
      f"{field}: features in {path} must be floats [n, C], C above 0; they "
      f"are {features.dtype} of shape {features.shape}"
    )
  if not np.isfinite(features).all():
    raise UserError(f"{field}: features in {path} are not all finite")
  num = len(features)
  columns.setdefault("labels", np.full(num, -1, np.int32))
  for name in {"labels", "predictions"} & columns.keys():
    values = columns[name]
    if values.shape != (num,) or not np.issubdtype(values.dtype, np.integer):
      raise UserError(
        f"{field}: {name} in {path} must be {num} whole numbers, they are "
        f"{values.dtype} of shape {values.shape}"
      )
    if np.issubdtype(values.dtype, np.unsignedinteger):  # has no -1
      columns[name] = values.astype(np.int64)
  labels = columns["labels"]
  highest = labels.max(initial=-1)
  names = columns.get("label_names")
  if names is None:
    names = np.arange(highest + 1)
  if names.ndim != 1 or highest >= len(names):
    raise UserError(
      f"{field}: label {highest} in {path} has no name, label_names is of "
      f"shape {names.shape}"
    )
  return Features(
    features=features,
    labels=labels,
    label_names=tuple(map(str, names.tolist())),
    predictions=columns.get("predictions"),
    about=_about(columns.get("about", "{}")),
  )


def _about(text) -> dict:
  """The JSON object, or {}: others may mean something else by that name."""
  try:
    about = json.loads(str(text))
  except ValueError:
    return {}
  return about if isinstance(about, dict) else {}


def read_to_fit(path, test_path="") -> list[Features]:
  """Reads one file or two, and renumbers labels to their datasets' classes.

  `embed` numbers the classes of the network's classifier first. Here only the
  datasets' own are left, as where a run is evaluated. Predictions are left out
  where the classifier lacks a class of the dataset.

  Args:
    path: of the features to train on.
    test_path: of those to test on; "": none.

  Raises:
    UserError: see `read`, or the two do not fit each other.
  """
  files = [read(path)]
  if test_path:
    test = read(test_path, field="--test_features")
    files = _fitted(files[0], test, path, test_path)
  if not any("data_classes" in file.about for file in files):
    return files
  names = tuple(dict.fromkeys(itertools.chain(*map(_own_names, files))))
  return [_numbered_by(names, file) for file in files]


def _own_names(file):
  """Names of the dataset's classes, and of others that labels now have."""
  classes = file.about.get("data_classes")
  if classes is None:
    return file.label_names
  found = np.unique(file.labels[file.labels >= 0]).tolist()
  names = dict(enumerate(file.label_names))
  return [names[k] for k in dict.fromkeys([*classes, *found]) if k in names]


def _numbered_by(names, file):
  about = dict(file.about)
  about.pop("data_classes", None)
  known = file.label_names[: about.pop("num_outputs", None)]
  predictions = file.predictions
  if predictions is not None and {*_own_names(file)} <= {*known}:
    predictions = renumber(predictions, file.label_names, names)
  else:
    predictions = None
  return dataclasses.replace(
    file,
    labels=renumber(file.labels, file.label_names, names),
    label_names=names,
    predictions=predictions,
    about=about,
  )


def renumber(values, names: Sequence[str], new_names: Sequence[str]):
  """Classes int [n] of `names` as those of `new_names`; -1 for all others."""
  number = {name: k for k, name in enumerate(new_names)}
  lookup = np.array([*(number.get(name, -1) for name in names), -1], np.int32)
  return lookup[np.where((values >= 0) & (values < len(names)), values, -1)]


def _fitted(train, test, path, test_path):
  """Both; where classes have only numbers, with the longer list of names."""
  names = max(train.label_names, test.label_names, key=len)
  if names == tuple(map(str, range(len(names)))):
    train, test = (
      dataclasses.replace(file, label_names=names)
      if file.label_names == names[: len(file.label_names)]
      else file
      for file in (train, test)
    )
  for what, a, b in (
    ("label_names", train.label_names, test.label_names),
    ("features a row", train.features.shape[1], test.features.shape[1]),
    ("layer", train.about.get("layer"), test.about.get("layer")),
    ("checkpoint", _hash_of(train), _hash_of(test)),
  ):
    if a != b:
      raise UserError(
        f"{path} and {test_path} differ in {what}: {a} and {b}"[:300]
      )
  return [train, test]


def _hash_of(file):
  checkpoint = file.about.get("checkpoint")
  return checkpoint.get("hash") if isinstance(checkpoint, dict) else None


def _read_parquet(path):
  import pyarrow.parquet as pq  # takes a while

  table = pq.read_table(path)
  columns = {}
  for name in table.column_names:
    values = table[name].combine_chunks()
    if name == "features":
      values = values.flatten()
      flat = values.to_numpy(zero_copy_only=False)
      columns[name] = flat.reshape(len(table), -1)
    elif name != "files":
      columns[name] = values.to_numpy(zero_copy_only=False)
  described = table.schema.metadata or {}
  if b"label_names" in described:
    names = json.loads(described[b"label_names"])
    columns["label_names"] = np.array(names, np.str_)
    columns["about"] = described.get(b"about", b"{}").decode()
  return columns


def parts(folder: Path) -> list[tuple[int, int, Path]]:
  """(first image, image after the last, file) of each part, in order."""
  files = sorted(folder.glob("[0-9]*-[0-9]*.npz"))
  return [(*map(int, file.stem.split("-")), file) for file in files]


def write_part(
  folder: Path, first: int, stop: int, columns: dict[str, list[np.ndarray]]
) -> None:
  """Writes the rows of images `first` to `stop`, whole or not at all.

  Args:
    folder: where parts are kept.
    first: of the images; those that were skipped have no row.
    stop: the image after the last.
    columns: arrays to be joined.
  """
  path = folder / f"{first:012}-{stop:012}.npz"
  draft = path.with_suffix(".draft")
  with draft.open("wb") as file:
    np.savez(file, **{k: np.concatenate(x) for k, x in columns.items()})
    file.flush()
    os.fsync(file.fileno())
  draft.replace(path)


def write(
  path: os.PathLike,
  parts: Sequence[os.PathLike],
  *,
  label_names: Sequence[str],
  about: dict,
  suffix: str,
) -> tuple[int, int]:
  """Joins parts, of which one at a time is in memory.

  Args:
    path: the new file.
    parts: .npz files with the columns.
    label_names: of labels and predictions.
    about: JSON values.
    suffix: which of `SUFFIXES` the file is.

  Returns:
    The shape of its features.
  """
  with np.load(parts[0]) as part:
    names = ["features", "files", "labels"]
    names += ["predictions"] if "predictions" in part else []
    width = part["features"].shape[1]
  make = _write_parquet if suffix == ".parquet" else _write_npz
  num = make(path, parts, names, width, list(label_names), json.dumps(about))
  return num, width


def _column(files, name):
  """The values of a column, part after part."""
  for file in files:
    with np.load(file) as part:
      yield part[name]


def _write_npz(path, files, names, width, label_names, about):
  num = sum(map(len, _column(files, "labels")))
  longest = max(x.itemsize for x in _column(files, "files")) // 4
  dtypes = {"features": "<f4", "files": f"<U{longest}"}
  with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
    for name in names:
      dtype = np.dtype(dtypes.get(name, "<i4"))
      header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (num, width) if name == "features" else (num,),
      }
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for values in _column(files, name):
          file.write(values.astype(dtype).tobytes())
    small = {"label_names": np.array(label_names, np.str_), "about": about}
    for name, value in small.items():
      with archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
  return num


def _write_parquet(path, files, names, width, label_names, about):
  import pyarrow as pa  # takes a while
  import pyarrow.parquet as pq

  types = {"features": pa.list_(pa.float32(), width), "files": pa.string()}
  schema = pa.schema(
    [(name, types.get(name, pa.int32())) for name in names],
    metadata={"label_names": json.dumps(label_names), "about": about},
  )
  num = 0
  with pq.ParquetWriter(path, schema) as writer:
    for file in files:
      with np.load(file) as part:
        columns = [part[name] for name in names]
      features = pa.array(columns[0].ravel(), pa.float32())
      arrays = [pa.FixedSizeListArray.from_arrays(features, width)]
      arrays += [
        pa.array(values.tolist(), schema.field(name).type)
        for name, values in zip(names[1:], columns[1:], strict=True)
      ]
      writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
      num += len(columns[0])
  return num
