"""Orbax checkpoints that carry their config.

A run's directory holds `checkpoints/<step>/{state,config}`. The state is a tree
of numpy arrays as one device has it: step, params, batch_stats and opt_state
(by path, so that no optax class is needed to read it).
"""

import contextlib
import errno
import functools
import sys
import unicodedata
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import storage, weights
from simclr_jax.config import UserError


def _directory(workdir) -> epath.Path:
  return storage.root(workdir) / "checkpoints"


@contextlib.contextmanager
def open_manager(workdir, *, keep: int) -> Iterator[ocp.CheckpointManager]:
  """Opens a run's checkpoints for writing.

  Leaving it waits for the save under way, and may raise what `save` raises.

  Args:
    workdir: the run's directory.
    keep: how many of the latest checkpoints stay.

  >>> with open_manager("runs/pretrained", keep=2) as manager:
  ...   manager.latest_step()
  7
  """
  # Orbax logs each failure three times with its trace, and raises it too.
  logging.get_absl_logger().addFilter(_is_no_trace)
  _hide_late_futures()
  with storage.writing(_directory(workdir)):
    manager = ocp.CheckpointManager(
      _directory(workdir),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # In this thread: others would wait for a directory that cannot be made.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
    )
  try:
    yield manager
  except jax.errors.JaxRuntimeError:
    raise  # a lost host: closing would wait for it
  except BaseException:
    with contextlib.suppress(Exception):  # the first error says more
      manager.close()
    raise
  with storage.writing(manager.directory):
    manager.close()


def _is_no_trace(record) -> bool:
  return record.levelno < 40 or "orbax" not in record.pathname


@functools.cache  # once a process
def _hide_late_futures() -> None:
  """What a failed save leaves behind finds Orbax's event loop closed."""
  shown = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      shown(unraisable)

  sys.unraisablehook = hook


def save(manager, state: dict, config, *, extra: dict | None = None) -> None:
  """Starts an asynchronous, atomic save of one step.

  Checkpoints of this step and later ones are deleted first: they are damaged,
  or the run would not have begun before them.

  Args:
    manager: from `open_manager`.
    state: step, params, batch_stats, opt_state; numpy leaves.
    config: the run's resolved config.
    extra: JSON values kept beside the config (label names, teacher, ...).

  Raises:
    UserError: this save or the one before it could not be written.

  >>> config = config_lib.from_json_tree({"seed": 0})
  >>> state = {"step": 3, "params": {"w": np.ones(2)}}
  >>> state |= {"batch_stats": {}, "opt_state": {}}
  >>> with open_manager("runs/saved", keep=1) as manager:
  ...   save(manager, state, config)
  >>> load("runs/saved")[1]["params"]
  {'w': array([1., 1.])}
  """
  tree = dict(state, opt_state=_by_path(state["opt_state"]))
  described = {"config": config.to_dict(), "extra": extra or {}}
  with storage.writing(manager.directory):
    if not manager.directory.exists():  # Orbax would make a new one
      raise FileNotFoundError(errno.ENOENT, "the directory is gone")
    for step in manager.all_steps():
      if step >= state["step"]:  # Orbax would save nothing, and not say so
        manager.delete(step)
    manager.save(
      int(state["step"]),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(tree), config=ocp.args.JsonSave(described)
      ),
    )


def check(manager, *, wait: bool = False) -> None:
  """Raises UserError where the save under way has failed.

  Args:
    manager: from `open_manager`.
    wait: until it is complete.

  >>> with open_manager("runs/pretrained", keep=1) as manager:
  ...   check(manager, wait=True)
  """
  with storage.writing(manager.directory):
    if wait:
      manager.wait_until_finished()
    manager.check_for_errors()


def _by_path(tree) -> dict:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def restore_latest(manager, target: dict) -> dict | None:
  """Returns the newest readable state, or None where there is no checkpoint.

  A damaged checkpoint is named in a warning and the one before it is taken.

  Args:
    manager: from `open_manager`.
    target: a state of the same structure: step, params, batch_stats, opt_state.

  Raises:
    UserError: checkpoints exist but none can be read, or the shapes differ.

  >>> with open_manager("runs/new", keep=1) as manager:
  ...   print(restore_latest(manager, {"step": 0, "params": {}}))
  None
  """
  if found := _newest(manager, lambda step: _read(manager, step)[0]):
    step, tree = found
    where = f"{manager.directory}/{step}"
    wanted = dict(target, opt_state=_by_path(target["opt_state"]))
    for name in ("opt_state", "params", "batch_stats"):
      _check_same(wanted[name], tree[name], where=where)
    leaves = [tree["opt_state"][path] for path in wanted["opt_state"]]
    structure = jax.tree.structure(target["opt_state"])
    return tree | {"opt_state": structure.unflatten(leaves)}
  if steps := sorted(manager.all_steps()):
    raise UserError(
      f"no checkpoint under {manager.directory} can be read (steps "
      f"{steps}); restore one from a copy or start with another --workdir."
    )
  if (manager.directory.parent / "metrics.jsonl").exists():
    logging.warning(
      "%s is empty: the run that was begun here starts over", manager.directory
    )
  return None


def _reader(directory) -> ocp.CheckpointManager:
  """For this process alone: others may not see the same files, or not ask."""
  index = jax.process_index()
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(
      create=False,
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"process_{index}",
      ),
    ),
  )


def _newest(manager, read, *, quiet=False) -> tuple | None:
  """(step, read(step)) of the newest step that can be read, or None."""
  for step in sorted(manager.all_steps(), reverse=True):
    try:
      return step, read(step)
    except Exception as error:  # Orbax raises what it likes
      if quiet:
        continue
      logging.warning(
        "checkpoint %s/%d is damaged (%s); trying the one before it",
        manager.directory,
        step,
        str(error).splitlines()[0][:200],
      )
  return None


def _read(manager, step: int) -> tuple[dict, dict]:
  items = manager.restore(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardRestore(), config=ocp.args.JsonRestore()
    ),
  )
  state = items["state"]
  for name in ("params", "batch_stats", "opt_state"):
    state.setdefault(name, {})
  return jax.tree.map(np.asarray, state), _described(items)


def _described(items) -> dict:
  """What `save` has put beside the state: {"config", "extra"}."""
  found = items["config"]
  for name in ("config", "extra"):
    if not isinstance(found, dict) or not isinstance(found.get(name), dict):
      raise ValueError(f'its metadata has no "{name}"')
  return found


def load(workdir, *, field: str = "checkpoint"):
  """Reads the latest complete checkpoint of a run.

  Args:
    workdir: the run's directory.
    field: the name of the option that gave it, for messages.

  Returns:
    (config, variables): a locked ConfigDict and numpy arrays {"params",
    "batch_stats"}.

  Raises:
    UserError: no such directory, or no checkpoint in it.

  >>> config, variables = load("runs/pretrained")
  >>> config.model.depth, sorted(variables["params"])
  (18, ['encoder', 'projection_head'])
  """
  config, variables, _ = load_described(workdir, field=field)
  return config, variables


def load_described(workdir, *, field: str = "checkpoint"):
  """Like `load`, with a third value: a dict about the checkpoint.

  It has what `save` was given as `extra`, and "workdir", "step" and "hash" (of
  the variables).

  >>> config, variables, about = load_described("runs/finetuned")
  >>> about["step"], about["label_names"][:3]
  (7, ['0', '1', '2'])
  """
  directory = storage.root(workdir, field=field) / "checkpoints"
  if not directory.parent.exists():
    raise UserError(f"{field}: there is no directory {workdir}.")
  if not directory.exists():
    raise UserError(
      f"{field}: {workdir} is not a run's directory: it has no checkpoints/. "
      "Give the --workdir of an earlier run."
    )
  with _reader(directory) as manager:
    found = _newest(manager, functools.partial(_read, manager))
    steps = manager.all_steps()
  if not found:
    why = "all are damaged." if steps else "has that run saved yet?"
    raise UserError(f"{field}: no complete checkpoint under {directory}; {why}")
  _, (tree, described) = found
  config = config_lib.from_json_tree(described["config"])
  variables = {k: tree[k] for k in ("params", "batch_stats")}
  about = _composed(described["extra"])
  about |= {"workdir": str(workdir), "step": int(tree["step"])}
  about["hash"] = weights.fingerprint(variables)
  return config, variables, about


def latest(workdir) -> tuple[int, dict, dict] | None:
  """Describes the newest checkpoint: (step, its config, what was `extra`).

  None where there is none that can be read. Its arrays are not read.

  >>> step, config, extra = latest("runs/finetuned")
  >>> step, config["stage"], extra["label_names"][:3]
  (7, 'finetune', ['0', '1', '2'])
  """
  directory = _directory(workdir)
  if not directory.is_dir():
    return None
  args = ocp.args.Composite(config=ocp.args.JsonRestore())
  with _reader(directory) as manager:

    def read(step):
      return _described(manager.restore(step, args=args))

    found = _newest(manager, read, quiet=True)  # `restore_latest` says it
  if not found:
    return None
  step, described = found
  return step, described["config"], _composed(described["extra"])


def _composed(extra: dict) -> dict:
  """Class names as sources give them now: each accent in its letter."""
  names = [
    unicodedata.normalize("NFC", n) for n in extra.get("label_names", ())
  ]
  return extra | ({"label_names": names} if "label_names" in extra else {})


def _check_same(expected, got, *, where: str) -> None:
  want, have = weights.shapes(expected), weights.shapes(got)
  if problem := weights.difference(want, have):
    raise UserError(f"checkpoint {where} does not fit this run: {problem}")
