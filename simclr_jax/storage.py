"""Where runs are kept: folders and buckets, and what may be wrong with them."""

import contextlib
import errno
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from simclr_jax.config import UserError

# What etils.epath reads buckets with, and the extra that brings it.
_BUCKETS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def path(workdir) -> epath.Path:
  """A run's directory as it was given, with `~` for the home expanded.

  Raises:
    UserError: it is empty.

  >>> path("~/runs/mine").is_absolute(), str(path("gs://bucket/mine"))
  (True, 'gs://bucket/mine')
  """
  _need_name(workdir)
  return epath.Path(workdir).expanduser()


def root(workdir, *, field: str = "") -> epath.Path:
  """A run's directory as an absolute path, or one in a bucket.

  Args:
    workdir: the run's directory.
    field: the name of the option that gave it, with which messages begin.

  Raises:
    UserError: it is empty, or the package for this kind of bucket is not
      installed.

  >>> root("runs/mine").is_absolute()
  True
  """
  begin = f"{field}: " if field else ""
  _need_name(workdir, begin)
  scheme, separator, _ = str(workdir).partition("://")
  if not separator:  # Orbax notices a relative path only in its writing thread
    return epath.Path(Path(workdir).expanduser().absolute())
  package, extra = _BUCKETS.get(scheme, ("", ""))
  if not package:
    raise UserError(
      f"{begin}{workdir}: must be a local path, gs://... or s3://..."
    )
  if not importlib.util.find_spec(package):
    raise UserError(
      f"{begin}{workdir}: needs the package {package}: pip install {package}, "
      f"or '.[{extra}]' in the checkout"
    )
  return epath.Path(workdir)


def spelled(name: str) -> str:
  """A dataset's name with the path of a folder in its one spelling.

  >>> spelled("folder:/data/photos/") == spelled("folder:/data/x/../photos")
  True
  """
  kind, colon, folder = name.partition(":")
  if kind != "folder" or not folder:
    return name
  return kind + colon + os.path.abspath(os.path.expanduser(folder))


def _need_name(workdir, begin: str = "") -> None:
  if not str(workdir):  # would be the current folder
    raise UserError(f"{begin}the run's directory is empty; name a folder.")


def local_folder(path: str | os.PathLike, flag: str) -> Path:
  """A folder of this machine, with `~` for the home expanded.

  Raises:
    UserError: no name, or one in a bucket, which a Path would make "gs:" of.

  >>> local_folder("packed", "--output").as_posix()
  'packed'
  """
  if not os.fspath(path):
    raise UserError(f"{flag} is empty; name a folder.")
  if "://" in str(path):
    raise UserError(
      f"{flag}={path} is in a bucket; give a folder of this machine and copy "
      "it there."
    )
  return Path(path).expanduser()


def write_whole(file, content: str | bytes) -> None:
  """Writes a file in one piece: readers, and a kill, leave all of it or none.

  One process may write it at a time.

  >>> write_whole("runs/note.txt", "done")
  """
  file = epath.Path(file)
  draft = file.with_name(f"{file.name}.draft")
  if isinstance(content, str):
    draft.write_text(content)
  else:
    draft.write_bytes(content)
  draft.replace(file)


@contextlib.contextmanager
def writing(where) -> Iterator[None]:
  """Turns a full disk, a read-only or a lost directory into a UserError.

  Args:
    where: the directory that is written to, for the message.

  >>> with writing("runs"):
  ...   raise OSError(28, "No space left on device")
  Traceback (most recent call last):
    ...
  simclr_jax.errors.UserError: runs cannot be written: No space left on ...
  """
  try:
    yield
  except (OSError, ValueError) as error:
    # TensorStore puts the system's error number into the text.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if isinstance(error, OSError):
      reason = error.strerror or str(error)
    elif code:
      reason = os.strerror(int(code[1]))
    else:
      raise
    intact = "The last complete checkpoint there is intact; make"
    raise UserError(
      f"{where} cannot be written: {reason}. "
      f"{intact if _has_steps(where) else 'Make'} room or give it back, and "
      "start the same command again."
    ) from None


def _has_steps(where) -> bool:
  """Whether a checkpoint is in this directory, or in the run's that it is."""
  where = epath.Path(where)
  for folder in (where, where / "checkpoints"):
    with contextlib.suppress(OSError):
      if any(child.name.isdigit() for child in folder.iterdir()):
        return True
  return False


@contextlib.contextmanager
def writable(path: str | os.PathLike, flag: str) -> Iterator[None]:
  """Turns a full disk or a read-only folder into a UserError.

  >>> with writable("packed", "--output"):
  ...   raise OSError(28, "No space left on device")
  Traceback (most recent call last):
    ...
  simclr_jax.errors.UserError: --output=packed cannot be written: No space ...
  """
  try:
    yield
  except OSError as error:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError):  # A file where a folder should be.
      reason = os.strerror(errno.ENOTDIR)
    raise UserError(f"{flag}={path} cannot be written: {reason}.") from None
