"""What frozen features are worth: nearest neighbours and linear classifiers.

Every function takes arrays of features and labels, computes on one device, and
returns {"top1": .., "top5": ..}, fractions in [0, 1]. Rows labelled -1 are left
out. With fewer than 5 classes top5 counts all of them. Nothing is random.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import losses, metrics
from simclr_jax.config import UserError

# Numbers held at a time for a block of test rows: half a gigabyte of float32.
_BLOCK_NUMBERS = 2**27


def top_k(logits, labels) -> dict[str, float]:
  """Accuracy of logits [m, num_classes] for labels int [m].

  Args:
    logits: scores of any kind, higher is better.
    labels: rows with -1 do not count.

  Returns:
    {"top1": .., "top5": ..}.

  Raises:
    UserError: no row counts.

  >>> top_k(np.eye(10)[[3, 1]], np.array([3, 2]))
  {'top1': 0.5, 'top5': 1.0}
  """
  labels = np.asarray(labels)
  counted = labels >= 0
  if not counted.any():
    raise UserError("there is no labelled image to evaluate on.")
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  return {
    f"top{k}": float(
      np.mean(np.asarray(metrics.top_k_correct(logits, labels, k))[counted])
    )
    for k in (1, 5)
  }


def knn(
  train_features,
  train_labels,
  test_features,
  test_labels,
  *,
  num_classes: int,
  k: int = 200,
  temperature: float = 0.07,
) -> dict[str, float]:
  """Accuracy of the vote of the k nearest training images.

  Each votes for its class with weight exp(cosine / temperature) (Wu et al.,
  1805.01978, section 3.4).

  Args:
    train_features: [n, C].
    train_labels: int [n].
    test_features: [m, C].
    test_labels: int [m].
    num_classes: labels are below it.
    k: neighbours; all, where there are fewer labelled training images.
    temperature: above 0.

  Returns:
    {"top1": .., "top5": ..}.

  Raises:
    UserError: no labelled row on either side, or a label too high.

  >>> h, labels = np.eye(3, dtype=np.float32), np.arange(3)
  >>> knn(h, labels, h, labels, num_classes=3, k=1)
  {'top1': 1.0, 'top5': 1.0}
  """
  train_features, train_labels = _labelled(
    (train_features, train_labels), num_classes
  )
  test_features, test_labels = _labelled(
    (test_features, test_labels), num_classes
  )
  k = min(k, len(train_labels))
  held = max(len(train_labels), k * num_classes)
  votes = _knn_votes(
    losses.l2_normalize(train_features),
    train_labels,
    losses.l2_normalize(test_features),
    num_classes=num_classes,
    k=k,
    temperature=temperature,
    block_size=min(len(test_labels), max(1, _BLOCK_NUMBERS // held)),
  )
  return top_k(votes, test_labels)


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "block_size"))
def _knn_votes(train, labels, test, *, num_classes, k, temperature, block_size):
  """Votes [m, num_classes] for unit rows."""

  def vote(block):
    similarities = jnp.matmul(
      block, train.T, precision=jax.lax.Precision.HIGHEST
    )
    nearest, index = jax.lax.top_k(similarities, k)
    # 1 is the highest cosine: the vote of an identical image weighs 1.
    weights = jnp.exp((nearest - 1) / temperature)
    classes = jax.nn.one_hot(labels[index], num_classes, dtype=weights.dtype)
    return jnp.einsum(
      "mk,mkc->mc", weights, classes, precision=jax.lax.Precision.HIGHEST
    )

  m = len(test)
  test = jnp.pad(test, ((0, -m % block_size), (0, 0)))
  votes = jax.lax.map(vote, test.reshape(-1, block_size, test.shape[1]))
  return votes.reshape(-1, num_classes)[:m]


def linear(
  train_features,
  train_labels,
  test_features,
  test_labels,
  *,
  num_classes: int,
  l2: float = 1e-3,
  num_steps: int = 200,
) -> dict[str, float]:
  """Accuracy of logistic regression, fitted by L-BFGS to its optimum.

  Features are centred and divided by one number, so that their mean square is
  1: no learning rate and no scale to tune.

  Args:
    train_features: [n, C].
    train_labels: int [n].
    test_features: [m, C].
    test_labels: int [m].
    num_classes: labels are below it.
    l2: times half the squared norm of the kernel, beside the mean loss.
    num_steps: at most; it ends where the gradient has vanished.

  Returns:
    {"top1": .., "top5": ..}.

  Raises:
    UserError: no labelled row on either side, or a label too high.

  >>> h, labels = np.eye(3, dtype=np.float32), np.arange(3)
  >>> linear(h, labels, h, labels, num_classes=3)
  {'top1': 1.0, 'top5': 1.0}
  """
  return _fit_and_score(
    functools.partial(_logistic, num_steps=num_steps),
    (train_features, train_labels),
    (test_features, test_labels),
    num_classes,
    l2,
  )


def ridge(
  train_features,
  train_labels,
  test_features,
  test_labels,
  *,
  num_classes: int,
  l2: float = 1e-3,
) -> dict[str, float]:
  """Accuracy of least squares on one-hot labels, in closed form.

  A fraction of a second where `linear` takes many, and a little less accurate.
  Arguments, result and errors are those of `linear`; l2 is beside the mean
  squared error.

  >>> h, labels = np.eye(3, dtype=np.float32), np.arange(3)
  >>> ridge(h, labels, h, labels, num_classes=3)
  {'top1': 1.0, 'top5': 1.0}
  """
  return _fit_and_score(
    _least_squares,
    (train_features, train_labels),
    (test_features, test_labels),
    num_classes,
    l2,
  )


def _fit_and_score(fit_fn, train, test, num_classes, l2):
  features, labels = _labelled(train, num_classes)
  test_features, test_labels = _labelled(test, num_classes)
  mean = jnp.mean(features, axis=0)
  centred = features - mean
  # Not each feature by its own deviation: that would blow up dead ones.
  scale = jax.lax.rsqrt(jnp.maximum(jnp.mean(jnp.square(centred)), 1e-12))
  # Matrix units would otherwise round the factors to 8 or 10 bits.
  with jax.default_matmul_precision("highest"):
    kernel, bias = fit_fn(centred * scale, labels, num_classes, l2)
    logits = (test_features - mean) * scale @ kernel + bias
  return top_k(logits, test_labels)


@functools.partial(jax.jit, static_argnames=("num_classes",))
def _least_squares(x, labels, num_classes, l2):
  targets = jax.nn.one_hot(labels, num_classes, dtype=x.dtype)
  bias = jnp.mean(targets, axis=0)
  gram = x.T @ x / len(x) + l2 * jnp.eye(x.shape[1], dtype=x.dtype)
  moments = x.T @ (targets - bias) / len(x)
  return jax.scipy.linalg.solve(gram, moments, assume_a="pos"), bias


@functools.partial(jax.jit, static_argnames=("num_classes", "num_steps"))
def _logistic(x, labels, num_classes, l2, *, num_steps):
  def loss_fn(params):
    kernel, bias = params
    loss, _ = losses.supervised_loss(x @ kernel + bias, labels)
    return loss + 0.5 * l2 * jnp.sum(jnp.square(kernel))

  optimizer = optax.lbfgs()
  value_and_grad_fn = optax.value_and_grad_from_state(loss_fn)

  def step(carry):
    params, state, _, count = carry
    value, grad = value_and_grad_fn(params, state=state)
    updates, state = optimizer.update(
      grad, state, params, value=value, grad=grad, value_fn=loss_fn
    )
    params = optax.apply_updates(params, updates)
    return params, state, optax.tree.norm(grad), count + 1

  def unfinished(carry):
    _, _, grad_norm, count = carry
    return (count < num_steps) & (grad_norm > 1e-5)

  params = (
    jnp.zeros((x.shape[1], num_classes), x.dtype),
    jnp.zeros(num_classes, x.dtype),
  )
  carry = (params, optimizer.init(params), jnp.asarray(jnp.inf, x.dtype), 0)
  return jax.lax.while_loop(unfinished, step, carry)[0]


def _labelled(examples, num_classes):
  """Rows with a label, as float32 (or better) and int32 on the device."""
  features, labels = map(np.asarray, examples)
  if features.ndim != 2 or labels.shape != features.shape[:1]:
    raise UserError(
      f"features and labels have shapes {features.shape} and {labels.shape}; "
      "expected [n, C] and [n]"
    )
  if np.max(labels, initial=-1) >= num_classes:
    raise UserError(
      f"label {labels.max()} with {num_classes} classes; it must be below "
      "that number."
    )
  if not (labels >= 0).any():
    raise UserError("there is no labelled image to evaluate on.")
  features = jnp.asarray(features[labels >= 0])
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  return features.astype(dtype), jnp.asarray(labels[labels >= 0], jnp.int32)
