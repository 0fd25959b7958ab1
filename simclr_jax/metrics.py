"""What tells a healthy embedding from a collapsed one, and plain accuracy.

Functions of arrays, on one device, in jit or outside it; `from_moments` is
NumPy, on the host.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.config import UserError


def num_pairs(batch_size: int, memory_size: int = 0) -> int:
  """The batch size with as many negatives as this batch and its memory.

  >>> num_pairs(256, memory_size=512)
  512
  """
  return batch_size + memory_size // 2


def uniform_loss(num_pairs: int) -> float:
  """NT-Xent of embeddings that say nothing: 2 ln(2N - 1).

  At the scale of losses.nt_xent, for N pairs in the global batch. A healthy
  run falls below it within its first steps.

  >>> round(uniform_loss(4096), 2)
  18.02
  """
  return 2 * math.log(2 * num_pairs - 1)


def alignment(z1: jax.Array, z2: jax.Array) -> jax.Array:
  """Mean squared distance of the two views on the unit sphere.

  From 0 (the views of an image agree) to 4; independent embeddings have 2
  (Wang and Isola, 2005.10242, eq. 1 with alpha 2). z1 and z2 are [n, D].

  Raises:
    UserError: for other shapes.

  >>> alignment(jnp.eye(4), -jnp.eye(4)).item()
  4.0
  """
  if z1.shape != z2.shape or z1.ndim != 2:
    raise UserError(
      f"z1 and z2 have shapes {z1.shape} and {z2.shape}; expected [n, D] of "
      "both"
    )
  return jnp.mean(jnp.sum(jnp.square(_unit(z1) - _unit(z2)), axis=-1))


def uniformity(z: jax.Array, *, t: float = 2.0) -> jax.Array:
  """Log of the mean Gaussian potential over pairs of different rows.

  ln mean exp(-t |x - y|^2) on the unit sphere, from 0 (collapsed) downwards;
  the lower the more evenly the rows are spread (Wang and Isola, 2005.10242,
  eq. 2). z is [n, D] with n >= 2, its [n, n] distances are held in memory.

  >>> uniformity(jnp.eye(4)).round(3).item()  # of orthogonal rows
  -4.0
  """
  n = z.shape[0]
  if n < 2:
    raise UserError(f"z has {n} rows; expected at least 2, to make pairs of")
  x = _unit(z)
  similarities = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
  potentials = jnp.where(
    jnp.eye(n, dtype=bool), -jnp.inf, 2 * t * (similarities - 1)
  )
  return jax.nn.logsumexp(potentials) - math.log(n * (n - 1))


def effective_rank(z: jax.Array) -> jax.Array:
  """How many directions the rows of z [n, D] use, from 1 to min(n, D).

  exp of the entropy of the singular values, scaled to sum to 1 (Roy and
  Vetterli, 2007). Means are not subtracted: equal rows have rank 1.

  >>> effective_rank(jnp.eye(4)).round(3).item()
  4.0
  """
  singular_values = jnp.linalg.svd(_at_least_float32(z), compute_uv=False)
  total = jnp.sum(singular_values)
  p = singular_values / jnp.where(total > 0, total, 1)
  return jnp.exp(jnp.sum(jax.scipy.special.entr(p)))


def embedding_std(z: jax.Array) -> jax.Array:
  """Spread of the rows of z [n, D] on the unit sphere.

  Mean over features of the standard deviation, times sqrt(D): about 1 where
  rows are spread evenly, 0 where they have collapsed.

  >>> embedding_std(jnp.ones((8, 4))).item()
  0.0
  """
  return jnp.mean(jnp.std(_unit(z), axis=0)) * math.sqrt(z.shape[1])


def embedding_moments(z: jax.Array) -> dict[str, jax.Array]:
  """First and second moment of the unit rows of z [n, D].

  Means over rows, so that a mean over devices makes them those of the global
  batch: {"embedding_mean": [D], "embedding_moment": [D, D]}.

  >>> embedding_moments(jnp.eye(4))["embedding_moment"].shape
  (4, 4)
  """
  u = _unit(jax.lax.stop_gradient(z))
  moment = jnp.matmul(u.T, u, precision=jax.lax.Precision.HIGHEST) / len(u)
  return {"embedding_mean": u.mean(axis=0), "embedding_moment": moment}


def from_moments(mean, moment) -> dict[str, float]:
  """effective_rank and embedding_std of the unit rows with these moments.

  On the host, in float64; see `embedding_moments`.

  >>> moments = embedding_moments(jnp.ones((8, 4)))
  >>> round(from_moments(*moments.values())["effective_rank"], 2)
  1.0
  """
  mean, moment = np.asarray(mean, float), np.asarray(moment, float)
  if not np.isfinite(moment).all():
    return {"effective_rank": math.nan, "embedding_std": math.nan}
  singular_values = np.sqrt(np.maximum(np.linalg.eigvalsh(moment), 0))
  p = singular_values / max(singular_values.sum(), 1e-30)
  variance = np.maximum(np.diag(moment) - mean**2, 0)
  return {
    "effective_rank": float(np.exp(-np.sum(p * np.log(p + 1e-300)))),
    "embedding_std": float(np.sqrt(variance).mean() * math.sqrt(len(mean))),
  }


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether each label is among the k highest logits.

  Args:
    logits: [n, num_classes]; among equal ones the lower class comes first.
    labels: int [n]; a row with -1 is never correct.
    k: with fewer classes than k, all of them.

  Returns:
    Bools [n].

  Raises:
    UserError: for other shapes.

  >>> top_k_correct(jnp.eye(3), jnp.array([0, 2, -1]), 1).tolist()
  [True, False, False]
  """
  if logits.ndim != 2 or labels.shape != logits.shape[:1]:
    raise UserError(
      f"logits and labels have shapes {logits.shape} and {labels.shape}; "
      "expected [n, num_classes] and [n]"
    )
  _, classes = jax.lax.top_k(logits, min(k, logits.shape[1]))
  return jnp.any(classes == labels[:, None], axis=1)


def _at_least_float32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _unit(z):
  z = _at_least_float32(z)
  squares = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
  return z * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
