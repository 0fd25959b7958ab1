"""What training changes, and how large it and its changes are."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
  """What training changes; everything else is a pure function of `step`."""

  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: tuple

  def apply_gradients(
    self, optimizer, grads, batch_stats
  ) -> tuple["TrainState", dict[str, jax.Array]]:
    """One update of an optax `optimizer`.

    Returns:
      The state after it, and the Euclidean norm of each tensor's gradient,
      update and new value: {"grad_norms", "update_norms", "param_norms"}, each
      [tensors] in the order of `tensor_names`.
    """
    updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
    params = optax.apply_updates(self.params, updates)
    state = self.replace(
      step=self.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
    )
    trees = {"grad": grads, "update": updates, "param": params}
    return state, {f"{k}_norms": norms(tree) for k, tree in trees.items()}


@jax.jit  # traced once a shape; a network has hundreds of tensors
def _square(x) -> jax.Array:
  if x.ndim == 1:  # one instruction, where a sum of squares is four on CPUs
    return jnp.dot(x, x, precision="highest")
  return jnp.sum(x * x)


def norms(tree) -> jax.Array:
  """Euclidean norms of a tree's tensors, [tensors] in the order of its leaves.

  >>> print(norms({"bias": jnp.ones(4), "kernel": jnp.ones((3, 3))}))
  [2. 3.]
  """
  return jnp.sqrt(jnp.stack([_square(x) for x in jax.tree.leaves(tree)]))


def tensor_names(params: Any) -> list[str]:
  """ "encoder/stem/conv_1/kernel", ... in the order of the tree's leaves."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves
  ]


def group_of(name: str) -> str:
  """The part of the network that a tensor of this name belongs to.

  >>> group_of("encoder/block_group1/block_0/conv_1/kernel")
  'block_group1'
  >>> group_of("projection_head/dense_1/kernel")
  'projection_head'
  """
  top, *rest = name.split("/")
  return rest[0] if top == "encoder" and len(rest) > 1 else top
