"""The loop with a network of one matrix: log, save, resume, stop."""

import contextlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from simclr_jax import checkpoint, logs, loop, parallel, rundir, storage
from simclr_jax.config import Diverged, UserError
from simclr_jax.train_state import TrainState

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
# Where a read or a write fails, Orbax closes its event loop while TensorStore
# still finishes the other files: Python then prints "Event loop is closed".
LATE_FUTURES = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def make_config(**changes):
  return ml_collections.ConfigDict(
    dict(
      seed=3,
      batch_size=16,
      num_epochs=1.0,
      num_steps=0,
      log_every_steps=2,
      eval_every_steps=5,
      checkpoint_every_steps=4,
      keep_checkpoints=2,
      profile_steps=(0, 0),
      optim=dict(learning_rate=0.1),
    )
    | changes
  )


def make_state():
  params = {"encoder": {"kernel": np.ones((4, 2), np.float32)}}
  return TrainState(
    step=np.asarray(0, np.int32),
    params=params,
    batch_stats={"encoder": {"mean": np.zeros(2, np.float32)}},
    opt_state=jax.tree.map(np.asarray, OPTIMIZER.init(params)),
  )


def step_fn(state, batch, key):
  key = jax.random.fold_in(key, state.step)
  noise = jax.random.normal(key, (2,))

  def loss_fn(params):
    out = batch["x"] @ params["encoder"]["kernel"] + noise
    return jnp.mean(jnp.square(out))

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  loss, grads = jax.lax.pmean((loss, grads), parallel.AXIS)
  mean = state.batch_stats["encoder"]["mean"] * 0.9 + noise
  state, norms = state.apply_gradients(
    OPTIMIZER, grads, {"encoder": {"mean": mean}}
  )
  return state, {"loss": loss} | norms


def batches(start):
  for step in range(start, 1000):
    rng = np.random.default_rng((7, step))
    yield {"x": rng.normal(size=(16, 4)).astype(np.float32)}


def evaluate(state):
  kernel = parallel.unreplicate(state).params["encoder"]["kernel"]
  return {"top1": float(np.abs(kernel).sum())}


def train(workdir, num_steps=14, **changes):
  options = dict(
    step_fn=step_fn,
    batches=batches,
    config=make_config(),
    workdir=workdir,
    num_steps=num_steps,
    evaluate=evaluate,
  )
  return loop.run(make_state(), **(options | changes))


def raw_lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def lines(workdir):
  """metrics.jsonl without the fields that are about time."""
  return [
    {k: v for k, v in row.items() if k not in logs.TIMING}
    for row in raw_lines(workdir)
  ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  state, metrics = train(workdir)
  return state, metrics, lines(workdir)


def assert_same_state(a, b):
  jax.tree.map(np.testing.assert_array_equal, vars(a), vars(b))


def test_lines_are_at_the_steps_of_the_config(whole):
  steps = [(row["step"], "eval_top1" in row) for row in whole[2]]
  assert steps == [
    (1, False),
    (2, False),
    (4, False),
    (5, True),
    (6, False),
    (8, False),
    (10, False),
    (10, True),
    (12, False),
    (14, False),
    (14, True),
  ]


def test_another_seed_is_another_run(whole, tmp_path):
  """The batches here are the same: the key is what differs."""
  state, _ = train(tmp_path, config=make_config(seed=4))
  noise = [s.batch_stats["encoder"]["mean"] for s in (state, whole[0])]
  assert np.all(noise[0] != noise[1])


def test_lines_are_handed_over_before_each_save(tmp_path, monkeypatch):
  """A remote metrics.jsonl has no line before that."""
  calls = []

  def noted(name, fn):
    return lambda *args, **options: calls.append(name) or fn(*args, **options)

  for module, name in ((logs.MetricsWriter, "flush"), (checkpoint, "save")):
    monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
  train(tmp_path, 9)
  # At steps 4, 8 and 9, then once more at the end.
  assert calls == ["flush", "save"] * 3 + ["flush"]


def test_replaced_images_are_counted_on_all_devices(tmp_path):
  def marked(start):
    for batch in batches(start):
      yield batch | {"replaced": np.arange(16) % 3 == 0}

  train(tmp_path, 2, batches=marked)
  counts = [row["replaced"] for row in lines(tmp_path) if "replaced" in row]
  assert counts == [6, 6]


class Killed(BaseException):
  """Ends a run without any clean-up of its own."""


# At each of these places: before the first save, between two, and after one.
@pytest.mark.parametrize("at", [2, 6, 9, 13])
def test_a_killed_run_ends_as_if_it_had_not_been(whole, tmp_path, at):
  def killed_batches(start):
    for step, batch in enumerate(batches(start), start):
      if step == at:
        raise Killed
      yield batch

  with pytest.raises(Killed):
    train(tmp_path, batches=killed_batches)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 1')  # torn
  state, metrics = train(tmp_path)
  assert_same_state(state, whole[0])
  assert lines(tmp_path) == whole[2]
  assert metrics["top1"] == whole[1]["top1"]


def test_a_complete_run_is_only_evaluated_again(whole, tmp_path):
  train(tmp_path)
  before = (tmp_path / "metrics.jsonl").read_text()

  def no_batches(start):
    raise AssertionError("no step is left")
    yield

  state, metrics = train(tmp_path, batches=no_batches)
  assert_same_state(state, whole[0])
  assert metrics["top1"] == whole[1]["top1"]
  assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("number, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_leaves(whole, tmp_path, number, code, capsys):
  def signalled(start):
    for step, batch in enumerate(batches(start), start):
      if step == 6:
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(0.3)  # the thread that waits for it gets its turn
      yield batch

  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stop:
    config = make_config(checkpoint_every_steps=1000)
    train(tmp_path, batches=signalled, config=config)
  assert stop.value.code == code
  assert signal.getsignal(signal.SIGTERM) is before
  (saved,) = (tmp_path / "checkpoints").iterdir()
  assert 6 <= int(saved.name) <= 9
  assert f"at step {saved.name}, saved" in capsys.readouterr().out
  state, _ = train(tmp_path)
  assert_same_state(state, whole[0])
  assert lines(tmp_path) == whole[2]


@LATE_FUTURES
# Orbax leaves a coroutine of the failed reading behind, of a closed loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
  whole, tmp_path, caplog, damage
):
  train(tmp_path)
  newest = tmp_path / "checkpoints" / "14"
  victims = [f for f in newest.rglob("*") if f.is_file() and "/d/" in str(f)]
  assert victims
  for file in victims:
    if damage == "truncated":
      file.write_bytes(file.read_bytes()[:10])
    else:
      file.unlink()
  state, _ = train(tmp_path)
  assert "checkpoints/14 is damaged" in caplog.text
  assert_same_state(state, whole[0])
  assert lines(tmp_path) == whole[2]


def test_a_loss_that_is_not_finite_ends_the_run(whole, tmp_path):
  def poisoned(start):
    for step, batch in enumerate(batches(start), start):
      yield {"x": batch["x"] * np.float32(np.nan if step == 9 else 1)}

  rundir.claim(make_config(), tmp_path)
  with pytest.raises(Diverged, match=r"step 10 the loss is nan.*learning_rate"):
    train(tmp_path, batches=poisoned)
  with checkpoint.open_manager(tmp_path, keep=2) as manager:
    assert manager.latest_step() == 8
  # A scheduler that starts the same command again does not loop.
  for _ in range(2):
    with pytest.raises(
      UserError, match=r"step 10 the loss is nan.*remove .*json"
    ):
      rundir.claim(make_config(), tmp_path)
  (tmp_path / "diverged.json").unlink()
  rundir.claim(make_config(), tmp_path)
  assert_same_state(train(tmp_path)[0], whole[0])


@pytest.mark.parametrize("number, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_an_evaluation(whole, tmp_path, number, code):
  """Nobody waits for its end; it is done over after the restart."""

  def endless(state):
    if int(parallel.unreplicate(state).step) == 5:
      return evaluate(state)
    os.kill(os.getpid(), getattr(signal, number))
    time.sleep(60)
    raise AssertionError("went on")

  start = time.monotonic()
  with pytest.raises(SystemExit) as stop:
    train(tmp_path, evaluate=endless)
  assert stop.value.code == code
  assert time.monotonic() - start < 30
  assert "10" in {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert lines(tmp_path)[-1]["step"] == 10
  assert "eval_top1" not in lines(tmp_path)[-1]
  state, _ = train(tmp_path)
  assert_same_state(state, whole[0])
  assert lines(tmp_path) == whole[2]


def test_a_signal_during_the_last_evaluation(whole, tmp_path):
  def endless(state):
    if int(parallel.unreplicate(state).step) < 14:
      return evaluate(state)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

  with pytest.raises(SystemExit):
    train(tmp_path, evaluate=endless)
  state, metrics = train(tmp_path)
  assert_same_state(state, whole[0])
  assert (lines(tmp_path), metrics["top1"]) == (whole[2], whole[1]["top1"])


def test_a_signal_during_a_save(whole, tmp_path, monkeypatch):
  """The save under way completes, and a later one follows it."""
  save = checkpoint.save

  def signalled(manager, state, config, *, extra):
    save(manager, state, config, extra=extra)
    if state["step"] == 4:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.3)

  monkeypatch.setattr(checkpoint, "save", signalled)
  with pytest.raises(SystemExit) as stop:
    train(tmp_path)
  assert stop.value.code == 143
  monkeypatch.undo()
  names = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
  assert 4 in names
  assert 4 < max(names) <= 7
  assert_same_state(train(tmp_path)[0], whole[0])
  assert lines(tmp_path) == whole[2]


SECOND_SIGNAL = """
import os, pathlib, signal, sys, time
import test_loop

def stuck(start):
  for step, batch in enumerate(test_loop.batches(start), start):
    if step == 6:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1)
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(60)
    yield batch

test_loop.train(pathlib.Path(sys.argv[1]), batches=stuck)
"""


def test_a_second_signal_ends_at_once(whole, tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", SECOND_SIGNAL, tmp_path],
    cwd=pathlib.Path(__file__).parent,
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
    capture_output=True,
    text=True,
    timeout=50,
  )
  assert done.returncode == 130, done.stderr
  assert "nothing saved now" in done.stderr
  assert_same_state(train(tmp_path)[0], whole[0])


@LATE_FUTURES
@pytest.mark.parametrize("quiet", [True, False], ids=["save", "metrics"])
def test_a_full_disk(whole, tmp_path, quiet, caplog, capfd):
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def full(start):
    for step, batch in enumerate(batches(start), start):
      if step == 7:  # the file system refuses to let a file grow
        time.sleep(0.5)  # the save of step 4 is complete
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
      yield batch

  changes = {"log_every_steps": 100} if quiet else {}
  config = make_config(**changes)
  try:
    with pytest.raises(UserError, match=r"cannot be written: File too large"):
      train(tmp_path, batches=full, config=config)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  assert "Traceback" not in caplog.text + capfd.readouterr().err
  assert checkpoint.load_described(tmp_path)[2]["step"] == 4
  assert_same_state(train(tmp_path)[0], whole[0])


@pytest.mark.parametrize(
  "damaged", [b"null", b"3", b"[1]", b"{}", b'{"step": "1"}', b"\xff\xfe"]
)
def test_damaged_lines_end_what_is_kept(damaged, tmp_path):
  file = tmp_path / "metrics.jsonl"
  good = b'{"step": 1, "loss": 2.0}\n{"step": 2, "eval_top1": 0.5}\n'
  file.write_bytes(good + damaged + b"\n" + good)
  assert "".join(logs._lines_until(file, 5)) == good.decode()
  assert loop._is_evaluated(tmp_path, 2) and not loop._is_evaluated(tmp_path, 1)


def test_an_intact_checkpoint_is_named_where_there_is_one(tmp_path):
  def message():
    with pytest.raises(UserError) as error, storage.writing(tmp_path):
      raise OSError(28, "No space left on device")
    return str(error.value)

  assert "checkpoint there is" not in message()
  assert "on device. Make room" in message()
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  assert "The last complete checkpoint there is intact; make room" in message()


def test_a_lost_directory(tmp_path):
  def lost(start):
    for step, batch in enumerate(batches(start), start):
      if step == 7:
        time.sleep(0.5)  # the save of step 4 is complete
        (tmp_path / "run").rename(tmp_path / "elsewhere")
      yield batch

  with pytest.raises(UserError, match="cannot be written: the directory is"):
    train(tmp_path / "run", batches=lost)
  assert checkpoint.load_described(tmp_path / "elsewhere")[2]["step"] == 4


@pytest.mark.parametrize("place", ["data", "evaluation"])
def test_a_stall_is_reported_with_its_phase(tmp_path, place, capfd):
  def slow_batches(start):
    for step, batch in enumerate(batches(start), start):
      time.sleep(0.6 if (place, step) == ("data", 3) else 0)
      yield batch

  def slow_evaluate(state):
    time.sleep(0.6 if place == "evaluation" else 0)
    return evaluate(state)

  train(
    tmp_path,
    6,
    batches=slow_batches,
    evaluate=slow_evaluate,
    stall_minutes=0.3 / 60,
  )
  said = capfd.readouterr().err
  assert f"in phase {place} of step" in said
  assert "in slow_" in said  # a line of the stack
  assert said.count(f"in phase {place}") <= 2


def test_only_the_latest_checkpoints_are_kept(tmp_path):
  train(tmp_path)
  names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert names == {"12", "14"}


def test_a_workdir_belongs_to_one_config(tmp_path, capsys):
  rundir.claim(make_config(), tmp_path)
  rundir.claim(make_config(log_every_steps=9), tmp_path)
  assert capsys.readouterr().out == ""
  rundir.claim(make_config(num_steps=50), tmp_path)
  assert "warning: num_steps changed" in capsys.readouterr().out
  with pytest.raises(
    UserError, match=r"another run: .*config.seed was 3, is 4"
  ):
    rundir.claim(make_config(seed=4), tmp_path)


def test_a_workdir_that_cannot_be_written(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(UserError, match="cannot be written: "):
    rundir.claim(make_config(), file / "run")


def test_finished(tmp_path):
  assert rundir.finished(tmp_path, 5) is None
  result = {"num_steps": 5, "protocol": "knn", "top1": 0.5, "top5": 0.9}
  rundir.write_result(tmp_path, result)
  assert rundir.finished(tmp_path, 5)["top1"] == 0.5
  assert rundir.finished(tmp_path, 6) is None


def test_the_rate_counts_no_evaluation(monkeypatch):
  """Nor one that was made up for before the first step."""
  clock = iter([0, 100, 110, 110, 140, 150])
  monkeypatch.setattr(logs.time, "perf_counter", lambda: next(clock))
  progress = logs.Progress(4, 9, batch_size=6, quiet=True)
  with progress.pause():  # 0 to 100: owed from before the restart
    pass
  progress.advance(5)  # at 110, compiled
  with contextlib.suppress(KeyboardInterrupt), progress.pause():
    raise KeyboardInterrupt  # 110 to 140
  progress.advance(6)
  assert progress.timing(6)["images_per_second"] == 0.6  # 6 images in 10 s
