"""What is kept on disk for the next start: decoded images, labels read once.

Processes of several hosts may write the same at one time, to a shared disk.
Each writes under a name of its own, which becomes the right one when all is
there. The first complete one is kept.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from simclr_jax.sources import Source

# To be raised where the pixels that decoding gives change.
_FORMAT = 2
# What has not changed for so long was left by a process that was killed.
_LEFT_SECONDS = 3600.0
_ARRAYS = ("images", "sizes", "labels")


def images_folder(
  source: Source, canvas_size: int, cache_dir: str | os.PathLike
) -> Path | None:
  """Where the decoded images of this content are; None for nowhere."""
  if not cache_dir or not source.fingerprint:
    return None
  key = f"{_FORMAT} {canvas_size} {source.channels} {source.fingerprint}"
  return Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:24]


def read_images(
  folder: Path, shape: tuple[int, ...], *, mmap_mode: str | None = None
) -> dict[str, np.ndarray] | None:
  """What `write_images` wrote; None where that is missing or damaged.

  Args:
    folder: from `images_folder`.
    shape: of the images, [N, S, S, C].
    mmap_mode: of `np.load`; "r" looks at the files without reading them.
  """
  try:
    arrays = {
      name: np.load(folder / f"{name}.npy", mmap_mode=mmap_mode)
      for name in _ARRAYS
    }
  except (OSError, ValueError, EOFError):
    return None
  return arrays if arrays["images"].shape == shape else None


def write_images(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Keeps images, sizes and labels; prints a note where it cannot.

  Args:
    folder: from `images_folder`.
    arrays: "images" [N, S, S, C], "sizes" [N, 2] and "labels" [N].
  """
  images = arrays["images"]
  try:
    with partial(folder) as own:
      own.mkdir()
      if shutil.disk_usage(own).free < 2 * images.nbytes:
        raise OSError(28, "little space is left")
      for name in _ARRAYS:
        np.save(own / f"{name}.npy", arrays[name])
      if read_images(folder, images.shape, mmap_mode="r"):
        return  # Another process was faster.
      if folder.exists():  # Damaged; others may be replacing it as well.
        with partial(folder) as aside:
          folder.rename(aside)
      own.rename(folder)
  except OSError as error:  # The run does not need it.
    if not folder.exists():
      print(
        f"note: decoded images are not kept in {folder.parent} "
        f"({error.strerror})",
        flush=True,
      )


@contextlib.contextmanager
def partial(path: Path) -> Iterator[Path]:
  """A name beside `path` that no other process has, to be renamed to it.

  What is still under that name at the end is removed, and what killed processes
  left beside it.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  for other in path.parent.glob("*.partial*"):
    if _age(other) > _LEFT_SECONDS:
      _remove(other)
  # Of random numbers: the processes of several containers all have the id 1.
  own = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
  try:
    yield own
  finally:
    _remove(own)


def _age(path):
  """Seconds since a file, or one of a folder, was written to; 0 if gone."""
  try:
    changed = [file.stat().st_mtime for file in (path, *path.rglob("*"))]
  except OSError:
    return 0
  return time.time() - max(changed)


def _remove(path):
  with contextlib.suppress(OSError):
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)
