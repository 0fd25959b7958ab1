"""Placement on devices: 8 fake ones here (conftest.py); finding other hosts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import parallel
from simclr_jax.config import UserError


def test_rows_keep_their_place_in_the_global_batch():
  rows = np.arange(24).reshape(24, 1)
  step = parallel.pmap(
    lambda x: (
      parallel.global_index(x.shape[0]),
      jax.lax.all_gather(x, parallel.AXIS, tiled=True),
    )
  )
  index, gathered = step(parallel.shard(rows))
  assert index.shape == (8, 3)
  np.testing.assert_array_equal(np.ravel(index), np.arange(24))
  np.testing.assert_array_equal(parallel.unreplicate(gathered), rows)


def test_replicate_and_unreplicate_are_inverse():
  tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.int32(3)}
  copies = parallel.replicate(tree)
  assert copies["a"].shape == (8, 2, 3)
  back = parallel.unreplicate(copies)
  assert back["b"].dtype == np.int32
  np.testing.assert_array_equal(back["a"], tree["a"])
  key = parallel.replicate(jax.random.key(1))
  assert key.shape == (8,)


def test_prefetch_keeps_order_and_reads_two_ahead():
  taken = []

  def batches():
    for i in range(5):
      taken.append(i)
      yield {"x": np.full((8, 1), i)}

  stream = parallel.prefetch(batches(), size=2)
  first = next(stream)
  assert taken == [0, 1]
  seen = [first, *stream]
  assert [int(b["x"][0, 0, 0]) for b in seen] == [0, 1, 2, 3, 4]


def test_a_second_step_compiles_nothing():
  traces = []

  def step(state, batch, key):
    traces.append(1)
    noise = jax.random.uniform(jax.random.fold_in(key, state["step"]), (2,))
    loss = jax.lax.pmean(jnp.sum(batch) + noise.sum(), parallel.AXIS)
    return {"step": state["step"] + 1, "w": state["w"] - loss}

  mapped = parallel.pmap(step, donate_argnums=0)
  state = parallel.replicate({"step": np.int32(0), "w": np.zeros(2)})
  key = parallel.replicate(jax.random.key(0))
  for _ in range(3):
    state = mapped(state, parallel.shard(np.ones((16, 2))), key)
  assert len(traces) == 1
  assert int(parallel.unreplicate(state)["step"]) == 3


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
  monkeypatch.setattr(parallel, "_announce_death", lambda: None)
  updates = []
  monkeypatch.setattr(jax.config, "update", lambda *args: updates.append(args))
  found = parallel.initialize(environ, start=lambda **kw: called.append(kw))
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
  find_spec = parallel.importlib.util.find_spec
  monkeypatch.setattr(
    parallel.importlib.util,
    "find_spec",
    lambda name: None if name in ("mpi4py", "kubernetes") else find_spec(name),
  )
  with pytest.raises(UserError, match=message):
    parallel.initialize(environ, start=None)
