"""What devices send each other in a step, read from the compiled program.

docs/scaling.md counts with the same terms. In float64; whatever else a compiler
does, it may join collectives but not add bytes.
"""

import re

import jax
import numpy as np
import pytest
import test_steps

from simclr_jax import parallel

DIM = 8  # of the embeddings of test_steps.network


def collectives(text):
  """[(kind, bytes of its result)] of a compiled program's text."""
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  found = []
  for line in text.splitlines():
    if match := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
      size = 0
      for width, shape in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", match[1]):
        dims = [int(d) for d in shape.split(",") if d]
        size += int(width) // 8 * int(np.prod(dims))
      found.append((match[2], size))
  return found


def step_collectives(step_fn, state, batch):
  mapped = parallel.pmap(step_fn, donate_argnums=0)
  args = (
    parallel.replicate(jax.tree.map(np.asarray, state)),
    parallel.shard(batch),
    parallel.replicate(jax.random.key(0)),
  )
  return collectives(mapped.lower(*args).compile().as_text())


def count(tree):
  return sum(np.size(x) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("times", [1, 4])
def test_a_pretraining_step_sends_what_it_must(times, x64):
  state = test_steps.initial(test_steps.network(head_layer=0))
  batch = {
    name: np.tile(x, (times,) + (1,) * (x.ndim - 1))
    for name, x in test_steps.make_batch().items()
  }
  rows = test_steps.BATCH * times
  found = step_collectives(test_steps.pretrain_step(), state, batch)
  sizes = {kind: [] for kind, _ in found}
  for kind, size in found:
    sizes[kind].append(size)
  assert sizes.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
  # The embeddings of both views, once, and their gradient, back.
  assert sizes["all-gather"] == [8 * 2 * rows * DIM]
  assert sizes["reduce-scatter"] == [8 * 2 * rows * DIM // 8]
  # Gradients once; two moments of each BatchNorm, forward and backward (its
  # moving averages have the same size); the metrics: scalars and two moments
  # of the embeddings.
  least = 8 * (count(state.params) + 2 * count(state.batch_stats))
  assert least <= sum(sizes["all-reduce"]) <= least + 8 * (DIM**2 + DIM + 10)
  # Each BatchNorm twice, the probe's and the step's gradient, its count.
  num_norms = len(jax.tree.leaves(state.batch_stats)) // 2
  assert len(sizes["all-reduce"]) <= 2 * num_norms + 3


def test_local_negatives_would_be_seen(x64):
  state = test_steps.initial(test_steps.network(head_layer=0))
  step_fn = test_steps.pretrain_step(
    nt_xent_fn=test_steps.nt_xent(axis_name=None)
  )
  found = step_collectives(step_fn, state, test_steps.make_batch())
  assert {kind for kind, _ in found} == {"all-reduce"}
