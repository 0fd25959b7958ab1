"""metrics.py against closed forms and NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import metrics
from simclr_jax.config import UserError

# One program each instead of one an operation.
alignment = jax.jit(metrics.alignment)
uniformity = jax.jit(metrics.uniformity)
effective_rank = jax.jit(metrics.effective_rank)
embedding_std = jax.jit(metrics.embedding_std)


def rows(n, features, seed=0):
  return np.random.default_rng(seed).normal(size=(n, features))


def test_uniform_loss():
  published = {128: 11.08, 256: 12.47, 512: 13.86, 1024: 15.25, 4096: 18.02}
  for num_pairs, loss in published.items():
    assert round(metrics.uniform_loss(num_pairs), 2) == loss
  assert metrics.uniform_loss(1) == 0


@pytest.mark.usefixtures("x64")
def test_alignment():
  z = rows(4, 8)
  np.testing.assert_allclose(alignment(z, 3 * z), 0, atol=1e-14)
  np.testing.assert_allclose(alignment(z, -z), 4)
  a, b = np.eye(8)[:4], np.eye(8)[4:]
  np.testing.assert_allclose(alignment(a, b), 2)


@pytest.mark.usefixtures("x64")
def test_uniformity():
  z = rows(6, 6)
  unit = z / np.linalg.norm(z, axis=1, keepdims=True)
  for t in (2.0, 0.5):
    potentials = [
      np.exp(-t * np.sum((unit[i] - unit[j]) ** 2))
      for i in range(6)
      for j in range(i)
    ]
    np.testing.assert_allclose(
      uniformity(z, t=t), np.log(np.mean(potentials)), rtol=1e-12
    )
  collapsed = np.tile(z[:1], (6, 1))
  np.testing.assert_allclose(uniformity(collapsed), 0, atol=1e-14)
  # Orthogonal rows are sqrt(2) apart.
  np.testing.assert_allclose(uniformity(np.eye(6)), -4, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_effective_rank():
  np.testing.assert_allclose(effective_rank(5 * np.eye(4, 8)), 4)
  collapsed = np.tile(rows(1, 8), (4, 1))
  np.testing.assert_allclose(effective_rank(collapsed), 1)
  # Two directions, one three times as strong as the other.
  z = np.zeros((4, 8))
  z[0, 0], z[1, 1] = 3, 1
  entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
  np.testing.assert_allclose(effective_rank(z), math.exp(entropy))
  assert effective_rank(np.zeros((4, 8))) == 1


def test_embedding_std():
  spread = rows(4096, 64)
  assert 0.98 < embedding_std(spread) < 1.02
  collapsed = np.tile(rows(1, 8), (5, 1))
  np.testing.assert_allclose(embedding_std(collapsed), 0, atol=1e-6)


def test_metrics_of_bfloat16_are_float32_and_finite_for_zeros():
  z = jnp.zeros((4, 3), jnp.bfloat16)
  values = (
    alignment(z, z),
    uniformity(z),
    effective_rank(z),
    embedding_std(z),
  )
  for value in values:
    assert value.dtype == jnp.float32
    assert np.isfinite(value)


def test_gradients_at_rows_of_zeros_are_finite():
  zeros = jnp.zeros((4, 3))
  for fn in (lambda z: metrics.alignment(z, z + 1), metrics.uniformity):
    assert np.isfinite(jax.grad(lambda z, fn=fn: fn(z).sum())(zeros)).all()


def test_uniformity_needs_a_pair():
  with pytest.raises(UserError, match="z has 1 rows; expected at least 2"):
    metrics.uniformity(jnp.ones((1, 3)))


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: metrics.alignment(jnp.ones((1, 3)), jnp.ones((4, 3))),
      r"z1 and z2 have shapes \(1, 3\) and \(4, 3\); expected \[n, D\] of both",
    ),
    (
      lambda: metrics.alignment(jnp.ones(3), jnp.ones(3)),
      r"z1 and z2 have shapes \(3,\) and \(3,\); expected",
    ),
    (
      lambda: metrics.top_k_correct(jnp.eye(3), jnp.zeros(1, int), 1),
      r"have shapes \(3, 3\) and \(1,\); expected \[n, num_classes\] and \[n\]",
    ),
    (
      lambda: metrics.top_k_correct(jnp.eye(3), jnp.zeros((3, 1), int), 1),
      r"have shapes \(3, 3\) and \(3, 1\); expected",
    ),
    (
      lambda: metrics.top_k_correct(jnp.ones(3), jnp.zeros(3, int), 1),
      r"have shapes \(3,\) and \(3,\); expected",
    ),
  ],
)
def test_shapes_that_would_broadcast_are_refused(call, message):
  with pytest.raises(UserError, match=message) as caught:
    call()
  assert "\n" not in str(caught.value)


def test_top_k_correct():
  logits = np.array([[0.1, 0.5, 0.3, 0.2], [4, 3, 2, 1], [4, 3, 2, 1]])
  labels = np.array([2, 3, -1])
  wanted = {1: [0, 0, 0], 2: [1, 0, 0], 3: [1, 0, 0], 4: [1, 1, 0]}
  for k, want in (*wanted.items(), (5, [1, 1, 0])):
    got = jax.jit(metrics.top_k_correct, static_argnums=2)(logits, labels, k)
    assert got.tolist() == [bool(x) for x in want], k


def test_top_k_correct_counts_ties_once():
  logits = jnp.zeros((3, 3))
  correct = metrics.top_k_correct(logits, jnp.arange(3), 1)
  assert correct.sum() == 1
