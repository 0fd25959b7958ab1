"""The training loop that all stages share: log, evaluate, save, resume, stop.

What happens at step t depends on t alone, never on when the run was started:
batch t, the random numbers of step t, the lines of metrics.jsonl and the saves.
"""

import contextlib
import functools
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator

import flax
import jax
import numpy as np
import optax
from etils import epath

from simclr_jax import checkpoint, logs, parallel, signals, watchdog
from simclr_jax import config as config_lib
from simclr_jax.config import Diverged, UserError


class TrainState(flax.struct.PyTreeNode):
  """What training changes; everything else is a pure function of `step`."""

  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: tuple

  def apply_gradients(self, optimizer, grads, batch_stats) -> "TrainState":
    """Returns the state after one update of an optax `optimizer`."""
    updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
    return self.replace(
      step=self.step + 1,
      params=optax.apply_updates(self.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
    )


# A run may be continued with another value of these.
_MAY_CHANGE = (
  "data.data_dir",
  "data.memory_gib",
  "data.on_error",
  "log_every_steps",
  "eval_every_steps",
  "checkpoint_every_steps",
  "keep_checkpoints",
)
_LENGTH = ("num_epochs", "num_steps")
_DIVERGED = "diverged.json"


def claim(config, workdir) -> None:
  """Writes config.json into the run's directory, or checks what is there.

  Every host calls it; it is also where a directory that the hosts do not share
  is found out, and a run whose loss was not finite.

  Raises:
    UserError: the directory cannot be written, holds another run, is not shared
      by all hosts, or the run there diverged.
  """
  workdir = epath.Path(workdir)
  file, marker = workdir / "config.json", workdir / _DIVERGED

  def make():
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
      (workdir / ".nonce").write_text(str(nonce))

  def check():
    _check_shared(workdir / ".nonce", nonce)
    if marker.exists():
      found = json.loads(marker.read_text())
      raise UserError(
        f"--workdir={workdir} holds a run whose loss was {found['loss']} at "
        f"step {found['step']}, and the same command would come there again. "
        "Take another --workdir with a lower config.optim.learning_rate, or "
        f"remove {marker} to try once more from the last checkpoint."
      )
    if file.exists():
      stored = config_lib.from_json_tree(json.loads(file.read_text()))
      _check_same_run(config_lib.flat(config), config_lib.flat(stored), workdir)

  def write():
    if jax.process_index() == 0:
      draft = workdir / "config.json.draft"
      draft.write_text(config_lib.to_json(config))
      draft.replace(file)
      (workdir / ".nonce").unlink()

  nonce = parallel.broadcast(secrets.randbelow(2**31))
  for action in (make, check, write):  # no host is ahead by more than one
    problem = ""
    try:
      action()
    except OSError as error:
      reason = error.strerror or error
      problem = f"--workdir={workdir} cannot be written: {reason}."
    except UserError as error:
      problem = str(error)
    parallel.agree(problem)


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


def _check_same_run(mine: dict, stored: dict, workdir) -> None:
  changed = [
    name
    for name in sorted(mine.keys() | stored.keys())
    if mine.get(name) != stored.get(name) and name not in _MAY_CHANGE
  ]
  length = [name for name in changed if name in _LENGTH]
  if len(length) < len(changed):
    shown = "; ".join(
      f"config.{name} was {stored.get(name)!r}, is {mine.get(name)!r}"
      for name in changed
    )
    raise UserError(
      f"--workdir={workdir} holds another run: {shown}. Give the values it "
      "has, or take another --workdir."
    )
  if length:
    print(
      f"warning: {' and '.join(length)} changed, so the learning rate of the "
      "steps that remain follows another curve than before."
    )


def finished(workdir, num_steps: int) -> dict | None:
  """Returns the result of a run that is already complete, else None."""
  file = epath.Path(workdir) / "result.json"
  if not file.exists():
    return None
  result = json.loads(file.read_text())
  if result["num_steps"] != num_steps:
    return None
  print(f"{workdir} is complete: {num_steps} steps", flush=True)
  return result


def run(
  state: TrainState,
  step_fn: Callable,
  batches: Callable[[int], Iterator[dict]],
  *,
  config,
  workdir,
  num_steps: int,
  evaluate: Callable[[TrainState], dict] | None = None,
  constants: tuple = (),
  learning_rate: Callable | None = None,
  anchors: dict | None = None,
  extra: dict | None = None,
  stall_minutes: float = 10,
) -> tuple[TrainState, dict]:
  """Trains to `num_steps`, continuing from the latest checkpoint.

  Args:
    state: the initial state as numpy, not replicated.
    step_fn: (state, batch, key, *constants) -> (state, metrics) on one device,
      inside the axis `parallel.AXIS`; metrics are reduced scalars with "loss".
    batches: start step -> this host's batches from that step on, numpy.
    config: the resolved config; its seed makes the key.
    workdir: the run's directory.
    num_steps: where training ends.
    evaluate: replicated state -> dict of floats, called every
      `eval_every_steps` and at the end.
    constants: further arguments of the step, one device's copy (a teacher).
    learning_rate: schedule, steps done -> rate, to log beside the metrics.
    anchors: metric -> text about a network that knows nothing, shown beside it.
    extra: JSON values saved with each checkpoint.
    stall_minutes: after so long in one phase of a step, print where; 0: never.

  Returns:
    The final state (numpy) and a dict with the last evaluation,
    "images_per_second" and "seconds".

  Raises:
    Diverged: the loss is no longer finite.
    UserError: a checkpoint cannot be written.
    SystemExit: stopped by a signal, after saving.
  """
  begin = time.perf_counter()
  with (
    checkpoint.open_manager(workdir, keep=config.keep_checkpoints) as manager,
    signals.StopSignal() as stop,
    watchdog.Watchdog(minutes=stall_minutes) as watch,
  ):
    restored = checkpoint.restore_latest(manager, vars(state))
    if restored is not None:
      state = TrainState(**restored)
      print(f"continuing from step {int(state.step)} in {workdir}", flush=True)
    start = int(state.step)
    _agree_on_start(start)

    def is_due(step):
      return step == num_steps or step % config.eval_every_steps == 0

    # A signal during an evaluation saves without it; a kill cannot.
    owed = start > 0 and is_due(start) and not _is_evaluated(workdir, start)
    log = _Log(
      workdir,
      start,
      num_steps,
      config,
      learning_rate=learning_rate,
      anchors=anchors or {},
    )
    mapped = parallel.pmap(_with_stop(step_fn), donate_argnums=0)
    state = parallel.replicate(state)
    key = parallel.replicate(jax.random.key(config.seed))
    constants = parallel.replicate(constants)
    stream = parallel.prefetch(batches(start))
    evaluated = unread = None

    def evaluation(step):
      """Evaluates; returns whether a signal came in between."""
      nonlocal evaluated
      watch.phase("evaluation", step=step)
      evaluated = None
      try:
        # Other hosts wait in its collectives: there it runs to its end.
        alone = jax.process_count() == 1
        with stop.interruptible() if alone else contextlib.nullcontext():
          evaluated = log.evaluation(step, evaluate, state)
      except signals.Interrupted:
        return True
      return False

    try:
      if owed and evaluate:  # here a signal ends the process at once
        evaluation(start)
      for step in range(start + 1, num_steps + 1):
        watch.phase("data", step=step)
        batch = next(stream)
        watch.phase("step" if stop.running else "compilation", step=step)
        flag = parallel.replicate(np.int32(stop.requested))
        state, metrics = mapped(state, batch, key, flag, *constants)
        # While the device works on this step, read the one before.
        stopping = unread is not None and log.read(*unread)
        unread = (step, metrics)
        last = step == num_steps
        save = last or stopping or step % config.checkpoint_every_steps == 0
        if save or is_due(step):
          stopping = log.read(*unread) or stopping
          unread = None
        stop.running = True  # compiled: from here on a signal saves first
        if is_due(step) and evaluate:
          stopping = evaluation(step) or stopping
        if save or stopping:
          watch.phase("save", step=step)
          with log.progress.pause():
            log.flush()
            host_state = vars(parallel.unreplicate(state))
            checkpoint.save(manager, host_state, config, extra=extra)
        else:
          checkpoint.check(manager)
        if stopping and (not last or (evaluate and not evaluated)):
          checkpoint.check(manager, wait=True)
          print(f"stopped by a signal at step {step}, saved", flush=True)
          raise SystemExit(stop.exit_code or 143)
      watch.phase("end", step=num_steps)
      if evaluate and not evaluated:  # killed between the last save and here
        evaluated = evaluate(state)
      state = parallel.unreplicate(state)
    finally:
      log.close()
  return state, dict(
    evaluated or {},
    images_per_second=log.progress.mean_rate,
    seconds=round(time.perf_counter() - begin, 1),
  )


def _agree_on_start(start: int) -> None:
  """All hosts must have restored the same step."""
  expected = parallel.broadcast(start)
  parallel.agree(
    ""
    if start == expected
    else f"process {jax.process_index()} can read the checkpoint of step "
    f"{start}, process 0 that of {expected}; remove the damaged one."
  )


def _is_evaluated(workdir, step: int) -> bool:
  """Whether metrics.jsonl has the evaluation of this step."""
  file = epath.Path(workdir) / "metrics.jsonl"
  found = False
  if file.exists():
    for line in file.read_text().splitlines(keepends=True):
      found |= (
        line.startswith(f'{{"step": {step},')
        and '"eval_' in line
        and line.endswith("\n")
      )
  return bool(parallel.broadcast(found))  # process 0 rewrites the file now


def _with_stop(step_fn):
  """Adds the stop flag to the metrics, so that all hosts leave at one step."""

  def step(state, batch, key, stop, *constants):
    state, metrics = step_fn(state, batch, key, *constants)
    if "replaced" in batch:  # damaged images that another one stands for
      metrics["replaced"] = jax.lax.psum(batch["replaced"].sum(), parallel.AXIS)
    return state, dict(metrics, stop=jax.lax.pmax(stop, parallel.AXIS))

  return step


class _Log:
  """Reads the metrics of a step, checks them, passes them on (host 0)."""

  def __init__(
    self, workdir, start, num_steps, config, *, learning_rate, anchors
  ):
    self._num_steps, self._every = num_steps, config.log_every_steps
    self._learning_rate, self._anchors = learning_rate, anchors
    self._host0 = jax.process_index() == 0
    self._marker = epath.Path(workdir) / _DIVERGED
    self._writing = functools.partial(checkpoint.writing, workdir)
    self._writer = logs.MetricsWriter(workdir, start) if self._host0 else None
    self.progress = logs.Progress(
      start, num_steps, batch_size=config.batch_size, quiet=not self._host0
    )

  def read(self, step: int, metrics: dict) -> bool:
    """Waits for the step; returns whether any host was asked to stop."""
    values = {k: float(v) for k, v in parallel.unreplicate(metrics).items()}
    stopping = bool(values.pop("stop"))
    if not math.isfinite(values["loss"]):
      if self._host0:  # a scheduler that starts it again must not loop
        found = {"step": step, "loss": str(values["loss"])}
        self._marker.write_text(json.dumps(found) + "\n")
      raise Diverged(
        f"the loss is {values['loss']} at step {step}; checkpoints before it "
        "are intact. Try a lower config.optim.learning_rate, a longer "
        "config.optim.warmup_epochs or a higher config.loss.temperature."
      )
    self.progress.advance(step)
    if step in (1, self._num_steps) or step % self._every == 0:
      rate = self.progress.rate(step)
      if self._learning_rate:
        values["learning_rate"] = float(self._learning_rate(step - 1))
      if self._host0:
        with self._writing():
          self._writer.write(step, values | {"images_per_second": rate})
        self.progress.show(step, values, self._anchors, rate)
    return stopping

  def evaluation(self, step: int, evaluate, state) -> dict:
    with self.progress.pause():
      values = evaluate(state)
    if self._host0:
      with self._writing():
        self._writer.write(step, {f"eval_{k}": v for k, v in values.items()})
      shown = ", ".join(
        f"{k} {v:.4g}" for k, v in values.items() if v is not None
      )
      self.progress.say(f"step {step}/{self._num_steps} evaluation: {shown}")
    return values

  def flush(self) -> None:
    if self._host0:
      with self._writing():
        self._writer.flush()

  def close(self) -> None:
    self.progress.close()
    if self._host0:
      with self._writing():
        self._writer.close()


def write_result(workdir, result: dict) -> dict:
  """Writes result.json (host 0) and returns `result`."""
  if jax.process_index() == 0:
    text = json.dumps(result, indent=2) + "\n"
    with checkpoint.writing(workdir):
      (epath.Path(workdir) / "result.json").write_text(text)
  return result
