"""optimizers.py against NumPy and the official numbers.

golden/optimizers_lars.npz and optimizers_schedules.json were produced by
google-research/simclr at 383d414 on TF 1.15.4 in float32: five steps of
lars_optimizer.LARSOptimizer as model_util.get_optimizer builds it, and
model_util.learning_rate_schedule.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import models, optimizers
from simclr_jax.config import UserError

RATES = (0.0, 0.3, 0.6, 0.45, 0.15)
# Official name, our path, shape.
GOLDEN = (
  ("base_model/conv2d_1/kernel", "encoder/conv_1/kernel", (3, 3, 8, 16)),
  ("base_model/batch_normalization_1/gamma", "encoder/bn_1/scale", (16,)),
  ("base_model/batch_normalization_1/beta", "encoder/bn_1/bias", (16,)),
  ("base_model/conv2d_2/kernel", "encoder/conv_2/kernel", (3, 3, 4, 8)),
  ("base_model/conv2d_3/kernel", "encoder/conv_3/kernel", (1, 1, 8, 8)),
  (
    "head_contrastive/nl_0/dense/kernel",
    "projection_head/dense_1/kernel",
    (16, 8),
  ),
  (
    "head_supervised/linear_layer/dense/kernel",
    "classifier/kernel",
    (16, 10),
  ),
  ("head_supervised/linear_layer/dense/bias", "classifier/bias", (10,)),
)


def nested(flat):
  """{"a/b": x} to {"a": {"b": x}}."""
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[leaf] = value
  return tree


def flat(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): value
    for path, value in leaves
  }


def normal(name, shape):
  """The golden inputs, a function of their name."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.standard_normal(shape)


def rate_fn(step):
  return jnp.asarray(RATES)[step]


def random_trees(num_steps, dtype=np.float64, seed=0):
  """Parameters, and a gradient for each step; every special case is there."""
  rng = np.random.default_rng(seed)

  def tree():
    return {
      "encoder": {
        "conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(dtype)},
        "bn": {
          "scale": rng.normal(size=4).astype(dtype),
          "bias": rng.normal(size=4).astype(dtype),
        },
      },
      "projection_head": {
        "dense_1": {"kernel": rng.normal(size=(4, 5)).astype(dtype)},
        "dense_2": {"kernel": rng.normal(size=(5, 5)).astype(dtype)},
        "bn_2": {"scale": rng.normal(size=5).astype(dtype)},
      },
      "classifier": {
        "kernel": rng.normal(size=(4, 3)).astype(dtype),
        "bias": rng.normal(size=3).astype(dtype),
      },
    }

  params, *grads = [tree() for _ in range(num_steps + 1)]
  # Norms of 0: the trust ratio is 1 there.
  params["projection_head"]["dense_1"]["kernel"] *= 0
  params["projection_head"]["dense_2"]["kernel"] *= 0
  for grad in grads:
    grad["projection_head"]["dense_2"]["kernel"] *= 0
  return params, grads


def run(optimizer, params, grads):
  """Parameters after each step, the last state and the compiled update."""
  update_fn = jax.jit(optimizer.update)
  params = jax.tree.map(jnp.asarray, params)
  state, after = optimizer.init(params), []
  for grad in grads:
    updates, state = update_fn(jax.tree.map(jnp.asarray, grad), state, params)
    params = optax.apply_updates(params, updates)
    after.append(flat(params))
  return after, state, update_fn


def numpy_lars(params, grads, weight_decay, classifier_l2):
  """lars_optimizer.py with the official exclusions, from its description."""
  w, v = flat(params), {}
  for t, grad in enumerate(grads):
    for path, g in flat(grad).items():
      adapted = path.endswith("kernel") and "classifier" not in path
      if adapted or (classifier_l2 and path == "classifier/kernel"):
        g = g + weight_decay * w[path]
      ratio = 1.0
      norms = np.linalg.norm(w[path]), np.linalg.norm(g)
      if adapted and min(norms) > 0:
        ratio = 0.001 * norms[0] / norms[1]
      v[path] = 0.9 * v.get(path, 0) + RATES[t] * ratio * g
      w[path] = w[path] - v[path]
  return w


def assert_same(got, want, rtol=1e-12):
  assert got.keys() == want.keys()
  for path in want:
    np.testing.assert_allclose(
      got[path], want[path], rtol=rtol, atol=rtol, err_msg=path
    )


def test_lars_golden(golden):
  params, grads = {}, [{} for _ in RATES]
  for name, path, shape in GOLDEN:
    kind = name.split("/")[-1]
    value = normal(name, shape)
    if kind == "kernel":
      value *= np.sqrt(2 / np.prod(shape[:-1]))
    else:
      value *= 0.1
    if kind == "gamma":
      value += 1
    if path == "encoder/conv_2/kernel":  # a weight of norm 0
      value *= 0
    params[path] = value.astype(np.float32)
    for t, grad in enumerate(grads):
      value = 0.1 * normal(f"lars/grad/{name}/step{t}", shape)
      if path == "encoder/conv_3/kernel":  # a gradient of norm 0
        value *= 0
      grad[path] = value.astype(np.float32)
  optimizer = optimizers.lars(rate_fn, weight_decay=1e-4)
  after, state, _ = run(optimizer, nested(params), map(nested, grads))
  velocity = flat(optax.tree.get(state, "trace"))
  with np.load(golden("optimizers_lars.npz")) as numbers:
    for name, path, _ in GOLDEN:
      for t in range(len(RATES)):
        want = numbers[f"step{t}/param/{name}"]
        np.testing.assert_allclose(
          after[t][path], want, atol=1e-6 * np.abs(want).max(), err_msg=name
        )
      want = numbers[f"step4/momentum/{name}"]
      np.testing.assert_allclose(
        -velocity[path], want, atol=1e-6 * np.abs(want).max(), err_msg=name
      )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("classifier_l2", [False, True])
def test_lars_is_numpys_in_float64(classifier_l2):
  params, grads = random_trees(len(RATES))
  if classifier_l2:  # as the stages use it
    optimizer = optimizers.make_optimizer(
      "lars", learning_rate=rate_fn, weight_decay=0.1
    )
  else:
    optimizer = optimizers.lars(rate_fn, weight_decay=0.1)
  after, _, _ = run(optimizer, params, grads)
  assert {x.dtype for x in after[-1].values()} == {np.dtype("float64")}
  assert_same(after[-1], numpy_lars(params, grads, 0.1, classifier_l2))


def test_lars_without_a_gradient_leaves_what_is_there():
  """As at the first step of fine-tuning, whose classifier is 0."""
  params = {"kernel": jnp.ones((2, 2))}
  optimizer = optimizers.lars(0.5, weight_decay=0.0)
  after, _, _ = run(optimizer, params, [{"kernel": jnp.zeros((2, 2))}])
  np.testing.assert_array_equal(after[0]["kernel"], params["kernel"])


@pytest.mark.usefixtures("x64")
def test_momentum_is_nesterov_with_l2():
  params, grads = random_trees(3)
  optimizer = optimizers.make_optimizer(
    "momentum", learning_rate=0.2, weight_decay=0.1
  )
  after, _, _ = run(optimizer, params, grads)
  w, v = flat(params), {}
  for grad in grads:
    for path, g in flat(grad).items():
      if "bn" not in path:  # the classifier's bias is decayed
        g = g + 0.1 * w[path]
      v[path] = 0.9 * v.get(path, 0) + g
      w[path] = w[path] - 0.2 * (g + 0.9 * v[path])
  assert_same(after[-1], w)


@pytest.mark.usefixtures("x64")
def test_adam_has_l2_in_its_gradient():
  params, grads = random_trees(3)
  optimizer = optimizers.make_optimizer(
    "adam", learning_rate=0.2, weight_decay=0.1
  )
  after, _, _ = run(optimizer, params, grads)
  w, m, v = flat(params), {}, {}
  for t, grad in enumerate(grads, start=1):
    for path, g in flat(grad).items():
      if "bn" not in path:
        g = g + 0.1 * w[path]
      m[path] = 0.9 * m.get(path, 0) + 0.1 * g
      v[path] = 0.999 * v.get(path, 0) + 0.001 * g**2
      m_hat, v_hat = m[path] / (1 - 0.9**t), v[path] / (1 - 0.999**t)
      w[path] = w[path] - 0.2 * m_hat / (np.sqrt(v_hat) + 1e-8)
  assert_same(after[-1], w, rtol=1e-10)


def test_kinds_of_the_networks_parameters():
  """Every parameter of a network with all kinds of layers has its kind."""
  model = models.make_model(
    depth=50,
    stem="imagenet",
    sk_ratio=0.0625,
    width=0.25,
    num_classes=10,
    conv="xla",
  )
  params = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3))
  )["params"]
  adapted = flat(optimizers.is_adapted(params))
  decayed = flat(optimizers.is_decayed(params))
  kernel = flat(optimizers.is_classifier_kernel(params))
  assert [path for path in kernel if kernel[path]] == ["classifier/kernel"]
  for path, shape in flat(params).items():
    # All kernels have two axes or four; BatchNorm and biases one.
    is_matrix = len(shape.shape) > 1
    is_classifier = path.startswith("classifier/")
    assert adapted[path] == (is_matrix and not is_classifier), path
    assert decayed[path] == (is_matrix or is_classifier), path
  # Published: r50 with SK has 87 convolutions and 71 BatchNorms; 3 in the head.
  assert sum(adapted.values()) == 87 + 3
  assert len(adapted) == 87 + 3 + 2 * (71 + 3) - 1 + 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["lars", "momentum", "adam"])
def test_frozen_parameters_stay_and_have_no_state(name):
  params, grads = random_trees(3)
  trainable = jax.tree.map(lambda _: False, params)
  trainable["classifier"] = {"kernel": True, "bias": True}
  trainable["encoder"]["bn"] = {"scale": True, "bias": True}
  options = {"learning_rate": rate_fn, "weight_decay": 0.1}
  free, free_state, _ = run(
    optimizers.make_optimizer(name, **options), params, grads
  )
  frozen = {}
  for mask in (trainable, lambda _: trainable):
    optimizer = optimizers.make_optimizer(name, trainable=mask, **options)
    frozen, state, _ = run(optimizer, params, grads)
    for path, is_trained in flat(trainable).items():
      want = free[-1][path] if is_trained else flat(params)[path]
      np.testing.assert_array_equal(frozen[-1][path], want, err_msg=path)
  # conv, dense_1, dense_2 and bn_2 are without.
  num_slots = 2 if name == "adam" else 1
  num_leaves = len(jax.tree.leaves(free_state)) - 4 * num_slots
  assert len(jax.tree.leaves(state)) == num_leaves


@pytest.mark.parametrize("name", ["lars", "momentum", "adam"])
def test_a_second_step_compiles_nothing(name):
  params, grads = random_trees(3, np.float32)
  schedule = optimizers.learning_rate_schedule(
    learning_rate=0.1,
    batch_size=64,
    scaling="sqrt",
    warmup_steps=1,
    num_steps=3,
  )
  optimizer = optimizers.make_optimizer(
    name, learning_rate=schedule, weight_decay=1e-4
  )
  _, _, update_fn = run(optimizer, params, grads)
  assert update_fn._cache_size() == 1


def test_schedules_golden(golden):
  cases = json.loads(golden("optimizers_schedules.json").read_text())
  assert len(cases) == 5
  for case in cases:
    steps, rates = np.array(case.pop("steps")), np.array(case.pop("rates"))
    schedule = optimizers.learning_rate_schedule(**case)
    got = schedule(steps)
    np.testing.assert_allclose(got, rates, atol=2e-6 * rates.max())


def make_schedule(**options):
  return optimizers.learning_rate_schedule(
    **{
      "learning_rate": 0.3,
      "batch_size": 512,
      "scaling": "linear",
      "warmup_steps": 10,
      "num_steps": 110,
      **options,
    }
  )


@pytest.mark.usefixtures("x64")
def test_schedule_at_its_corners():
  schedule = make_schedule()
  got = [schedule(step) for step in (0, 5, 10, 60, 110, 1000)]
  np.testing.assert_allclose(got, [0, 0.3, 0.6, 0.3, 0, 0], atol=1e-15)
  without_warmup = make_schedule(warmup_steps=0)
  np.testing.assert_allclose(
    [without_warmup(0), without_warmup(55)], [0.6, 0.3], rtol=1e-12
  )
  traced = jax.jit(schedule)(jnp.asarray(7, jnp.int32))
  np.testing.assert_allclose([traced, schedule(np.int64(7))], 0.42)


def test_schedule_of_a_run_shorter_than_its_warmup(capsys):
  assert make_schedule()(0) == 0
  assert capsys.readouterr().out == ""
  for num_steps in (1, 4, 9):
    schedule = make_schedule(num_steps=num_steps)
    note = capsys.readouterr().out
    assert note.startswith("Note: ")
    assert note.count("\n") == 1
    np.testing.assert_allclose(
      schedule(num_steps), 0.6 * num_steps / 10, rtol=1e-6
    )
  assert np.isfinite(make_schedule(num_steps=10)(10))


def test_peak_learning_rate():
  for rate, scaling, want in (
    (0.3, "linear", 4.8),
    (0.075, "sqrt", 4.8),
    (0.1, "sqrt", 6.4),
    (0.3, "none", 0.3),
  ):
    got = optimizers.peak_learning_rate(
      learning_rate=rate, batch_size=4096, scaling=scaling
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_unknown_names_are_the_users_mistake():
  with pytest.raises(UserError, match=r'optim\.name is "sgd".*"momentum"'):
    optimizers.make_optimizer("sgd", learning_rate=1.0, weight_decay=0.0)
  with pytest.raises(UserError, match=r'optim\.scaling is "log".*"sqrt"'):
    make_schedule(scaling="log")
