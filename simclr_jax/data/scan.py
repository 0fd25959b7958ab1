"""Labels that are known only from reading all records, once."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from simclr_jax.config import UserError
from simclr_jax.data import cache
from simclr_jax.sources import Source, workers
from simclr_jax.sources.labels_csv import shown

# Records that are read at a time.
_CHUNK = 512


def scan_labels(
  source: Source,
  cache_dir: str | os.PathLike = "",
  *,
  listed: frozenset[str] = frozenset(),
) -> np.ndarray:
  """The labels of all records, int32 [N].

  Args:
    source: a `Source`.
    cache_dir: where they are kept for the next start; "" for nowhere.
    listed: ids; where given, all other records are -1.

  Raises:
    UserError: an id that no record has.
  """
  content = "\n".join([source.fingerprint, *sorted(listed)])
  digest = hashlib.sha256(content.encode()).hexdigest()[:24]
  file = Path(cache_dir) / f"labels-{digest}.npy"
  if cache_dir and (labels := _kept(file, len(source))) is not None:
    return labels
  found: set[str] = set()

  def scan(start):
    indices = range(start, min(start + _CHUNK, len(source)))
    if not listed:
      return [label for _, label in source.read(indices)]
    records = source.read_ids(indices)
    found.update(listed.intersection(name for name, _ in records))
    return [label if name in listed else -1 for name, label in records]

  starts = range(0, len(source), _CHUNK)
  parts = list(workers.threads().map(scan, starts))
  if missing := sorted(listed - found):
    raise UserError(
      f"{len(missing)} of the {len(listed)} ids in data.label_ids are not in "
      f'{source.name} {source.split}, such as "{missing[0]}"; its ids look like'
      f' "{shown(source.read_ids([0])[0][0])}".'
    )
  labels = np.concatenate([np.array(part, np.int32) for part in parts])
  if cache_dir:
    with cache.partial(file) as own:
      with own.open("wb") as opened:  # np.save would change the name.
        np.save(opened, labels)
      own.replace(file)
  return labels


def _kept(file, num_examples):
  """Labels from a file; None where it is missing or damaged."""
  try:
    labels = np.load(file)
  except (OSError, ValueError, EOFError):
    return None
  return labels if labels.shape == (num_examples,) else None


def with_listed_labels(
  source: Source, path: str, *, cache_dir: str | os.PathLike = ""
) -> Source:
  """The source with the labels of listed records alone, others unknown.

  Args:
    source: a `Source` whose records have ids.
    path: of a text file with an id a line, as SimCLRv2's 1percent.txt.
    cache_dir: as in `scan_labels`.

  Raises:
    UserError: no such file, an empty one, or ids that no record has.
  """
  try:
    text = Path(path).expanduser().read_text("utf-8", "replace")
  except OSError as error:
    raise UserError(
      f"data.label_ids: {path} cannot be read ({error.strerror})."
    ) from None
  listed = frozenset(line.strip() for line in text.splitlines()) - {""}
  if not listed:
    raise UserError(f"data.label_ids: {path} is empty; write an id a line.")
  if source.read_ids is None:
    raise UserError(
      f"data.label_ids is given, but the records of {source.name} have no ids."
    )
  labels = scan_labels(source, cache_dir, listed=listed)
  digest = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
  return dataclasses.replace(
    source, labels=labels, fingerprint=f"{source.fingerprint}:{digest}"
  )
