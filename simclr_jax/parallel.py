"""Devices and hosts: the one file that names pmap.

A mapped step sees its own n = N / D examples and the axis name `AXIS`. State
and batches carry a leading axis of this host's devices; every array is placed
with the sharding that pmap itself returns, so that nothing is moved or compiled
twice.
"""

import collections
import glob
import itertools
import os
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"


def initialize() -> None:
  """Joins the other processes where a cluster is found; else does nothing.

  jax.distributed detects SLURM, TPU pods, Kubernetes and MPI by itself; other
  launchers set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """
  count = int(os.environ.get("JAX_NUM_PROCESSES", "0"))
  if count > 1:
    jax.distributed.initialize(
      os.environ["JAX_COORDINATOR_ADDRESS"],
      num_processes=count,
      process_id=int(os.environ["JAX_PROCESS_ID"]),
    )


def unused_accelerator() -> str:
  """Says so where the machine has an accelerator that JAX does not use."""
  if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
    return ""
  if os.path.exists("/proc/driver/nvidia/version"):
    found, extra = "an NVIDIA GPU", "cuda13"
  elif glob.glob("/dev/accel*"):
    found, extra = "a TPU", "tpu"
  else:
    return ""
  return (
    f"this machine has {found}, but JAX runs on the CPU; install the extra: "
    f'pip install "simclr_jax[{extra}]"'
  )


def pmap(fn, *, donate_argnums=()):
  """Maps `fn` over all devices of all hosts; every argument is sharded."""
  return jax.pmap(fn, axis_name=AXIS, donate_argnums=donate_argnums)


def _sharding() -> NamedSharding:
  mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(tree):
  """Copies a tree to each local device: leaves become [devices, ...]."""
  devices = jax.local_device_count()

  def copy(x):
    if not isinstance(x, jax.Array):
      x = np.asarray(x)
      x = np.broadcast_to(x, (devices, *x.shape))
    else:  # typed keys stay on the device
      x = jnp.broadcast_to(x, (devices, *x.shape))
    return jax.device_put(x, _sharding())

  return jax.tree.map(copy, tree)


def unreplicate(tree):
  """Returns one device's copy as numpy. Waits for it to be computed.

  `x[0]` would run a slicing program on every leaf; the first shard is there.
  """
  return jax.tree.map(
    lambda x: np.asarray(x.addressable_shards[0].data)[0], tree
  )


def shard(batch):
  """Puts a host's batch on its devices: [n * d, ...] becomes [d, n, ...]."""
  devices = jax.local_device_count()

  def put(x):
    x = np.asarray(x)
    return jax.device_put(
      x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), _sharding()
    )

  return jax.tree.map(put, batch)


def prefetch(batches: Iterable, *, size: int = 2) -> Iterator:
  """Shards `size` batches ahead; copies to the device are asynchronous."""
  queue = collections.deque()
  batches = iter(batches)
  for batch in itertools.islice(batches, size):
    queue.append(shard(batch))
  while queue:
    yield queue.popleft()
    for batch in itertools.islice(batches, 1):
      queue.append(shard(batch))


def global_index(num_local: int):
  """Inside a mapped function: positions [n] of its rows in the global batch.

  Device d of all hosts' devices holds rows d * n .. (d + 1) * n - 1.
  """
  return jax.lax.axis_index(AXIS) * num_local + jnp.arange(num_local)
