"""Running the cells of a grid, alone or beside other processes."""

import contextlib
import fcntl
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from simclr_jax import cli, distill, finetune, pretrain, storage
from simclr_jax.config import Diverged, UserError
from simclr_jax.sweep.grid import Cell, command

STAGES = {"pretrain": pretrain, "finetune": finetune, "distill": distill}


def run_cells(
  cells: Sequence[Cell], workdir: Path, *, locks: bool = True
) -> list[str]:
  """Runs what is not complete; returns the names of the cells that failed.

  A cell that fails is reported, and those that need it fail with it; the
  others run. Cells that another process runs are waited for.

  Raises:
    UserError: `workdir` cannot be written, or has no locks.
  """
  pending = {cell.name: cell for cell in cells}
  failed: list[str] = []
  with storage.writable(workdir, "--workdir"):
    (workdir / ".locks").mkdir(parents=True, exist_ok=True)
  while pending:
    before = len(pending)
    for name, cell in list(pending.items()):
      if cell.needs in failed:
        print(f"\nfailed: {name} needs {cell.needs}", flush=True)
        failed.append(name)
      elif cell.needs in pending:
        continue
      elif not (workdir / name / "result.json").exists():
        lock = _lock(workdir / ".locks" / name)
        with lock if locks else contextlib.nullcontext(True) as mine:
          if not mine:
            continue
          if not _run_cell(cell, workdir):
            failed.append(name)
      del pending[name]
    if len(pending) == before:
      time.sleep(2)  # others have them
  return failed


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[bool]:
  """Whether this process has got the lock, which ends with the process."""
  with storage.writable(file.parents[1], "--workdir"):
    handle = file.open("w")
  with handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
      return
    except OSError as error:
      raise UserError(
        f"{file.parent} is on a file system without locks ({error.strerror}); "
        "give each process its part of the grid: --task=0/4 to --task=3/4."
      ) from None
    yield True


def _run_cell(cell: Cell, workdir: Path) -> bool:
  """Trains; returns False, and leaves error.txt, where that failed."""
  flags = command(cell, workdir)
  line = f"$ python -m simclr_jax.{cell.stage} {shlex.join(flags)}\n"
  print(f"\n{line}", end="", flush=True)
  file = workdir / cell.name / "error.txt"
  try:
    config, folder = cli.parse(flags, stage=cell.stage)
    STAGES[cell.stage].train_and_evaluate(config, folder)
  except (UserError, Diverged) as error:
    text = f"error: {error}\n"
  except Exception:  # whatever it is, the other cells go on
    text = traceback.format_exc()
  else:
    file.unlink(missing_ok=True)
    return True
  finally:
    jax.clear_caches()  # no other cell runs the same compiled functions
  print(f"failed: {cell.name}: {text}", end="", file=sys.stderr, flush=True)
  with storage.writable(workdir, "--workdir"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(line + text)
  return False
