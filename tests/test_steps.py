"""One step of each stage is the same on 1 device and on 8, in float64.

The data differ between devices, and each way to get it wrong is shown to be
seen by the same comparison: negatives of one device only, BatchNorm of one
device only, random numbers by place on the device, labels averaged per device.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import (
  augment,
  distill,
  finetune,
  layers,
  losses,
  models,
  parallel,
  pretrain,
)
from simclr_jax.train_state import TrainState

BATCH = 16
NUM_CLASSES = 3
# Plain gradient descent: the update shows the gradient itself.
OPTIMIZER = optax.sgd(1.0)


class TinyEncoder(nn.Module):
  """A convolution, the project's BatchNorm and a mean: compiles in a second."""

  axis_name: str | None
  dtype: jnp.dtype = jnp.float64

  @nn.compact
  def __call__(self, images, *, train):
    x = nn.Conv(6, (3, 3), (2, 2), use_bias=False, param_dtype=self.dtype)(
      images
    )
    norm = layers.batch_norm(
      train=train,
      dtype=self.dtype,
      axis_name=self.axis_name,
      initializing=self.is_initializing(),
    )
    return {"h": nn.relu(norm(name="bn")(x)).mean((1, 2))}


def network(
  *,
  head_layer=1,
  probe=False,
  axis_name=parallel.AXIS,
  tiny=True,
  dtype=jnp.float64,
):
  """The project's network, on a tiny encoder unless asked otherwise."""
  model = models.make_model(
    depth=18,
    width=1 / 16,
    stem="cifar",
    num_classes=NUM_CLASSES,
    dim=8,
    dtype=dtype,
    conv="xla",
    axis_name=axis_name,
    head_layer=head_layer,
    probe=probe,
  )
  return model.clone(encoder=TinyEncoder(axis_name, dtype)) if tiny else model


def make_batch():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (BATCH, 8, 8, 3))
  # From dark to bright, so that no device sees what another does.
  images = images * np.linspace(0.2, 1, BATCH)[:, None, None, None]
  labels = np.full(BATCH, -1)
  labels[[0, 1, 2, 9]] = [0, 1, 2, 1]  # most devices have no label
  return {
    "image": images.astype(np.uint8),
    "size": np.full((BATCH, 2), 8, np.int32),
    "label": labels.astype(np.int32),
  }


def views(function, **changes):
  return functools.partial(function, size=8, dtype=jnp.float64, **changes)


def nt_xent(**changes):
  return functools.partial(
    losses.nt_xent, **{"temperature": 0.2, "axis_name": parallel.AXIS} | changes
  )


def one_step(step_fn, state, batch, num_devices, *constants):
  """Maps one step over some of the devices; returns numpy."""
  devices = jax.devices()[:num_devices]
  mapped = jax.pmap(
    step_fn,
    axis_name=parallel.AXIS,
    devices=devices,
    in_axes=(None, 0, None, *(None for _ in constants)),
  )
  split = jax.tree.map(
    lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch
  )
  out = mapped(state, split, jax.random.key(5), *constants)
  return jax.tree.map(lambda x: np.asarray(x[0]), out)


def difference(a, b):
  """Largest difference of two trees, relative to each array's largest value."""

  def relative(x, y):
    return np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1e-12)

  return max(jax.tree.leaves(jax.tree.map(relative, a, b)))


def initial(model):
  variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((2, 8, 8, 3)))
  # Gammas of 0 and classifiers of 0 would hide most of the gradient.
  variables = jax.tree.map(lambda x: x + 0.05, variables)
  return TrainState(
    step=np.int32(3),
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    opt_state=OPTIMIZER.init(variables["params"]),
  )


def pretrain_step(**changes):
  options = dict(
    model=network(head_layer=0, probe=True),
    optimizer=OPTIMIZER,
    views_fn=views(augment.two_views, blur_probability=0.0),
    nt_xent_fn=nt_xent(),
    probe=True,
  )
  return functools.partial(pretrain.train_step, **(options | changes))


def finetune_step(**changes):
  options = dict(
    model=network(), optimizer=OPTIMIZER, view_fn=views(augment.crop_flip)
  )
  return functools.partial(finetune.train_step, **(options | changes))


def distill_step(**changes):
  options = dict(
    model=network(),
    teacher=network(),
    optimizer=OPTIMIZER,
    view_fn=views(augment.crop_flip),
    distillation_fn=functools.partial(
      losses.distillation_loss, temperature=0.5
    ),
    label_weight=0.3,
  )
  return functools.partial(distill.train_step, **(options | changes))


@pytest.fixture(scope="module")
def double():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def start(double):
  return initial(network(head_layer=0))


@pytest.fixture(scope="module")
def one_device(start):
  return one_step(pretrain_step(), start, make_batch(), 1)


def test_pretraining_is_the_same_on_8_devices(start, one_device):
  state, metrics = one_step(pretrain_step(), start, make_batch(), 8)
  assert difference(one_device[1], metrics) < 1e-9
  assert difference(vars(one_device[0]), vars(state)) < 1e-9
  # The step did something to every parameter.
  moved = jax.tree.map(
    lambda a, b: np.any(np.asarray(a) != b), start.params, state.params
  )
  still = [
    jax.tree_util.keystr(path)
    for path, value in jax.tree_util.tree_leaves_with_path(moved)
    if not value
  ]
  assert still == []


def test_pretraining_in_float32():
  """Longer runs are not bounded: rounding grows to order 1 in some steps."""
  make = functools.partial(augment.two_views, size=8, blur_probability=0.0)
  step_fn = pretrain_step(
    model=network(head_layer=0, probe=True, dtype=jnp.float32), views_fn=make
  )
  start = initial(network(head_layer=0, dtype=jnp.float32))
  one, eight = (one_step(step_fn, start, make_batch(), n) for n in (1, 8))
  assert one[1]["loss"].dtype == np.float32
  np.testing.assert_allclose(eight[1]["loss"], one[1]["loss"], rtol=1e-5)
  a, b = (  # a step of gradient descent is the gradient
    np.concatenate(
      [
        np.ravel(x - y)
        for x, y in zip(
          jax.tree.leaves(start.params),
          jax.tree.leaves(state.params),
          strict=True,
        )
      ]
    )
    for state, _ in (one, eight)
  )
  assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9999


def other_keys(key, images, *, index, **options):
  place = jnp.arange(len(index))  # on the device, not in the global batch
  return views(augment.two_views, blur_probability=0.0)(
    key, images, index=place, **options
  )


@pytest.mark.slow
def test_pretraining_a_resnet_is_the_same_on_8_devices(double):
  step_fn = pretrain_step(model=network(head_layer=0, probe=True, tiny=False))
  args = step_fn, initial(network(tiny=False)), make_batch()
  one, eight = one_step(*args, 1), one_step(*args, 8)
  assert difference(one[1], eight[1]) < 1e-9
  assert difference(vars(one[0]), vars(eight[0])) < 1e-9


@pytest.mark.parametrize(
  "mistake",
  [
    dict(nt_xent_fn=nt_xent(axis_name=None)),
    dict(model="local"),
    dict(views_fn=other_keys),
  ],
  ids=["local negatives", "local BatchNorm", "keys by device"],
)
def test_each_mistake_would_be_seen(start, one_device, mistake):
  if "model" in mistake:
    local = network(head_layer=0, probe=True, axis_name=None)
    mistake = dict(model=local)
  state, _ = one_step(pretrain_step(**mistake), start, make_batch(), 8)
  assert difference(one_device[0].params, state.params) > 1e-6


@pytest.mark.parametrize("make_step", [finetune_step, distill_step])
def test_stages_with_labels_are_the_same_on_8_devices(start, make_step):
  constants = ()
  if make_step is distill_step:
    teacher = jax.tree.map(lambda x: x * 1.5, start.params)
    constants = ({"params": teacher, "batch_stats": start.batch_stats},)
  args = (make_step(), start, make_batch())
  one = one_step(*args, 1, *constants)
  eight = one_step(*args, 8, *constants)
  assert difference(one[1], eight[1]) < 1e-9
  assert difference(vars(one[0]), vars(eight[0])) < 1e-9


@pytest.mark.parametrize("make_step", [finetune_step, distill_step])
def test_the_loss_is_that_of_its_parts(start, make_step):
  """The view of this step; the teacher in inference mode; the weights."""
  batch, model = make_batch(), network(axis_name=None)
  images = views(augment.crop_flip)(
    jax.random.fold_in(jax.random.key(5), start.step),
    batch["image"],
    sizes=batch["size"],
  )
  variables = {"params": start.params, "batch_stats": start.batch_stats}
  outputs, _ = jax.jit(
    functools.partial(model.apply, train=True, mutable=["batch_stats"])
  )(variables, images)
  want, _ = losses.supervised_loss(outputs["logits"], batch["label"])
  constants = ()
  if make_step is distill_step:
    params = jax.tree.map(lambda x: x * 1.5, start.params)
    constants = ({"params": params, "batch_stats": start.batch_stats},)
    taught = jax.jit(model.apply)(*constants, images)["logits"]
    distilled = losses.distillation_loss(
      outputs["logits"], taught, temperature=0.5
    )
    want = 0.7 * distilled + 0.3 * want
  _, metrics = one_step(make_step(), start, batch, 1, *constants)
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-9)
  if constants:
    agreement = np.mean(outputs["logits"].argmax(1) == taught.argmax(1))
    assert agreement < 1
    assert metrics["agreement"] == agreement


def test_devices_of_all_groups_end_with_one_state(start):
  """Where groups have moments of their own: a checkpoint keeps one device's."""
  model = network(head_layer=0, probe=True)
  head = model.projection_head.clone(bn_group_size=2)
  step_fn = pretrain_step(model=model.clone(projection_head=head))

  def spread_fn(state, batch, key):
    state, _ = step_fn(state, batch, key)
    return jax.tree.map(
      lambda x: jax.lax.pmax(x, parallel.AXIS) - jax.lax.pmin(x, parallel.AXIS),
      state.batch_stats,
    )

  spread = one_step(spread_fn, start, make_batch(), 8)
  assert not any(np.any(x) for x in jax.tree.leaves(spread))


def test_a_mean_per_device_would_be_seen(start, monkeypatch):
  args = (finetune_step(), start, make_batch())
  one = one_step(*args, 1)
  real = losses.supervised_loss
  monkeypatch.setattr(
    losses, "supervised_loss", lambda x, y, axis_name: real(x, y)
  )
  eight = one_step(*args, 8)
  assert difference(one[0].params, eight[0].params) > 1e-6


def test_a_batch_without_labels_is_no_nan(start):
  batch = make_batch()
  batch["label"] = np.full_like(batch["label"], -1)
  state, metrics = one_step(finetune_step(), start, batch, 8)
  assert metrics["loss"] == 0
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
