"""A run's directory: whose it is, whether its run is complete, its result."""

import json
import secrets
import time

import jax
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import hosts, storage
from simclr_jax.config import UserError

# A run may be continued with another value of these.
_MAY_CHANGE = (
  "data.data_dir",
  "data.memory_gib",
  "data.on_error",
  "log_every_steps",
  "eval_every_steps",
  "checkpoint_every_steps",
  "keep_checkpoints",
  "profile_steps",
  "report",
)
_LENGTH = ("num_epochs", "num_steps")
DIVERGED = "diverged.json"


def claim(config, workdir) -> None:
  """Writes config.json into the run's directory, or checks what is there.

  Every host calls it; it is also where a directory that the hosts do not share
  is found out, and a run whose loss was not finite.

  Raises:
    UserError: the directory cannot be written, holds another run, is not shared
      by all hosts, or the run there diverged; or a package for it is missing.
  """
  workdir = storage.root(workdir)
  file, marker = workdir / "config.json", workdir / DIVERGED

  def make():
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      (workdir / ".nonce").write_text(str(nonce))

  def check():
    _check_shared(workdir / ".nonce", nonce)
    if marker.exists():
      found = _read(marker)
      raise UserError(
        f"--workdir={workdir} holds a run that ended because at step "
        f"{found['step']} {found['problem']}; the same command would come "
        "there again. Take another --workdir with a lower "
        f"config.optim.learning_rate, or remove {marker} to try once more from "
        "the last checkpoint."
      )
    check_same(config, workdir)
    length = [name for name in _changed(config, file) if name in _LENGTH]
    if length:
      print(
        f"warning: {' and '.join(length)} changed, so the learning rate of the "
        "steps that remain follows another curve than before."
      )

  def write():
    if jax.process_index() == 0:
      draft = workdir / "config.json.draft"
      draft.write_text(config_lib.to_json(config))
      draft.replace(file)
      (workdir / ".nonce").unlink()

  nonce = hosts.broadcast(secrets.randbelow(2**31))
  for action in (make, check, write):  # no host is ahead by more than one
    problem = ""
    try:
      action()
    except OSError as error:
      reason = error.strerror or error
      problem = f"--workdir={workdir} cannot be written: {reason}."
    except UserError as error:
      problem = str(error)
    hosts.agree(problem)


def _check_shared(file, nonce: int, *, seconds: float = 20) -> None:
  """Waits a while: network file systems show new files late."""
  end = time.monotonic() + seconds
  while not (file.exists() and file.read_text() == str(nonce)):
    if time.monotonic() > end:
      raise UserError(
        f"the workdir is not shared: process {jax.process_index()} does not "
        f"see in {file.parent} what process 0 has written there. Give a "
        "--workdir that all hosts see, on a network file system or gs://."
      )
    time.sleep(0.2)


def check_same(config, workdir) -> None:
  """Checks that the directory holds no run of another config; writes nothing.

  Args:
    config: of the stage; how long it trains need not be known yet.
    workdir: the run's directory, which need not exist.

  Raises:
    UserError: it does.
  """
  file = storage.root(workdir) / "config.json"
  changed = _changed(config, file)
  if "stage" in changed:
    was, now = changed["stage"]
    raise UserError(
      f"--workdir={workdir} holds a {was} run, this is {now}; take another."
    )
  if other := [name for name in changed if name not in _LENGTH]:
    shown = "; ".join(
      "config.{} was {!r}, is {!r}".format(name, *changed[name])
      for name in other
    )
    raise UserError(
      f"--workdir={workdir} holds another run: {shown}. Give the values it "
      "has, or take another --workdir."
    )


def _changed(config, file) -> dict[str, tuple]:
  """Field -> (value in the file, value now), where a run would be another."""
  if not file.exists():
    return {}
  stored = config_lib.flat(config_lib.from_json_tree(_read(file)))
  mine = config_lib.flat(config)
  return {
    name: (stored.get(name), mine.get(name))
    for name in sorted(mine.keys() | stored.keys())
    if mine.get(name) != stored.get(name) and name not in _MAY_CHANGE
  }


def _read(file) -> dict:
  try:
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
      raise ValueError("no JSON object")
  except ValueError as error:
    raise UserError(
      f"{file} is damaged: {error}. Restore it from a copy, or take another "
      "--workdir."
    ) from None
  return found


def finished(workdir, num_steps: int) -> dict | None:
  """Returns the result of a run that is already complete, else None."""
  file = epath.Path(workdir) / "result.json"
  if not file.exists():
    return None
  result = _read(file)
  if result.get("num_steps") != num_steps:
    return None
  print(f"{workdir} is complete: {num_steps} steps", flush=True)
  return result


def write_result(workdir, result: dict) -> dict:
  """Writes result.json (host 0) and returns `result`."""
  if jax.process_index() == 0:
    text = json.dumps(result, indent=2) + "\n"
    with storage.writing(workdir):
      # In one piece: other processes of a sweep may be reading.
      draft = epath.Path(workdir) / "result.json.draft"
      draft.write_text(text)
      draft.replace(draft.with_name("result.json"))
  return result
