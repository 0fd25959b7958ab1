"""A run's directory: whose it is, whether its run is complete, its result."""

import json
import secrets
import time
from collections.abc import Callable

import jax
from etils import epath

from simclr_jax import checkpoint, hosts, storage
from simclr_jax import config as config_lib
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
# Other runs, which may have been moved: their networks' fingerprints count.
_NETWORKS = ("pretrained", "teacher")
DIVERGED = "diverged.json"
_OTHER = "take another --workdir"


def begin(
  config, workdir, num_steps: int, num_images: int, label_names
) -> dict | None:
  """`claim` with `check_data`; returns the result of a run that is complete."""

  def check():
    complete = _result(workdir, num_steps) is not None
    check_data(workdir, num_images, label_names, complete=complete)

  claim(config, workdir, num_steps, check=check)
  return finished(workdir, num_steps)


def claim(
  config,
  workdir,
  num_steps: int = 0,
  *,
  check: Callable[[], None] | None = None,
) -> None:
  """Writes config.json into the run's directory, or checks what is there.

  Every host calls it; it is also where a directory that the hosts do not share
  is found out, and a run whose loss was not finite.

  Args:
    config: of the stage, resolved.
    workdir: the run's directory.
    num_steps: how many steps are asked for; 0: not known.
    check: called before anything is written; may raise UserError.

  Raises:
    UserError: the directory cannot be written, holds another run or a longer
      one, is not shared by all hosts, or the run there diverged; or a package
      for it is missing.
  """
  workdir = storage.root(workdir)
  file, marker = workdir / "config.json", workdir / DIVERGED

  def make():
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      (workdir / ".nonce").write_text(str(nonce))

  def check_all():
    _check_shared(workdir / ".nonce", nonce)
    if marker.exists():
      found = read_json(marker, "step", "problem", hint=_OTHER)
      raise UserError(
        f"--workdir={workdir} holds a run that ended because at step "
        f"{found['step']} {found['problem']}; the same command would come "
        "there again. Take another --workdir with a lower "
        f"config.optim.learning_rate, or remove {marker} to try once more from "
        "the last checkpoint."
      )
    length = check_same(config, workdir)
    done = checkpoint.latest(workdir)
    if done and num_steps:
      refuse_shorter(workdir, done[0], num_steps)
    if check:
      check()
    if length:
      print(
        f"warning: {' and '.join(length)} changed, so the learning rate of the "
        "steps that remain follows another curve than before."
      )

  def write():
    if jax.process_index() == 0:
      storage.write_whole(file, config_lib.to_json(config))
      (workdir / ".nonce").unlink()

  nonce = hosts.broadcast(secrets.randbelow(2**31))
  for action in (make, check_all, write):  # no host is ahead by more than one
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


def refuse_shorter(workdir, done: int, num_steps: int) -> None:
  """Raises UserError where a run has `done` more steps than are asked for."""
  if done > num_steps:
    raise UserError(
      f"{workdir} has done {done} steps already, more than the {num_steps} "
      "that are asked for; take another --workdir."
    )


def check_same(config, workdir) -> list[str]:
  """Checks that the directory holds no run of another config; writes nothing.

  Args:
    config: of the stage; how long it trains need not be known yet.
    workdir: the run's directory, which need not exist.

  Returns:
    The fields that say how long to train and have changed.

  Raises:
    UserError: it does.
  """
  changed = _changed(config, workdir)
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
  return list(changed)


def check_data(
  workdir, num_images: int, label_names, *, complete: bool = False
) -> None:
  """Checks that a run there began with as many images, of the same classes.

  Args:
    workdir: the run's directory.
    num_images: that train now.
    label_names: the classes that they have now.
    complete: the run is: a difference is said, and no mistake.

  Raises:
    UserError: it began with others, whose batches cannot be continued.
  """
  if problem := _other_data(workdir, num_images, label_names):
    if not complete:
      raise UserError(problem)
    print(f"warning: {problem}", flush=True)


def _other_data(workdir, num_images: int, label_names) -> str:
  found = checkpoint.latest(workdir)
  if not found:
    return ""
  began = {"label_names": list(label_names), "num_images": num_images}
  began |= found[2]  # runs of earlier versions do not say

  def classes(names):
    return f"the classes {', '.join(names[:9])}" if names else "no labels"

  if began["label_names"] != list(label_names):
    was, now = classes(began["label_names"]), classes(list(label_names))
    hint = "" if began["label_names"] else ", --config.data.labels=none"
    return (
      f"{workdir} holds a run that began with {was}, and the data has {now} "
      f"now. Give the data as it was{hint}, or take another --workdir."
    )
  if began["num_images"] != num_images:
    return (
      f"{workdir} holds a run that began with {began['num_images']} images to "
      f"train on, and there are {num_images} now. Give the data as it was, or "
      "take another --workdir (config.pretrained can start it from this one)."
    )
  return ""


def _changed(config, workdir) -> dict[str, tuple]:
  """Field -> (value stored, value now), where a run would be another."""
  file = storage.root(workdir) / "config.json"
  found = None
  if file.exists():
    stored = read_json(file, hint=_OTHER)
  elif found := checkpoint.latest(workdir):  # the file was lost
    stored = found[1]
  else:
    return {}
  was = config_lib.flat(config_lib.from_json_tree(stored))
  now = config_lib.flat(config)
  changed = {
    name: (was.get(name), now.get(name))
    for name in sorted(now.keys() | was.keys())
    if name not in _MAY_CHANGE
    and _spelled(name, was.get(name)) != _spelled(name, now.get(name))
  }
  if changed.get("data.labels", ("", ""))[1] == "none":
    del changed["data.labels"]  # no more than `check_data` sees
  for name in set(_NETWORKS) & changed.keys():
    if now[name] and _is_same_network(name, now[name], workdir):
      del changed[name]
  return changed


def _spelled(name: str, value):
  """One spelling of a path: absolute, without a slash at the end."""
  if not isinstance(value, str) or not value:
    return value
  if name in _NETWORKS:
    return str(storage.root(value, field=f"config.{name}"))
  return storage.spelled(value) if name == "data.name" else value


def _is_same_network(name: str, where: str, workdir) -> bool:
  """Whether it is the one that the run in `workdir` began with."""
  found = checkpoint.latest(workdir)
  began = found[2].get(name) if found else None
  if not began:
    return False
  about = checkpoint.load_described(where, field=f"config.{name}")[2]
  return about["hash"] == began["hash"]


def read_json(file, *names: str, hint: str = "") -> dict:
  """Reads a JSON object from a file that is there.

  Args:
    file: a path with `read_text`.
    *names: what it must have.
    hint: what else may be done than to restore the file, for the message.

  Raises:
    UserError: it holds something else, as a file that was cut off does.
  """
  try:
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
      raise ValueError("no JSON object")
    for name in names:
      if name not in found:
        raise ValueError(f'it has no "{name}"')
  except ValueError as error:
    other = f", or {hint}" if hint else ""
    raise UserError(
      f"{file} is damaged: {error}. Restore it from a copy{other}."
    ) from None
  return found


def finished(workdir, num_steps: int) -> dict | None:
  """Returns the result of a run that is already complete, else None."""
  result = _result(workdir, num_steps)
  if result:
    print(f"{workdir} is complete: {num_steps} steps", flush=True)
  return result


def _result(workdir, num_steps: int) -> dict | None:
  file = epath.Path(workdir) / "result.json"
  if not file.exists():
    return None
  names = ("num_steps", "protocol", "top1", "top5")
  result = read_json(file, *names, hint=_OTHER)
  return result if result["num_steps"] == num_steps else None


def write_result(workdir, result: dict) -> dict:
  """Writes result.json (host 0) and returns `result`."""
  if jax.process_index() == 0:
    text = json.dumps(result, indent=2) + "\n"
    with storage.writing(workdir):
      # In one piece: other processes of a sweep may be reading.
      storage.write_whole(epath.Path(workdir) / "result.json", text)
  return result
