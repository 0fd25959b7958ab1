"""The devices of a run: the one file that names pmap.

A mapped step sees its own n = N / D examples and the axis name `AXIS`. State
and batches carry a leading axis of this host's devices; every array is placed
with the sharding that pmap itself returns, so that nothing is moved or compiled
twice.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"


def pmap(fn, *, donate_argnums=()):
  """Maps `fn` over all devices of all hosts; every argument is sharded.

  >>> sum_fn = pmap(lambda x: jax.lax.psum(x, AXIS))
  >>> int(unreplicate(sum_fn(replicate(1)))) == jax.device_count()
  True
  """
  return jax.pmap(fn, axis_name=AXIS, donate_argnums=donate_argnums)


def pmean(tree):
  """The mean over all devices; XLA would copy that of a single one on CPUs.

  >>> float(unreplicate(pmap(pmean)(replicate(2.0))))
  2.0
  """
  alone = jax.lax.axis_size(AXIS) == 1
  return tree if alone else jax.lax.pmean(tree, AXIS)


@functools.cache
def _sharding() -> NamedSharding:
  mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,))
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(tree):
  """Copies a tree to each local device: leaves become [devices, ...].

  >>> replicate({"w": np.ones(3)})["w"].shape == (jax.local_device_count(), 3)
  True
  """
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

  >>> unreplicate(replicate({"w": np.ones(2, bool)}))
  {'w': array([ True,  True])}
  """
  return jax.tree.map(
    lambda x: np.asarray(x.addressable_shards[0].data)[0], tree
  )


def shard(batch):
  """Puts a host's batch on its devices: [n * d, ...] becomes [d, n, ...].

  >>> shard(np.zeros((16, 5))).shape[0] == jax.local_device_count()
  True
  """
  devices = jax.local_device_count()

  def split(x):
    x = np.asarray(x)
    return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

  return jax.device_put(jax.tree.map(split, batch), _sharding())


def prefetch(batches: Iterable, *, size: int = 2) -> Iterator:
  """Shards `size` batches ahead; copies to the device are asynchronous.

  >>> len(list(prefetch(np.zeros((3, 16, 5)))))
  3
  """
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

  >>> index_fn = pmap(lambda x: x + global_index(2))
  >>> unreplicate(index_fn(replicate(0))).tolist()  # of the first device
  [0, 1]
  """
  return jax.lax.axis_index(AXIS) * num_local + jnp.arange(num_local)
