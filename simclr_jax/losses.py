"""The three losses of SimCLRv2: contrastive, supervised, distillation.

Each is a pure function of one device's rows. With `axis_name`, inside a mapped
step, values and metrics are scaled so that one pmean over that axis, of loss,
metrics and gradient alike, gives those of the global batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax.config import UserError

Metrics = dict[str, jax.Array]


def l2_normalize(x: jax.Array) -> jax.Array:
  """Scales rows [..., D] to unit length; a row of zeros stays zero.

  x * rsqrt(max(sum(x^2), 1e-12)), as the official code (objective.py) has it.

  >>> print(l2_normalize(jnp.array([3.0, 4.0])).round(3))
  [0.6 0.8]
  """
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def check_pairs(z1: jax.Array, z2: jax.Array) -> None:
  """Raises UserError unless both are [n, D], n at least 1.

  >>> check_pairs(jnp.ones((2, 8)), jnp.ones((2, 8)))
  """
  if z1.ndim != 2 or z1.shape != z2.shape or not len(z1):
    raise UserError(
      f"z1 and z2 have shapes {z1.shape} and {z2.shape}; expected [n, D] of "
      "both, n at least 1"
    )


def check_temperature(temperature) -> None:
  """Raises UserError unless it is above 0; one that is traced passes.

  >>> check_temperature(0.1)
  """
  is_known = isinstance(temperature, int | float | np.number)
  if is_known and not temperature > 0:
    raise UserError(f"temperature is {temperature}; expected a number above 0")


def nt_xent(
  z1: jax.Array,
  z2: jax.Array,
  *,
  temperature: float,
  normalize: bool = True,
  axis_name: str | None = None,
  block_size: int | None = None,
  negatives: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """NT-Xent, the contrastive loss of SimCLR, at the official scale.

  Every embedding has to find the other view of its image among the 2N - 1
  other embeddings of the global batch. The loss is mean(view 1) + mean(view 2),
  as in the official objective.py: twice the mean of the paper (2002.05709,
  eq. 1). Embeddings that say nothing give metrics.uniform_loss(N).

  Args:
    z1: [n, D] embeddings of the first view.
    z2: [n, D] embeddings of the second view, row i from the image of z1[i].
    temperature: divides the similarities; above 0.
    normalize: whether similarities are cosines; False takes dot products.
    axis_name: the mapped axis that holds the other parts of the global batch.
    block_size: None computes all [2n, 2N] logits at once. A number computes
      those of that many pairs at a time: same values and gradient, and memory
      that grows with N instead of its square.
    negatives: [K, D] further embeddings to tell every embedding from, the same
      on all devices (see memory.py); rows of zeros are left out. They get no
      gradient, and the metrics are about the batch alone.

  Returns:
    (loss, metrics) over this device's rows, in float32 or better. metrics has
    "contrastive_accuracy" (1/N by chance) and "contrastive_entropy" (nats), of
    view 1 among the N embeddings of view 2, and with normalize "alignment" and
    "gaussian_potential", whose log is the uniformity (see metrics.py).

  Raises:
    UserError: arrays of other shapes, or a number outside its range.

  With block_size there are no forward-mode derivatives (jvp, jacfwd).

  >>> z1, z2 = jax.random.normal(jax.random.key(0), (2, 64, 16))
  >>> loss, metrics = nt_xent(z1, z1 + 0.1 * z2, temperature=0.1)
  >>> metrics["contrastive_accuracy"].item()
  1.0
  """
  check_pairs(z1, z2)
  check_temperature(temperature)
  if block_size is not None and not (
    hasattr(block_size, "__index__") and block_size > 0
  ):
    raise UserError(f"block_size is {block_size}; expected an int > 0, or None")
  n = len(z1)
  dtype = jnp.promote_types(z1.dtype, jnp.float32)
  z = jnp.stack([z1, z2]).astype(dtype)
  if normalize:
    z = l2_normalize(z)
  index, columns = jnp.arange(n), z
  if axis_name is not None:
    # One collective for both views. Its transpose sums the gradients that all
    # devices send to these rows, so negatives elsewhere learn as well.
    columns = jax.lax.all_gather(z, axis_name, axis=1, tiled=True)
    index += n * jax.lax.axis_index(axis_name)
  if negatives is not None:
    negatives = jax.lax.stop_gradient(negatives.astype(dtype))
    negatives = l2_normalize(negatives) if normalize else negatives
  sum_fn: Any = _sum_over_pairs
  if block_size is not None and block_size < n:
    sum_fn = functools.partial(_blockwise, block_size)
  loss, metrics = sum_fn(
    z / temperature, columns, index, temperature, negatives
  )
  metrics = {k: v / n for k, v in metrics.items()}
  if not normalize:  # these two are of points on the sphere
    del metrics["alignment"], metrics["gaussian_potential"]
  return loss / n, metrics


def _sum_over_pairs(rows, columns, index, temperature, negatives):
  """Sums of loss and metrics over some pairs of the global batch.

  Args:
    rows: [2, m, D] both embeddings of m pairs, divided by the temperature.
    columns: [2, N, D] all embeddings.
    index: int32 [m] the rows' places among the N; -1 for a row not to count.
    temperature: what the rows were divided by.
    negatives: [K, D], rows of zeros for none; or None.
  """
  num_pairs, features = columns.shape[1:]
  # Plain matrices: with four axes the gradient would need transposed copies.
  # Without HIGHEST, matrix units round the factors to 8 or 10 bits.
  logits = jnp.matmul(
    rows.reshape(-1, features),
    columns.reshape(-1, features).T,
    precision=jax.lax.Precision.HIGHEST,
  )
  itself = jnp.concatenate([index, index + num_pairs])[:, None]
  partner = jnp.concatenate([index + num_pairs, index])[:, None]
  column = jnp.arange(2 * num_pairs)
  counted = index >= 0

  def total(values):
    return jnp.where(jnp.tile(counted, 2), values, 0).sum()

  # Masked sums rather than indexing: they fuse, and so do their gradients.
  positives = jnp.where(column == partner, logits, 0).sum(axis=1)
  others = jnp.where(column == itself, -jnp.inf, logits)
  candidates = others
  if negatives is not None:
    more = jnp.matmul(
      rows.reshape(-1, features),
      negatives.T,
      precision=jax.lax.Precision.HIGHEST,
    )
    more = jnp.where(jnp.any(negatives != 0, axis=1), more, -jnp.inf)
    candidates = jnp.concatenate([others, more], axis=1)
  loss = total(jax.nn.logsumexp(candidates, axis=1) - positives)

  positives, others, logits = jax.lax.stop_gradient((positives, others, logits))
  across = logits[: len(index), num_pairs:]
  p = jax.nn.softmax(across)
  entropy = -jnp.sum(p * jnp.log(p + 1e-8), axis=1)
  correct = jnp.argmax(across, axis=1) == index
  # exp(-2 |u - v|^2) of a unit row and the others, not itself.
  potential = jnp.exp(4 * (others * temperature - 1)).sum(axis=1)
  return loss, {
    "contrastive_accuracy": correct.sum(dtype=loss.dtype),
    "contrastive_entropy": jnp.where(counted, entropy, 0).sum(),
    "alignment": total(1 - temperature * positives),
    "gaussian_potential": total(potential) / (2 * (2 * num_pairs - 1)),
  }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(block_size, rows, columns, index, temperature, negatives):
  """_sum_over_pairs, `block_size` pairs at a time."""
  parts = jax.lax.map(
    lambda block: _sum_over_pairs(
      block[0], columns, block[1], temperature, negatives
    ),
    _to_blocks(block_size, rows, index),
  )
  return jax.tree.map(lambda part: part.sum(axis=0), parts)


def _blockwise_forward(
  block_size, rows, columns, index, temperature, negatives
):
  # The sum's gradient is known up to one factor, the cotangent of the loss, so
  # it is made here, where the logits are at hand, and never needs them again.
  grad_fn = jax.value_and_grad(_sum_over_pairs, argnums=(0, 1), has_aux=True)

  def step(columns_grad, block):
    part, (block_grad, part_grad) = grad_fn(
      block[0], columns, block[1], temperature, negatives
    )
    return columns_grad + part_grad, (part, block_grad)

  columns_grad, (parts, block_grads) = jax.lax.scan(
    step, jnp.zeros_like(columns), _to_blocks(block_size, rows, index)
  )
  rows_grad = jnp.moveaxis(block_grads, 0, 1).reshape(2, -1, rows.shape[2])
  sums = jax.tree.map(lambda part: part.sum(axis=0), parts)
  return sums, (rows_grad[:, : rows.shape[1]], columns_grad)


def _blockwise_backward(block_size, grads, cotangents):
  del block_size
  rows_grad, columns_grad = grads
  factor, _ = cotangents  # the metrics carry no gradient, as in the plain form
  return factor * rows_grad, factor * columns_grad, None, None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _to_blocks(block_size, rows, index):
  """([k, 2, block_size, D], [k, block_size]); filled up with index -1."""
  _, n, features = rows.shape
  missing = -n % block_size
  rows = jnp.pad(rows, ((0, 0), (0, missing), (0, 0)))
  index = jnp.pad(index, (0, missing), constant_values=-1)
  blocks = rows.reshape(2, -1, block_size, features)
  return jnp.moveaxis(blocks, 1, 0), index.reshape(-1, block_size)


def check_labels(labels: jax.Array, num_rows: int) -> None:
  """Raises UserError unless there is one a row; a single one would broadcast.

  >>> check_labels(jnp.array([3, -1]), 2)
  """
  if labels.shape != (num_rows,):
    raise UserError(
      f"labels have shape {labels.shape}; expected ({num_rows},), one a row"
    )


def labelled_mean(
  values: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  """The mean of values [n] over the rows with a label (labels int [n], not -1).

  With axis_name it is this device's sum, times the number of devices, over the
  labels of the global batch: labels may be spread unevenly, and pmean of it is
  the global mean. 0 where no row has a label.

  >>> labelled_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([0, 3, -1])).item()
  1.5
  """
  check_labels(labels, len(values))
  labelled = labels >= 0
  count = labelled.sum(dtype=values.dtype)
  total = jnp.where(labelled, values, 0).sum()
  if axis_name is not None:
    count = jax.lax.psum(count, axis_name)
    total *= jax.lax.psum(1, axis_name)
  return total / jnp.maximum(count, 1)


def supervised_loss(
  logits: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> tuple[jax.Array, Metrics]:
  """Cross-entropy over the rows that have a label.

  Args:
    logits: [n, num_classes].
    labels: int [n]; -1 where unknown, such rows count nowhere.
    axis_name: see labelled_mean.

  Returns:
    (loss, {"supervised_accuracy": fraction in [0, 1]}), in float32 or better.

  >>> loss, metrics = supervised_loss(9 * jnp.eye(3), jnp.array([0, 1, -1]))
  >>> metrics["supervised_accuracy"].item()
  1.0
  """
  check_labels(labels, len(logits))
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  # optax would take -1 for the last class.
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.maximum(labels, 0)
  )
  correct = (jnp.argmax(logits, axis=1) == labels).astype(logits.dtype)
  mean = functools.partial(labelled_mean, labels=labels, axis_name=axis_name)
  return mean(losses), {"supervised_accuracy": mean(correct)}


def distillation_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float,
  scale_by_temperature: bool = False,
) -> jax.Array:
  """Cross-entropy of the student with the teacher's softened predictions.

  mean over rows of -sum softmax(teacher / T) log softmax(student / T)
  (2006.10029, eq. 2). No gradient reaches the teacher.

  Args:
    student_logits: [n, num_classes].
    teacher_logits: [n, num_classes].
    temperature: T, above 0.
    scale_by_temperature: multiplies by T^2, which keeps the gradient's size
      over T. The official notebook does, the paper's formula does not.

  Returns:
    A scalar, in float32 or better.

  Raises:
    UserError: the two have different shapes, or T is not above 0.

  >>> logits = jnp.zeros((2, 10))
  >>> loss = distillation_loss(logits, logits, temperature=1.0)
  >>> round(float(loss), 3)  # ln 10
  2.303
  """
  if student_logits.shape != teacher_logits.shape:
    raise UserError(
      f"the student's logits have shape {student_logits.shape}, the teacher's "
      f"{teacher_logits.shape}; expected the same"
    )
  check_temperature(temperature)
  dtype = jnp.promote_types(student_logits.dtype, jnp.float32)
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  targets = jax.nn.softmax(teacher_logits.astype(dtype) / temperature)
  predicted = jax.nn.log_softmax(student_logits.astype(dtype) / temperature)
  loss = -jnp.mean(jnp.sum(targets * predicted, axis=-1))
  return loss * temperature**2 if scale_by_temperature else loss
