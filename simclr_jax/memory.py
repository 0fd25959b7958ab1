"""The paper's memory: negatives of earlier batches (2006.10029, section 2).

SimCLRv2 adds MoCo's queue (1911.05722) to the negatives of the batch. A second
network, whose weights are a moving average of the trained ones, embeds the
first view of each image; the embeddings of the last `size` images are further
negatives of both views. Both are kept beside the optimizer's state, so that
checkpoints have them and nothing else needs to know.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from simclr_jax import parallel


class Memory(NamedTuple):
  """What the memory adds to a state, equal on all devices."""

  params: Any  # the moving average of the network's
  queue: Any  # [size, D]; a row of zeros is a place not filled yet


def remember(state, *, size: int, dim: int, dtype=np.float32):
  """Returns `state` with an empty memory: opt_state becomes a pair.

  Args:
    state: a `TrainState` as numpy.
    size: how many embeddings are kept; a multiple of the batch size.
    dim: D, of an embedding.
    dtype: of an embedding.
  """
  queue = np.zeros((size, dim), dtype)
  return state.replace(opt_state=(state.opt_state, Memory(state.params, queue)))


def train_step(
  state, batch, key, *, step_fn, model, views_fn, nt_xent_fn, momentum
):
  """A step of `step_fn` with the memory's negatives, then one of the memory.

  Args:
    state: from `remember`.
    batch: as for `step_fn`.
    key: the run's key.
    step_fn: `pretrain.train_step`, its other arguments bound.
    model: its network.
    views_fn: as for `step_fn`.
    nt_xent_fn: `losses.nt_xent`, its options bound but for `negatives`.
    momentum: m of average = m * average + (1 - m) * parameters, in [0, 1).

  Returns:
    The next state, and the metrics of `step_fn`.
  """
  opt_state, memory = state.opt_state
  n = batch["image"].shape[0]
  views = views_fn(
    jax.random.fold_in(key, state.step),
    batch["image"],
    index=parallel.global_index(n),
    sizes=batch["size"],
  )
  stepped, metrics = step_fn(
    state.replace(opt_state=opt_state),
    batch,
    key,
    model=model,
    views_fn=lambda *_, **__: views,
    nt_xent_fn=functools.partial(nt_xent_fn, negatives=memory.queue),
  )
  params = jax.tree.map(
    lambda average, new: momentum * average + (1 - momentum) * new,
    memory.params,
    stepped.params,
  )
  outputs, _ = model.apply(
    {"params": params, "batch_stats": state.batch_stats},
    views[:n],
    train=True,
    mutable=["batch_stats"],  # of the batch, as in MoCo; not kept
  )
  # In the order of the global batch, which is that of the devices.
  z = jax.lax.all_gather(outputs["z"], parallel.AXIS, tiled=True)
  place = state.step % (len(memory.queue) // len(z)) * len(z)
  queue = jax.lax.dynamic_update_slice_in_dim(memory.queue, z, place, axis=0)
  return stepped.replace(
    opt_state=(stepped.opt_state, Memory(params, queue))
  ), metrics
