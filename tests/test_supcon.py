"""supcon.py against the paper's formula in NumPy, on 1 device and on 8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import assert_close, on_devices, views

from simclr_jax import losses, supcon

LABELS = np.array([2, 0, -1, 2, 2, -1, 1, 0])  # 1 occurs once


def oracle(z1, z2, labels, temperature, normalize=True):
  """Equation 2 of 2004.11362, anchor by anchor."""
  z = np.concatenate([z1, z2])
  if normalize:
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
  n, loss, correct = len(z1), 0.0, 0

  def positive(i, j):
    i, j = i % n, j % n
    return i == j or (labels[i] == labels[j] and labels[i] >= 0)

  for i in range(2 * n):
    scores = {j: z[i] @ z[j] / temperature for j in range(2 * n) if j != i}
    total = sum(np.exp(s) for s in scores.values())
    terms = [
      np.log(np.exp(scores[j]) / total) for j in scores if positive(i, j)
    ]
    loss -= np.mean(terms) / n
    if i < n:
      correct += positive(i, max(range(n, 2 * n), key=scores.get))
  return loss, correct / n


@jax.jit
def supcon_grad(z, labels):
  def loss_fn(z):
    return supcon.supervised_contrastive(*z, labels, temperature=0.5)

  return jax.value_and_grad(loss_fn, has_aux=True)(z)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalize", [True, False])
def test_supcon_is_the_papers_formula(normalize):
  z1, z2 = views(8, 4)
  loss, metrics = supcon.supervised_contrastive(
    z1, z2, LABELS, temperature=0.5, normalize=normalize
  )
  expected, accuracy = oracle(z1, z2, LABELS, 0.5, normalize)
  np.testing.assert_allclose(loss, expected, rtol=1e-13)
  assert 0 < accuracy < 1
  np.testing.assert_allclose(metrics["contrastive_accuracy"], accuracy)


@pytest.mark.usefixtures("x64")
def test_supcon_gradient_is_that_of_finite_differences():
  z = np.stack(views(8, 3))
  (_, _), grad = supcon_grad(z, LABELS)
  for i in np.ndindex(z.shape):
    step = np.zeros_like(z)
    step[i] = 1e-5
    change = oracle(*(z + step), LABELS, 0.5)[0]
    change -= oracle(*(z - step), LABELS, 0.5)[0]
    np.testing.assert_allclose(grad[i], change / 2e-5, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_supcon_without_labels_is_nt_xent():
  z = np.stack(views(8, 4))

  def loss_fn(z):
    return losses.nt_xent(*z, temperature=0.5)

  want = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(z)
  got = supcon_grad(z, np.full(8, -1))
  assert_close((got[0][0], got[1]), (want[0][0], want[1]))
  assert_close(*(x[0][1]["contrastive_accuracy"] for x in (got, want)))
  # One class for all has no negatives: far from it.
  assert abs(supcon_grad(z, np.zeros(8, int))[0][0] - want[0][0]) > 0.1


@pytest.mark.usefixtures("x64")
def test_supcon_on_8_devices_is_that_on_1():
  """Classes reach over devices; some devices have no label."""
  devices, n, inputs = 8, 3, 6
  rng = np.random.default_rng(0)
  x1, x2 = np.stack(views(devices * n, inputs))
  weights = rng.normal(size=(inputs, 4))
  labels = rng.integers(0, 4, devices * n)
  labels[:6] = -1

  def loss_fn(weights, x1, x2, labels, axis_name="devices"):
    return supcon.supervised_contrastive(
      jnp.tanh(x1 @ weights),
      jnp.tanh(x2 @ weights),
      labels,
      temperature=0.3,
      axis_name=axis_name,
    )

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  want = jax.jit(grad_fn, static_argnums=4)(weights, x1, x2, labels, None)
  split = [x.reshape(devices, n, *x.shape[1:]) for x in (x1, x2, labels)]
  got = on_devices(loss_fn, weights, *split)
  assert np.abs(want[1]).max() > 1e-2
  assert_close(got, want)


def test_supcon_accuracy_counts_other_images_of_the_class():
  """The nearest of each is the other image of its class, not its own view."""
  z1 = jnp.eye(4)
  z2 = z1[jnp.array([1, 0, 3, 2])]
  for labels, accuracy in (([0, 0, 1, 1], 1), ([0, 0, -1, -1], 0.5)):
    _, metrics = supcon.supervised_contrastive(
      z1, z2, jnp.array(labels), temperature=0.5
    )
    assert metrics["contrastive_accuracy"] == accuracy


def test_supcon_is_never_below_float32():
  z = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
  labels = jax.ShapeDtypeStruct((4,), jnp.int32)
  shapes = jax.eval_shape(
    lambda z, labels: supcon.supervised_contrastive(
      z, z, labels, temperature=0.1
    ),
    z,
    labels,
  )
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
