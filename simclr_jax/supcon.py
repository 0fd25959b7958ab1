"""Supervised contrastive loss (2004.11362), where some images have labels."""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.losses import (
  Metrics,
  check_labels,
  check_pairs,
  check_temperature,
  l2_normalize,
)


def supervised_contrastive(
  z1: jax.Array,
  z2: jax.Array,
  labels: jax.Array,
  *,
  temperature: float,
  normalize: bool = True,
  axis_name: str | None = None,
) -> tuple[jax.Array, Metrics]:
  """NT-Xent in which all embeddings of a class are each other's positives.

  L_out of the paper (eq. 2), at the scale of `losses.nt_xent`, that is without
  the factor temperature / 0.07 of its code. An image without a label has one
  positive, its other view, and is a negative of all other images; with no label
  at all this is `losses.nt_xent`.

  Args:
    z1: [n, D] embeddings of the first view.
    z2: [n, D] embeddings of the second view, row i from the image of z1[i].
    labels: int [n]; -1 where unknown.
    temperature: divides the similarities; above 0.
    normalize: whether similarities are cosines; False takes dot products.
    axis_name: the mapped axis that holds the other parts of the global batch.

  Returns:
    (loss, metrics) over this device's rows, in float32 or better. metrics has
    "contrastive_accuracy", of view 1: whether the nearest of the N embeddings
    of view 2 is a positive.

  Raises:
    UserError: arrays of other shapes, or a temperature that is not above 0.

  >>> z = jax.random.normal(jax.random.key(0), (8, 16))
  >>> loss, metrics = supervised_contrastive(
  ...   z, z, jnp.arange(8) % 2, temperature=0.1
  ... )
  >>> metrics["contrastive_accuracy"].item()
  1.0
  """
  check_pairs(z1, z2)
  check_temperature(temperature)
  check_labels(labels, len(z1))
  n, features = z1.shape
  z = jnp.stack([z1, z2]).astype(jnp.promote_types(z1.dtype, jnp.float32))
  if normalize:
    z = l2_normalize(z)
  index, columns, column_labels = jnp.arange(n), z, labels
  if axis_name is not None:
    # The gradient of the gather sums what all devices send to these rows.
    columns = jax.lax.all_gather(z, axis_name, axis=1, tiled=True)
    column_labels = jax.lax.all_gather(labels, axis_name, tiled=True)
    index += n * jax.lax.axis_index(axis_name)
  num_pairs = columns.shape[1]
  logits = jnp.matmul(
    z.reshape(-1, features) / temperature,
    columns.reshape(-1, features).T,
    precision=jax.lax.Precision.HIGHEST,
  )
  same_image = index[:, None] == jnp.arange(num_pairs)
  same_class = (labels[:, None] == column_labels) & (labels >= 0)[:, None]
  alike = same_image | same_class
  place = jnp.concatenate([index, index + num_pairs])
  itself = place[:, None] == jnp.arange(2 * num_pairs)
  positive = jnp.tile(alike, (2, 2)) & ~itself
  log_sum = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, logits), axis=1)
  mean = jnp.where(positive, logits, 0).sum(axis=1) / positive.sum(axis=1)
  loss = (log_sum - mean).sum() / n

  nearest = jnp.argmax(logits[:n, num_pairs:], axis=1)
  correct = jnp.take_along_axis(alike, nearest[:, None], axis=1)
  return loss, {"contrastive_accuracy": correct.mean(dtype=loss.dtype)}


def train_step(state, batch, key, *, step_fn, supcon_fn):
  """A step of `step_fn` in which the contrastive loss knows the labels.

  Args:
    state: as for `step_fn`.
    batch: as for `step_fn`, with "label".
    key: the run's key.
    step_fn: `pretrain.train_step`, its other arguments bound.
    supcon_fn: `supervised_contrastive`, its options bound.
  """
  nt_xent_fn = functools.partial(supcon_fn, labels=batch["label"])
  return step_fn(state, batch, key, nt_xent_fn=nt_xent_fn)
