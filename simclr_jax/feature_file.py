"""Files of features: .npz or .parquet, with a row an image.

Columns: "features" float32 [n, C], "files", "labels" int32 (-1 unknown) and,
from a network with a classifier, "predictions" int32. Beside them stand
"label_names" and "about", a JSON object of what made the file.
"""

import dataclasses
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
    UserError: no such file, or it holds no features.
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
  num = len(features)
  labels = columns.get("labels", np.full(num, -1, np.int32))
  predictions = columns.get("predictions")
  for name, values in (("labels", labels), ("predictions", predictions)):
    if values is not None and (
      values.shape != (num,) or not np.issubdtype(values.dtype, np.integer)
    ):
      raise UserError(
        f"{field}: {name} in {path} must be {num} whole numbers, they are "
        f"{values.dtype} of shape {values.shape}"
      )
  if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
    raise UserError(
      f"{field}: features in {path} must be floats [n, C], they are "
      f"{features.dtype} of shape {features.shape}"
    )
  if not np.isfinite(features).all():
    raise UserError(f"{field}: features in {path} are not all finite")
  names = columns.get("label_names")
  if names is None:
    names = np.arange(labels.max(initial=-1) + 1)
  return Features(
    features=features,
    labels=labels,
    label_names=tuple(map(str, names.tolist())),
    predictions=predictions,
    about=json.loads(str(columns.get("about", "{}"))),
  )


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
    columns["about"] = described[b"about"].decode()
  return columns


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
