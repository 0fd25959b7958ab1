"""Finding the other processes; two and four real ones, two devices each.

This file is also the program that they run: `python test_hosts.py '{...}'`.
"""

import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import test_folder
import test_loop
import test_rundir
import test_steps

from simclr_jax import (
  build,
  checkpoint,
  cli,
  data,
  hosts,
  loop,
  parallel,
  pretrain,
  probes,
  rundir,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError

BATCH = 16


def images(start):
  """Like the data module: this host's rows of global batch t."""
  n = BATCH // jax.process_count()
  rows = slice(jax.process_index() * n, (jax.process_index() + 1) * n)
  for step in range(start, 1000):
    batch = test_steps.make_batch()
    order = np.random.default_rng((3, step)).permutation(BATCH)
    yield {name: x[order][rows] for name, x in batch.items()}


def vectors(start, *, sleep=0.0):
  n = BATCH // jax.process_count()
  rows = slice(jax.process_index() * n, (jax.process_index() + 1) * n)
  for batch in test_loop.batches(start):
    time.sleep(sleep)
    yield {"x": batch["x"][rows]}


def train_tiny(workdir, num_steps):
  """The project's pretraining step on a tiny encoder, in float64."""
  state = jax.tree.map(
    np.asarray, test_steps.initial(test_steps.network(head_layer=0))
  )
  state = state.replace(step=np.asarray(0, np.int32))
  config = test_loop.make_config(checkpoint_every_steps=2)
  rundir.claim(config, workdir)
  return loop.run(
    state,
    test_steps.pretrain_step(),
    images,
    config=config,
    workdir=workdir,
    num_steps=num_steps,
  )[0]


def train_toy(workdir, num_steps, *, sleep=0.0):
  config = test_loop.make_config(eval_every_steps=1000)
  rundir.claim(config, workdir)
  batches = functools.partial(vectors, sleep=sleep)
  return test_loop.train(workdir, num_steps, batches=batches, config=config)[0]


def score_damaged(workdir):
  """Prints which labels kNN and two classifiers are scored with, as JSON."""
  seen, knn, top_k = {}, probes.knn, probes.top_k

  def spy_knn(x, y, test_x, test_y, **options):
    seen.update(bank=y.tolist(), knn=test_y.tolist())
    return knn(x, y, test_x, test_y, **options)

  def spy_top_k(logits, labels, **options):
    seen["logits"] = np.asarray(labels).tolist()
    return top_k(logits, labels, **options)

  probes.knn, probes.top_k = spy_knn, spy_top_k
  config = cli.load_recipe("digits", stage="pretrain")
  for name, value in {
    "batch_size": BATCH,
    "data.name": f"folder:{pathlib.Path(workdir).parent / 'images'}",
    "data.canvas_size": 8,
    "data.image_size": 8,
    "data.memory_gib": 1e-9,
    "data.on_error": "skip",
    "model.dtype": "float64",
  }.items():
    config_lib.set_field(config, name, value)
  model = test_steps.network(head_layer=0, probe=True)
  state = parallel.replicate(test_steps.initial(model))
  for name in ("probe", "classifier"):
    train, test = data.open_splits(config, workdir)
    evaluate = (
      pretrain._make_evaluate(config, model, train, test)
      if name == "probe"
      else build.make_evaluate(config, model, test)
    )
    evaluate(state)
    seen[name] = seen.pop("logits")
  print(f"labels {json.dumps(seen)}", flush=True)


def main(options):
  rundir._check_shared.__kwdefaults__["seconds"] = 1
  jax.config.update("jax_enable_x64", True)
  hosts.initialize(heartbeat_seconds=10)
  with hosts.together():
    kinds = {"tiny": train_tiny, "toy": train_toy, "damaged": score_damaged}
    kinds[options.pop("kind")](**options)


class Processes:
  """Starts `count` of them; `end` waits and returns (exit codes, outputs)."""

  def __init__(self, tmp_path, count=2, workdirs=None, **options):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self.outputs = [tmp_path / f"output{i}" for i in range(count)]
    self.all = []
    for i, output in enumerate(self.outputs):
      if workdirs:
        options["workdir"] = str(workdirs[i])
      env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(i),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
      }
      with output.open("w") as file:
        self.all.append(
          subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            env=env,
            stdout=file,
            stderr=file,
          )
        )

  def until_step(self, workdir, step):
    """Waits until metrics.jsonl has it."""
    file, end = workdir / "metrics.jsonl", time.monotonic() + 120
    while not (file.exists() and f'"step": {step},' in file.read_text()):
      alive = all(p.poll() is None for p in self.all)
      assert alive, "\n".join(o.read_text()[-3000:] for o in self.outputs)
      assert time.monotonic() < end
      time.sleep(0.05)

  def end(self, timeout=120):
    try:
      codes = [p.wait(timeout) for p in self.all]
    finally:
      for process in self.all:
        process.kill()
        process.wait()
    return codes, [output.read_text() for output in self.outputs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  with jax.enable_x64(True):
    train_tiny(workdir, 4)
  return workdir


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_continue_what_one_began(whole, tmp_path, count):
  """Steps 3 and 4 on other devices of several processes: the same state."""
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  shutil.rmtree(workdir / "checkpoints" / "4")
  codes, outputs = Processes(
    tmp_path, count, kind="tiny", workdir=str(workdir), num_steps=4
  ).end()
  assert codes == [0] * count, outputs
  assert all("continuing from step 2" in output for output in outputs)
  before, expected, state = (
    saved_state(d, step) for d, step in ((whole, 2), (whole, 4), (workdir, 4))
  )
  assert test_steps.difference(before, expected) > 1e-3
  assert test_steps.difference(expected, state) < 1e-9
  steps = [row["step"] for row in test_loop.lines(workdir)]
  assert steps == [1, 2, 4]


def saved_state(workdir, step):
  with checkpoint.open_manager(workdir, keep=2) as manager:
    return checkpoint._read(manager, step)[0]


def test_damaged_images_count_alike_on_all_hosts(tmp_path):
  """Each host reads half of them, and all score with the labels of both."""
  files = {
    f"{split}/{'ab'[i // 8]}/{i:02}.png": b"damaged" if i in bad else 9 * i
    for split, bad in (("train", (6, 11)), ("test", (4, 12)))
    for i in range(16)
  }
  test_folder.write_tree(tmp_path / "images", files)
  expected = np.repeat([0, 1], 8)
  expected[[4, 12]] = -1
  # From memory every host has read every image.
  bank = data.load(
    test_folder.open_tree(tmp_path / "images"), canvas_size=8, on_error="skip"
  ).labels
  changed = np.flatnonzero(bank != np.repeat([0, 1], 8))
  assert {*changed // 8} == {0, 1}, "other replacements are needed"
  codes, outputs = Processes(
    tmp_path, kind="damaged", workdir=str(tmp_path / "run")
  ).end()
  assert codes == [0, 0], outputs
  for output in outputs:
    (line,) = (x for x in output.splitlines() if x.startswith("labels "))
    assert json.loads(line.removeprefix("labels ")) == {
      "bank": bank.tolist(),
      "knn": expected.tolist(),
      "probe": expected.tolist(),
      "classifier": expected.tolist(),
    }


@pytest.mark.parametrize("begun", [False, True])
def test_a_workdir_that_is_not_shared(begun, tmp_path):
  """Also where one host alone sees a run, and asks it what it began with."""
  workdirs = [tmp_path / "a", tmp_path / "b"]
  if begun:
    test_rundir.save(workdirs[0], test_loop.make_config(), step=2)
  codes, outputs = Processes(
    tmp_path, workdirs=workdirs, kind="toy", num_steps=4
  ).end()
  assert codes == [2, 2], outputs
  assert "error: the workdir is not shared: process 1" in outputs[1]
  assert "error: see process 1" in outputs[0]


def test_sigterm_to_one_stops_both(tmp_path):
  workdir = tmp_path / "run"
  processes = Processes(
    tmp_path, kind="toy", workdir=str(workdir), num_steps=1000, sleep=0.05
  )
  processes.until_step(workdir, 6)
  processes.all[1].send_signal(signal.SIGTERM)
  codes, outputs = processes.end()
  assert codes == [143, 143], outputs
  (said,) = {output.splitlines()[-1] for output in outputs}
  step = int(said.split("at step ")[1].split(",")[0])
  assert f"{step}, saved" in said
  with checkpoint.open_manager(workdir, keep=2) as manager:
    assert manager.latest_step() == step


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_brings_the_other_down(tmp_path, victim):
  workdir = tmp_path / "run"
  processes = Processes(
    tmp_path, kind="toy", workdir=str(workdir), num_steps=1000, sleep=0.05
  )
  processes.until_step(workdir, 6)
  processes.all[victim].kill()
  start = time.monotonic()
  codes, outputs = processes.end(timeout=60)
  assert time.monotonic() - start < 30
  assert codes[1 - victim] not in (0, 143), outputs
  lines = outputs[1 - victim].splitlines()
  (said,) = (line for line in lines if line.startswith("error: "))
  assert "process has died" in said or "process of the run died" in said
  assert "Start the same command everywhere" in said
  with checkpoint.open_manager(workdir, keep=2) as manager:
    assert manager.latest_step() >= 4


# -- clusters -----------------------------------------------------------------

EXPLICIT = {
  "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}
KUBERNETES = {
  "KUBERNETES_SERVICE_HOST": "10.0.0.1",
  "JOB_COMPLETION_INDEX": "0",
}


@pytest.mark.parametrize(
  "environ, options",
  [
    ({}, None),
    (EXPLICIT | {"JAX_NUM_PROCESSES": "1"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # sbatch, not srun
    (SLURM | {"SLURM_NTASKS": "1"}, None),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    (KUBERNETES | {"JAX_NUM_PROCESSES": "1"}, None),
    (SLURM, {}),
    ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a"}, {}),
    (
      EXPLICIT | SLURM,
      {
        "coordinator_address": "10.0.0.1:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
      },
    ),
  ],
)
def test_clusters_are_found_and_only_they(environ, options, monkeypatch):
  called = []
  monkeypatch.setattr(hosts, "_announce_death", lambda: None)
  updates = []
  monkeypatch.setattr(jax.config, "update", lambda *args: updates.append(args))
  found = hosts.initialize(environ, start=lambda **kw: called.append(kw))
  assert found is (options is not None)
  limits = {
    "initialization_timeout": 300,
    "heartbeat_timeout_seconds": 100,
  }
  assert called == ([] if options is None else [limits | options])
  assert bool(updates) is found


@pytest.mark.parametrize(
  "environ, message",
  [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
    (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "from 0 to JAX_NUM_PROCESSES - 1"),
    (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "they are '3', 'two'"),
    (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "host"}, "host:port"),
    ({"PMI_SIZE": "2"}, "MPI launcher .* package mpi4py"),
    (KUBERNETES, "Kubernetes Job, .* package kubernetes"),
  ],
)
def test_a_cluster_that_cannot_be_joined(environ, message, monkeypatch):
  find_spec = hosts.importlib.util.find_spec
  monkeypatch.setattr(
    hosts.importlib.util,
    "find_spec",
    lambda name: None if name in ("mpi4py", "kubernetes") else find_spec(name),
  )
  with pytest.raises(UserError, match=message):
    hosts.initialize(environ, start=None)


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
