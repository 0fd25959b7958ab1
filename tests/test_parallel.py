"""Placement on devices: 8 fake ones here (conftest.py)."""

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import parallel


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
