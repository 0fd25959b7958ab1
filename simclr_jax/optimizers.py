"""LARS, its alternatives, and the learning rate over a run.

A parameter's kind is read off its path in the tree of parameters: leaves named
"scale" and the "bias" beside one belong to BatchNorm, everything below a
"classifier" is the supervised head: models.py builds {"encoder",
"projection_head", "classifier"}.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simclr_jax.config import UserError
from simclr_jax.train_state import norms, tensor_names

Schedule = Callable[[Any], jax.Array]


def _select(params, keep_fn):
  """Tree of bools: keep_fn(path, all_paths), paths as tuples of names."""
  paths = [tuple(name.split("/")) for name in tensor_names(params)]
  all_paths = frozenset(paths)
  kept = [keep_fn(path, all_paths) for path in paths]
  return jax.tree.structure(params).unflatten(kept)


def is_adapted(params: Any) -> Any:
  """Tree of bools: what LARS decays and adapts.

  All but BatchNorm, biases and the classifier (model_util.get_optimizer).

  >>> is_adapted({"encoder": {"bn": {"scale": 1}, "conv": {"kernel": 1}}})
  {'encoder': {'bn': {'scale': False}, 'conv': {'kernel': True}}}
  """
  return _select(
    params,
    lambda path, _: (
      path[-1] not in ("scale", "bias") and "classifier" not in path
    ),
  )


def is_decayed(params: Any) -> Any:
  """Tree of bools: what the other optimizers decay, all but BatchNorm.

  Biases are decayed where they are not BatchNorm's (add_weight_decay).

  >>> is_decayed({"bn": {"scale": 1, "bias": 1}, "classifier": {"bias": 1}})
  {'bn': {'bias': False, 'scale': False}, 'classifier': {'bias': True}}
  """
  return _select(
    params,
    lambda path, all_paths: (
      path[-1] != "scale"
      and not (path[-1] == "bias" and (*path[:-1], "scale") in all_paths)
    ),
  )


def is_classifier_kernel(params: Any) -> Any:
  """Tree of bools: true for the classifier's kernel alone.

  >>> is_classifier_kernel({"classifier": {"bias": 1, "kernel": 1}})
  {'classifier': {'bias': False, 'kernel': True}}
  """
  return _select(
    params, lambda path, _: path[-1] == "kernel" and "classifier" in path
  )


def lars(
  learning_rate: float | Schedule,
  *,
  weight_decay: float,
  momentum: float = 0.9,
  trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
  """The official LARS (lars_optimizer.py), as an optax transformation.

  g += weight_decay * w; r = trust_coefficient * |w| / |g|, or 1 where a norm is
  0; v = momentum * v + learning_rate * r * g; w -= v. The learning rate is
  inside the momentum. BatchNorm's parameters, biases and the classifier get
  neither the decay nor r.

  Args:
    learning_rate: a number or a schedule, step -> rate.
    weight_decay: per step, before the norms are taken.
    momentum: in [0, 1).
    trust_coefficient: the official code's eeta.

  Returns:
    An optax.GradientTransformation whose update needs the parameters.

  >>> params = {"kernel": jnp.ones(4)}
  >>> tx = lars(0.5, weight_decay=0.0)
  >>> updates, _ = tx.update({"kernel": jnp.ones(4)}, tx.init(params), params)
  >>> print(updates["kernel"].round(6))  # 0.5 * 0.001 * |w| / |g|
  [-0.0005 -0.0005 -0.0005 -0.0005]
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=is_adapted),
    optax.masked(_scale_by_trust_ratio(trust_coefficient), is_adapted),
    optax.scale_by_learning_rate(learning_rate),
    optax.trace(decay=momentum),
  )


def _scale_by_trust_ratio(
  trust_coefficient: float,
) -> optax.GradientTransformation:
  """`optax.scale_by_trust_ratio` that reads each tensor once.

  Optax's reads each of them twice, so that its norms have gradients at 0, and
  computes each ratio in a kernel of its own.
  """

  def update_fn(updates, state, params):
    leaves, structure = jax.tree.flatten(updates)
    if not leaves:
      return updates, state
    w, g = norms(params), norms(updates)
    ratios = jnp.where((w == 0) | (g == 0), 1, trust_coefficient * w / g)
    scaled = [
      x * jax.lax.index_in_dim(ratios, i, keepdims=False).astype(x.dtype)
      for i, x in enumerate(leaves)
    ]
    return structure.unflatten(scaled), state

  return optax.GradientTransformation(
    lambda params: optax.ScaleByTrustRatioState(), update_fn
  )


def make_optimizer(
  name: str,
  *,
  learning_rate: float | Schedule,
  weight_decay: float,
  trainable: Any = None,
) -> optax.GradientTransformation:
  """The optimizer of a run, with the official weight decay for its kind.

  "lars": see lars; the classifier's kernel has its decay as plain L2, which the
  official code adds to the loss (model_util.add_weight_decay). "momentum":
  Nesterov SGD, 0.9. "adam": optax's defaults. These two have L2 on everything
  but BatchNorm's parameters.

  Args:
    name: "lars", "momentum" or "adam".
    learning_rate: a number or a schedule, step -> rate.
    weight_decay: the coefficient of half the squared norm.
    trainable: a tree of bools like the parameters (or params -> such a tree).
      Frozen ones get an update of exactly 0, no decay and no state.

  Returns:
    An optax.GradientTransformation whose update needs the parameters.

  Raises:
    UserError: the name is none of the three.

  >>> params = {"kernel": jnp.ones(2)}
  >>> tx = make_optimizer("adam", learning_rate=0.5, weight_decay=0.0)
  >>> updates, _ = tx.update(params, tx.init(params), params)
  >>> updates["kernel"].round(3).tolist()
  [-0.5, -0.5]
  """
  if name == "lars":
    optimizer = optax.chain(
      optax.add_decayed_weights(weight_decay, mask=is_classifier_kernel),
      lars(learning_rate, weight_decay=weight_decay),
    )
  elif name in ("momentum", "adam"):
    optimizer = optax.chain(
      optax.add_decayed_weights(weight_decay, mask=is_decayed),
      optax.sgd(learning_rate, momentum=0.9, nesterov=True)
      if name == "momentum"
      else optax.adam(learning_rate),
    )
  else:
    raise UserError(
      f'optim.name is "{name}"; it must be "lars", "momentum" or "adam".'
    )
  if trainable is None:
    return optimizer

  def frozen(params):
    mask = trainable(params) if callable(trainable) else trainable
    return jax.tree.map(lambda trained: not trained, mask)

  return optax.chain(
    optax.masked(optax.set_to_zero(), frozen),
    optax.masked(optimizer, trainable),
  )


def peak_learning_rate(
  *, learning_rate: float, batch_size: int, scaling: str
) -> float:
  """The rate at the end of the warm-up, for a global batch.

  "linear" is learning_rate * batch_size / 256, "sqrt" learning_rate *
  sqrt(batch_size), "none" learning_rate (2002.05709, appendix B.1).

  Raises:
    UserError: the scaling is none of the three.

  >>> peak_learning_rate(learning_rate=0.3, batch_size=4096, scaling="linear")
  4.8
  >>> peak_learning_rate(learning_rate=0.075, batch_size=4096, scaling="sqrt")
  4.8
  """
  if scaling == "linear":
    return learning_rate * batch_size / 256
  if scaling == "sqrt":
    return learning_rate * math.sqrt(batch_size)
  if scaling == "none":
    return learning_rate
  raise UserError(
    f'optim.scaling is "{scaling}"; it must be "linear", "sqrt" or "none".'
  )


def learning_rate_schedule(
  *,
  learning_rate: float,
  batch_size: int,
  scaling: str,
  warmup_steps: int,
  num_steps: int,
) -> Schedule:
  """Linear warm-up from 0 to the peak, then half a cosine to 0.

  As official (model_util.learning_rate_schedule): rate(0) is 0 where there is a
  warm-up, the peak is at step warmup_steps, 0 at num_steps and after. A run
  that is shorter than its warm-up ends inside it, which is printed.

  Args:
    learning_rate: the base rate, see peak_learning_rate.
    batch_size: of the global batch.
    scaling: "linear", "sqrt" or "none".
    warmup_steps: 0 starts at the peak.
    num_steps: of the run, warm-up included.

  Returns:
    A function step -> learning rate that takes numbers and traced arrays.

  Raises:
    UserError: see peak_learning_rate.

  >>> rate = learning_rate_schedule(
  ...   learning_rate=0.25,
  ...   batch_size=512,
  ...   scaling="linear",
  ...   warmup_steps=10,
  ...   num_steps=100,
  ... )
  >>> [rate(step).round(3).item() for step in (0, 5, 10, 100)]
  [0.0, 0.25, 0.5, 0.0]
  """
  peak = peak_learning_rate(
    learning_rate=learning_rate, batch_size=batch_size, scaling=scaling
  )
  if num_steps < warmup_steps:
    last = peak * num_steps / warmup_steps
    print(
      f"Note: the run has {num_steps} steps, its warm-up {warmup_steps}: the "
      f"learning rate ends at {last:.4g} of {peak:.4g}"
    )
  decay_steps = max(num_steps - warmup_steps, 1)

  def schedule(step):
    step = jnp.asarray(step, dtype=float)
    warmup = peak * step / max(warmup_steps, 1)
    progress = jnp.clip((step - warmup_steps) / decay_steps, 0, 1)
    cosine = peak * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, warmup, cosine)

  return schedule
