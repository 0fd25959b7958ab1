"""The training loop that all stages share: log, evaluate, save, resume, stop.

What happens at step t depends on t alone, never on when the run was started:
batch t, the random numbers of step t, the lines of metrics.jsonl and the saves.
"""

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from simclr_jax import (
  checkpoint,
  diagnostics,
  flops,
  hosts,
  logs,
  parallel,
  rundir,
  signals,
  storage,
  watchdog,
)
from simclr_jax.config import Diverged
from simclr_jax.train_state import TrainState, tensor_names


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
  advice: Callable[[int, dict], list[str]] | None = None,
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
    advice: (step, line of metrics.jsonl) -> what to tell the user about it.
    extra: JSON values saved with each checkpoint.
    stall_minutes: after so long in one phase of a step, print where; 0: never.

  Returns:
    The final state (numpy) and a dict with the last evaluation,
    "images_per_second" and "seconds".

  Raises:
    Diverged: the loss or a tensor is no longer finite.
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
    rundir.refuse_shorter(workdir, start, num_steps)

    def is_due(step):
      return step == num_steps or step % config.eval_every_steps == 0

    # A signal during an evaluation saves without it; a kill cannot.
    owed = start > 0 and is_due(start) and not _is_evaluated(workdir, start)
    log = _Log(
      workdir,
      start,
      num_steps,
      config,
      names=tensor_names(state.params),
      learning_rate=learning_rate,
      anchors=anchors or {},
      advice=advice or diagnostics.Advice(),
    )
    trace = _Trace(workdir, config.profile_steps)
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
        with log.progress.waiting():
          batch = next(stream)
        watch.phase("step" if stop.running else "compilation", step=step)
        flag = parallel.replicate(np.int32(stop.requested))
        args = (state, batch, key, flag, *constants)
        if step == start + 1:
          log.set_flops(mapped, args)
        trace.before(step)
        state, metrics = mapped(*args)
        trace.after(step, metrics)
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
      trace.close()
      log.close()
  return state, dict(
    evaluated or {},
    images_per_second=log.progress.mean_rate,
    seconds=round(time.perf_counter() - begin, 1),
  )


def _agree_on_start(start: int) -> None:
  """All hosts must have restored the same step."""
  expected = hosts.broadcast(start)
  hosts.agree(
    ""
    if start == expected
    else f"process {jax.process_index()} can read the checkpoint of step "
    f"{start}, process 0 that of {expected}; remove the damaged one."
  )


def _is_evaluated(workdir, step: int) -> bool:
  """Whether metrics.jsonl has the evaluation of this step."""
  file = epath.Path(workdir) / "metrics.jsonl"
  text = file.read_bytes().decode(errors="replace") if file.exists() else ""
  found = re.search(rf'^{{"step": {step},.*"eval_.*\n', text, re.MULTILINE)
  return bool(hosts.broadcast(bool(found)))  # process 0 rewrites the file now


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
    self,
    workdir,
    start,
    num_steps,
    config,
    *,
    names,
    learning_rate,
    anchors,
    advice,
  ):
    self._num_steps, self._every = num_steps, config.log_every_steps
    self._learning_rate, self._anchors = learning_rate, anchors
    self._names, self._advice = names, advice
    self._batch_size, self._tflop = config.batch_size, None
    self._host0 = jax.process_index() == 0
    self._marker = epath.Path(workdir) / rundir.DIVERGED
    self._writing = functools.partial(storage.writing, workdir)
    self._writer = logs.MetricsWriter(workdir, start) if self._host0 else None
    self.progress = logs.Progress(
      start, num_steps, batch_size=config.batch_size, quiet=not self._host0
    )

  def set_flops(self, mapped, args) -> None:
    """Counts a step's arithmetic, where the device's limit is known."""
    self._peak = diagnostics.peak_tflops(jax.devices()[0].device_kind)
    if self._peak:
      self._tflop = flops.count(mapped, *args) / 1e12

  def _timing(self, step: int) -> dict:
    values = self.progress.timing(step)
    if memory := diagnostics.device_memory_gib():
      values["device_memory_gib"] = memory
    if self._tflop and "images_per_second" in values:
      rate = self._tflop * values["images_per_second"] / self._batch_size
      values["tflops_per_device"] = round(rate, 2)
      values["utilisation"] = round(rate / self._peak, 4)
    return values

  def read(self, step: int, metrics: dict) -> bool:
    """Waits for the step; returns whether any host was asked to stop."""
    values = parallel.unreplicate(metrics)
    stopping = bool(values.pop("stop"))
    if problem := diagnostics.not_finite(values, self._names):
      if self._host0:  # a scheduler that starts it again must not loop
        found = {"step": step, "problem": problem}
        self._marker.write_text(json.dumps(found) + "\n")
      raise Diverged(
        f"at step {step} {problem}; checkpoints before it are intact. Try a "
        "lower config.optim.learning_rate, a longer config.optim.warmup_epochs "
        "or a higher config.loss.temperature."
      )
    self.progress.advance(step)
    if step in (1, self._num_steps) or step % self._every == 0:
      values = diagnostics.summarize(values, self._names)
      if self._learning_rate:
        values["learning_rate"] = float(self._learning_rate(step - 1))
      values |= self._timing(step)
      if self._host0:
        with self._writing():
          self._writer.write(step, values)
        self.progress.show(step, values, self._anchors)
        for text in self._advice(step, values):
          self.progress.say(f"note: {text}.")
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


class _Trace:
  """Writes a jax.profiler trace of some steps to profile/ of the run."""

  def __init__(self, workdir, steps: tuple[int, int]):
    self._folder = epath.Path(workdir) / "profile"
    self._first, self._last = steps  # (0, 0): none
    self._running = False

  def before(self, step: int) -> None:
    if step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, metrics) -> None:
    if step == self._last and self._running:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      print(f"profile of the steps from {self._first} on: {self._folder}")
