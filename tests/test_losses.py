"""losses.py against NumPy, the official numbers and closed forms.

golden/losses_ntxent.npz and losses_distill.npz hold float64 results of
google-research/simclr at 383d414: tf2/objective.py (loss, gradient, accuracy
and entropy), and add_kd_loss of colabs/distillation_self_training.ipynb.
"""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import losses, metrics, supcon
from simclr_jax.config import UserError


def normal(name, shape):
  """The golden inputs, a function of their name."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.standard_normal(shape)


def views(n, features, seed=0):
  """Two related views whose rows differ much in length."""
  rng = np.random.default_rng(seed)
  z1 = rng.normal(size=(n, features)) * np.linspace(0.5, 2, n)[:, None]
  return z1, z1 + rng.normal(size=(n, features))


def oracle(z1, z2, temperature, normalize=True):
  """Equation 1 of the paper, pair by pair, and the two metrics."""
  z = np.concatenate([z1, z2])
  if normalize:
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
  n, loss, correct, entropy = len(z1), 0.0, 0, 0.0
  for i in range(2 * n):
    partner = (i + n) % (2 * n)
    scores = {j: z[i] @ z[j] / temperature for j in range(2 * n) if j != i}
    total = sum(np.exp(s) for s in scores.values())
    loss -= np.log(np.exp(scores[partner]) / total) / n
    if i < n:
      across = np.array([scores[j] for j in range(n, 2 * n)])
      p = np.exp(across) / np.exp(across).sum()
      correct += np.argmax(across) == i
      entropy -= np.sum(p * np.log(p + 1e-8)) / n
  return loss, correct / n, entropy


@functools.cache
def nt_xent_grad(normalize=True, block_size=None):
  """(stacked views, temperature) -> ((loss, metrics), both gradients)."""

  def loss_fn(z, temperature):
    return losses.nt_xent(
      z[0],
      z[1],
      temperature=temperature,
      normalize=normalize,
      block_size=block_size,
    )

  return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_nt_xent_is_the_papers_formula(normalize, block_size):
  z = np.stack(views(7, 4))
  (loss, values), _ = nt_xent_grad(normalize, block_size)(z, 0.5)
  expected, accuracy, entropy = oracle(*z, 0.5, normalize)
  assert loss.dtype == jnp.float64
  np.testing.assert_allclose(loss, expected, rtol=1e-13)
  np.testing.assert_allclose(values["contrastive_entropy"], entropy, rtol=1e-13)
  assert 0 < accuracy < 1
  np.testing.assert_allclose(values["contrastive_accuracy"], accuracy)
  assert ("alignment" in values) == normalize
  if normalize:
    alignment = metrics.alignment(*z)
    np.testing.assert_allclose(values["alignment"], alignment, rtol=1e-12)
    uniformity = metrics.uniformity(np.concatenate(z))
    np.testing.assert_allclose(
      np.log(values["gaussian_potential"]), uniformity, rtol=1e-12
    )


def golden_input(case):
  """Stacked views, temperature and normalize of a golden case."""
  edges = {
    "edge_zero_row": (8, 16, 0.5),
    "edge_collapsed": (8, 16, 0.1),
    "edge_big": (8, 16, 0.1),
    "edge_single_pair": (2, 16, 0.1),
  }
  if case in edges:
    n, features, temperature = edges[case]
    normalize = case != "edge_big"
  else:
    match = re.fullmatch(r"n(\d+)_d(\d+)_t([\d.]+)_norm(\d)", case)
    n, features, temperature, normalize = map(float, match.groups())
    n, features, normalize = int(n), int(features), bool(normalize)
  name = f"ntxent/n{n}_d{features}/hidden"
  h1 = normal(name + "1", (n, features))
  h2 = h1 + 2 * normal(name + "2", (n, features))
  h = (np.concatenate([h1, h2]) / np.sqrt(features)).astype(np.float32)
  if case == "edge_zero_row":
    h[3] = 0
  elif case == "edge_collapsed":
    h = np.repeat(h[:1], 16, axis=0)
  elif case == "edge_big":
    h = h * np.float32(100)
  elif case == "edge_single_pair":
    h = h[[0, 2]]
  return h.reshape(2, -1, features), temperature, normalize


def check_golden(numbers, prefix, tolerances):
  """Compares every case of a golden file; returns how many there are."""
  cases = sorted({name.split("/")[0] for name in numbers})
  for case in cases:
    z, temperature, normalize = golden_input(case)
    for dtype, tolerance in tolerances.items():
      (loss, values), (grad, _) = nt_xent_grad(normalize)(
        z.astype(dtype), temperature
      )
      want = {
        key: numbers[f"{case}/{prefix}{key}"]
        for key in ("loss", "acc", "entropy", "grad")
      }
      message = f"{case} {dtype.__name__} "
      scale = max(abs(want["loss"]), 1)
      assert abs(loss - want["loss"]) <= tolerance * scale, message + "loss"
      entropy = values["contrastive_entropy"]
      assert abs(entropy - want["entropy"]) <= tolerance, message + "entropy"
      assert values["contrastive_accuracy"] == want["acc"], message
      grad = np.reshape(grad, want["grad"].shape)
      scale = np.abs(want["grad"]).max() or 1
      np.testing.assert_allclose(
        grad / scale, want["grad"] / scale, atol=tolerance, err_msg=message
      )
  return len(cases)


@pytest.mark.usefixtures("x64")
def test_nt_xent_golden(golden):
  with np.load(golden("losses_ntxent.npz")) as numbers:
    tolerances = {np.float64: 1e-12, np.float32: 1e-5}
    assert check_golden(numbers, "", tolerances) == 7


@pytest.mark.usefixtures("x64")
def test_nt_xent_all_golden_cases(shared):
  # Gradients of some cases are stored in float32.
  with np.load(shared / "golden" / "a_ntxent.npz") as numbers:
    assert check_golden(numbers, "f64/", {np.float64: 1e-7}) >= 26


def test_nt_xent_of_embeddings_that_say_nothing():
  """Orthogonal rows or equal rows: 2 ln(2N - 1), whatever the temperature."""
  n = 8
  orthogonal = jnp.eye(2 * n)
  collapsed = jnp.tile(jnp.arange(1.0, 2 * n + 1), (2 * n, 1))
  for z in (orthogonal, collapsed):
    (loss, values), _ = nt_xent_grad()(z.reshape(2, n, -1), 0.1)
    np.testing.assert_allclose(loss, metrics.uniform_loss(n), rtol=1e-6)
    np.testing.assert_allclose(values["contrastive_accuracy"], 1 / n)
    np.testing.assert_allclose(
      values["contrastive_entropy"], np.log(n), rtol=1e-6
    )


@pytest.mark.usefixtures("x64")
def test_nt_xent_does_not_depend_on_the_order():
  z1, z2 = views(7, 4)
  order = np.random.default_rng(1).permutation(7)

  def loss(a, b):
    return nt_xent_grad()(np.stack([a, b]), 0.3)[0][0]

  np.testing.assert_allclose(loss(z2, z1), loss(z1, z2), rtol=1e-13)
  np.testing.assert_allclose(
    loss(z1[order], z2[order]), loss(z1, z2), rtol=1e-13
  )
  # Which pairs belong together does matter.
  assert abs(loss(z1[order], z2) - loss(z1, z2)) > 0.1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block_size", [None, 3])
def test_nt_xent_gradient_is_that_of_finite_differences(block_size):
  z = np.stack(views(7, 4))
  fn = nt_xent_grad(True, block_size)
  grad, to_temperature = fn(z, 0.3)[1]
  for i in np.ndindex(z.shape):
    step = np.zeros_like(z)
    step[i] = 1e-5
    change = fn(z + step, 0.3)[0][0] - fn(z - step, 0.3)[0][0]
    np.testing.assert_allclose(grad[i], change / 2e-5, atol=1e-8)
  change = fn(z, 0.30001)[0][0] - fn(z, 0.29999)[0][0]
  np.testing.assert_allclose(to_temperature, change / 2e-5, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block_size, normalize", [(1, True), (3, False)])
def test_blockwise_is_the_plain_form(block_size, normalize):
  z = np.stack(views(7, 4))
  want = nt_xent_grad(normalize, None)(z, 0.2)
  got = nt_xent_grad(normalize, block_size)(z, 0.2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13),
    got,
    want,
  )


@pytest.mark.usefixtures("x64")
def test_blockwise_value_alone():
  z1, z2 = views(7, 4)
  fn = jax.jit(functools.partial(losses.nt_xent, temperature=0.3, block_size=3))
  want, _ = nt_xent_grad()(np.stack([z1, z2]), 0.3)
  assert_close(fn(z1, z2), want)


def test_blockwise_memory_does_not_grow_with_the_square():
  def temporary_bytes(pairs, block_size):
    shape = jax.ShapeDtypeStruct((2, pairs, 128), jnp.float32)
    lowered = nt_xent_grad(True, block_size).lower(shape, 0.1)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  blockwise = temporary_bytes(16384, 128)
  assert blockwise < temporary_bytes(16384, None) / 20
  # Against the leanest form that holds all logits and their gradient, too.
  assert blockwise < 6 * 2**30 / 20


def mapped_step(loss_fn):
  """Gradient, loss and metrics as the stages reduce them: one pmean."""

  def step(params, *batch):
    out = jax.value_and_grad(loss_fn, has_aux=True)(params, *batch)
    return jax.lax.pmean(out, "devices")

  return step


def on_devices(loss_fn, params, *batch):
  """The step on all 8 devices; leaves of batch are [8, n, ...]."""
  assert jax.local_device_count() == 8
  mapped = jax.pmap(
    mapped_step(loss_fn), "devices", in_axes=(None, *(0 for _ in batch))
  )
  out = mapped(params, *batch)
  for leaf in jax.tree.leaves(out):  # all devices hold the same
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
  return jax.tree.map(lambda leaf: leaf[0], out)


def assert_close(got, want, tolerance=1e-12):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    got,
    want,
  )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block_size", [None, 2])
def test_nt_xent_on_8_devices_is_that_on_1(block_size):
  """Loss, metrics and gradient of weights, on data without any symmetry."""
  devices, n, inputs, features = 8, 3, 6, 4
  rng = np.random.default_rng(0)
  x = np.stack(views(devices * n, inputs)) + np.arange(devices * n)[:, None] / 9
  weights = rng.normal(size=(inputs, features))

  def loss_fn(weights, x1, x2, axis_name="devices", block_size=block_size):
    return losses.nt_xent(
      jnp.tanh(x1 @ weights),
      jnp.tanh(x2 @ weights),
      temperature=0.3,
      axis_name=axis_name,
      block_size=block_size,
    )

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  want = jax.jit(grad_fn, static_argnums=(3, 4))(weights, *x, None, None)
  got = on_devices(loss_fn, weights, *x.reshape(2, devices, n, inputs))
  assert np.abs(want[1]).max() > 1e-2
  assert 0 < want[0][1]["contrastive_accuracy"] < 1
  assert_close(got, want)


def test_nt_xent_gathers_once():
  def loss(z1, z2):
    return losses.nt_xent(z1, z2, temperature=0.1, axis_name="devices")[0]

  z = jax.ShapeDtypeStruct((8, 4, 3), jnp.float32)
  text = str(jax.make_jaxpr(jax.pmap(loss, "devices"))(z, z))
  assert len(re.findall(r"= all_gather\[", text)) == 1
  assert len(re.findall(r"= p?sum\w*\[|psum", text)) == 0


def test_losses_are_never_below_float32():
  z = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
  labels = jax.ShapeDtypeStruct((4,), jnp.int32)
  shapes = jax.eval_shape(
    lambda z, labels: (
      losses.nt_xent(z, z, temperature=0.1),
      losses.nt_xent(z, z, temperature=0.1, block_size=3),
      losses.supervised_loss(z, labels),
      losses.distillation_loss(z, z, temperature=1.0),
    ),
    z,
    labels,
  )
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_labelled_mean_without_a_label_is_0():
  logits = jnp.asarray(views(5, 3)[0], jnp.float32)
  labels = jnp.full(5, -1)
  grad_fn = jax.jit(jax.value_and_grad(losses.supervised_loss, has_aux=True))
  (loss, values), grad = grad_fn(logits, labels)
  assert loss == 0
  assert values["supervised_accuracy"] == 0
  np.testing.assert_array_equal(grad, np.zeros((5, 3)))


@pytest.mark.usefixtures("x64")
def test_supervised_loss_counts_labelled_rows_only():
  logits = views(6, 4)[0]
  labels = np.array([0, -1, 3, 1, -1, 3])
  rows = labels >= 0
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  want = -np.log(p[np.arange(6), labels])[rows].mean()
  grad_fn = jax.jit(jax.value_and_grad(losses.supervised_loss, has_aux=True))
  (loss, values), grad = grad_fn(logits, labels)
  np.testing.assert_allclose(loss, want, rtol=1e-13)
  accuracy = (logits.argmax(1) == labels)[rows].mean()
  np.testing.assert_allclose(values["supervised_accuracy"], accuracy)
  assert np.all(np.any(grad != 0, axis=1) == rows)


@pytest.mark.usefixtures("x64")
def test_uneven_labels_on_8_devices_are_those_on_1():
  """Some devices have no label, one has all of its own."""
  devices, n, classes = 8, 4, 5
  rng = np.random.default_rng(3)
  x = views(devices * n, 6)[0]
  weights = rng.normal(size=(6, classes))
  labels = np.full(devices * n, -1)
  labels[:n] = [0, 4, 1, 2]
  labels[[9, 21, 22]] = [3, 3, 0]

  def loss_fn(weights, x, labels, axis_name="devices"):
    return losses.supervised_loss(x @ weights, labels, axis_name=axis_name)

  grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=3)
  want = grad_fn(weights, x, labels, None)
  got = on_devices(
    loss_fn, weights, x.reshape(devices, n, 6), labels.reshape(devices, n)
  )
  assert want[0][0] > 0
  assert_close(got, want)


def test_no_label_on_any_device_is_0():
  def loss_fn(weights, x, labels):
    return losses.supervised_loss(x @ weights, labels, axis_name="devices")

  x = np.ones((8, 2, 3), np.float32)
  got = on_devices(
    loss_fn, np.ones((3, 4), np.float32), x, np.full((8, 2), -1, np.int32)
  )
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(got))


@functools.cache
def distillation_grad(scale_by_temperature):
  """(student, teacher, T) -> (loss, gradients to student and teacher)."""

  def loss_fn(student, teacher, temperature):
    return losses.distillation_loss(
      student,
      teacher,
      temperature=temperature,
      scale_by_temperature=scale_by_temperature,
    )

  return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))


@pytest.mark.usefixtures("x64")
def test_distillation_golden(golden):
  with np.load(golden("losses_distill.npz")) as numbers:
    for n, classes in ((4, 10), (16, 1000)):
      case = f"b{n}_k{classes}_t1"
      name = f"distill/b{n}_k{classes}/"
      student = normal(name + "student", (n, classes)).astype(np.float32)
      teacher = normal(name + "teacher", (n, classes)).astype(np.float32)
      teacher = (3 * teacher).astype(np.float32)
      loss, (grad, _) = distillation_grad(True)(
        student.astype(np.float64), teacher.astype(np.float64), 1.0
      )
      np.testing.assert_allclose(loss, numbers[case + "/loss"], rtol=1e-12)
      np.testing.assert_allclose(
        grad[:2], numbers[case + "/grad"], rtol=1e-5, atol=1e-9
      )


@pytest.mark.usefixtures("x64")
def test_distillation_is_the_papers_formula():
  student, teacher = views(5, 4)

  def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)

  for t in (0.1, 1.0, 3.0):
    targets, predicted = softmax(teacher / t), softmax(student / t)
    want = -np.mean(np.sum(targets * np.log(predicted), axis=1))
    paper, _ = distillation_grad(False)(student, teacher, t)
    np.testing.assert_allclose(paper, want, rtol=1e-12)
    colab, _ = distillation_grad(True)(student, teacher, t)
    np.testing.assert_allclose(colab, want * t**2, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_distillation_teaches_the_student_only():
  student, teacher = views(5, 4)
  grad_fn = distillation_grad(False)
  to_student, to_teacher = grad_fn(student, teacher, 0.5)[1]
  assert np.all(to_teacher == 0)
  assert np.any(to_student != 0)
  # The teacher's own logits are where the gradient vanishes.
  to_student, _ = grad_fn(teacher, teacher, 0.5)[1]
  np.testing.assert_allclose(to_student, 0, atol=1e-15)


# -- mistakes -----------------------------------------------------------------

ROWS = np.ones((4, 8), np.float32)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda f: f(ROWS[None], ROWS[None]), "expected \\[n, D\\] of both"),
    (lambda f: f(ROWS, ROWS[:1]), "shapes \\(4, 8\\) and \\(1, 8\\)"),
    (lambda f: f(ROWS[:0], ROWS[:0]), "n at least 1"),
    (lambda f: f(ROWS, ROWS, block_size=0), "block_size is 0"),
    (lambda f: f(ROWS, ROWS, block_size=1.5), "block_size is 1.5"),
    (lambda f: f(ROWS, ROWS, temperature=0.0), "temperature is 0.0"),
    (lambda f: f(ROWS, ROWS, temperature=np.float32(0)), "temperature is 0.0"),
    (lambda f: f(ROWS, ROWS, temperature=float("nan")), "temperature is nan"),
  ],
)
def test_mistakes_of_nt_xent(call, message):
  def nt_xent(z1, z2, *, temperature=0.1, **options):
    return losses.nt_xent(z1, z2, temperature=temperature, **options)

  with pytest.raises(UserError, match=message):
    call(nt_xent)


@pytest.mark.parametrize("shape", [(1,), (4, 1), (3,)])
def test_there_is_a_label_a_row(shape):
  labels = np.zeros(shape, np.int32)
  for call in (
    lambda: losses.supervised_loss(ROWS, labels),
    lambda: losses.labelled_mean(ROWS[:, 0], labels),
    lambda: supcon.supervised_contrastive(ROWS, ROWS, labels, temperature=1.0),
  ):
    with pytest.raises(UserError, match="expected \\(4,\\), one a row"):
      call()


@pytest.mark.parametrize("shape", [(1, 8), (4, 1), (8,)])
def test_a_teacher_of_another_shape(shape):
  """They would broadcast."""
  with pytest.raises(UserError, match="expected the same"):
    losses.distillation_loss(ROWS, np.ones(shape), temperature=1.0)
