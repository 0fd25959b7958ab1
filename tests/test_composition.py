"""Whole steps of pretraining and fine-tuning from the public functions.

Network, loss, LARS and schedule, put together as a user would in a notebook,
against `oracle_network.py`: three steps in float64, every parameter, moving
average, loss and learning rate.
"""

import det
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle_network as oracle
import pytest

from simclr_jax import convert, losses, models, optimizers, tf_names

ARCH = {"depth": 18, "width": 0.0625, "sk_ratio": 0.0, "stem": "cifar"}
PEAK, DECAY, WARMUP, STEPS = 3.2 * 8 / 256, 1e-4, 2, 9


def official_values(shapes, num_classes):
  """TF1 name -> float64 array of a ResNet-18 with 4 channels."""
  paths = tf_names.paths(
    depth=18, sk_ratio=0.0, stem="cifar", has_classifier=num_classes is not None
  )
  values = {}
  for name, path in paths.items():
    leaf = shapes
    for key in path:
      leaf = leaf[key]
    kind = name.rsplit("/", 1)[1]
    values[name] = det.array(name, leaf.shape, kind, np.float64)
  return values


def rate(step):
  progress = max(step - WARMUP, 0) / (STEPS - WARMUP)
  return PEAK * min(step / WARMUP, 0.5 * (1 + np.cos(np.pi * progress)))


def oracle_step(values, momenta, step, images, labels, head_layer):
  """Updates in place; returns the loss without the decay of the classifier."""
  hidden, nodes = oracle.resnet18_and_head(values, images)
  grads = {}
  if labels is None:
    loss = oracle.nt_xent(hidden[-1], 0.2)
  else:
    at = "head_supervised/linear_layer/dense/"
    logits = oracle.dense(
      hidden[head_layer], nodes[at + "kernel"], nodes[at + "bias"]
    )
    loss, logits.grad = oracle.cross_entropy(logits.value, labels)
    nodes[at + "kernel"].grad += DECAY * values[at + "kernel"]
  oracle.backward(hidden[0].tape)
  grads = {
    name: node.grad
    for name, node in nodes.items()
    # Official TF1: fine-tuning leaves the head as it is.
    if labels is None or not name.startswith("head_contrastive")
  }
  oracle.lars(values, momenta, grads, rate(step), DECAY)
  return loss


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "head_layer",
  [
    None,
    pytest.param(0, marks=pytest.mark.slow),
    pytest.param(2, marks=pytest.mark.slow),
  ],
)
def test_three_steps(head_layer):
  """Pretraining (None), and fine-tuning from a layer of the head."""
  pretrains = head_layer is None
  num_classes = None if pretrains else 5
  model = models.make_model(
    **ARCH,
    dim=16,
    num_classes=num_classes,
    head_layer=head_layer or 0,
    dtype=jnp.float64,
    conv="xla",
  )
  # Like the official input: the second view is half the first.
  images = det.array("images", (8, 16, 16, 3), "uniform", np.float64)
  if pretrains:
    other = det.array("other", (8, 16, 16, 3), "uniform", np.float64)
    images = np.concatenate([images, 0.5 * images + 0.5 * other])
  labels = None if pretrains else np.arange(8) * 3 % 5
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  values = official_values(shapes, num_classes)
  variables = convert.from_tensorflow(values, **ARCH)
  schedule = optimizers.learning_rate_schedule(
    learning_rate=3.2,
    batch_size=8,
    scaling="linear",
    warmup_steps=WARMUP,
    num_steps=STEPS,
  )
  if pretrains:
    tx = optimizers.lars(schedule, weight_decay=DECAY)
  else:
    mask = models.trainable(
      variables["params"], head_layer=head_layer, train_head_layer=False
    )
    tx = optimizers.make_optimizer(
      "lars", learning_rate=schedule, weight_decay=DECAY, trainable=mask
    )

  def loss_fn(params, stats):
    outputs, updated = model.apply(
      {"params": params, "batch_stats": stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    if pretrains:
      z1, z2 = jnp.split(outputs["z"], 2)
      loss, _ = losses.nt_xent(z1, z2, temperature=0.2)
    else:
      loss, _ = losses.supervised_loss(outputs["logits"], labels)
    return loss, updated["batch_stats"]

  @jax.jit
  def step_fn(params, stats, opt_state):
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, stats
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state, loss

  params, stats = variables["params"], variables["batch_stats"]
  opt_state, momenta = jax.jit(tx.init)(params), {}
  values = {name: value.copy() for name, value in values.items()}
  for step in range(3):
    params, stats, opt_state, loss = step_fn(params, stats, opt_state)
    want = oracle_step(values, momenta, step, images, labels, head_layer)
    np.testing.assert_allclose(loss, want, rtol=1e-10)
    np.testing.assert_allclose(schedule(step), rate(step), rtol=1e-12)
    expected = convert.from_tensorflow(values, **ARCH)
    jax.tree.map(
      lambda got, want: np.testing.assert_allclose(
        got, want, rtol=0, atol=1e-9 * np.abs(want).max()
      ),
      {"params": params, "batch_stats": stats},
      expected,
    )
