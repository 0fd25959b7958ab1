"""memory.py and the negatives it adds, against NumPy, on 1 device and on 8."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_steps
from PIL import Image
from test_losses import assert_close, on_devices, views

from simclr_jax import (
  augment,
  checkpoint,
  cli,
  losses,
  memory,
  parallel,
  pretrain,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError

MOMENTUM = 0.75
BATCH = test_steps.BATCH
VIEWS_FN = test_steps.views(augment.two_views, blur_probability=0.0)


def oracle(z1, z2, negatives, temperature, normalize=True):
  """Equation 1 of 2002.05709 with more negatives, anchor by anchor."""
  z = np.concatenate([z1, z2, negatives])
  if normalize:
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
  n, loss = len(z1), 0.0
  for i in range(2 * n):
    scores = [z[i] @ z[j] / temperature for j in range(len(z)) if j != i]
    loss += np.log(np.sum(np.exp(scores)))
    loss -= z[i] @ z[(i + n) % (2 * n)] / temperature
  return loss / n


def some_queue(filled=5, size=9):
  queue = np.zeros((size, 4))
  queue[:filled] = np.random.default_rng(2).normal(size=(filled, 4))
  return queue


@functools.cache
def nt_xent_grad(block_size=None, normalize=True):
  def loss_fn(z, negatives):
    return losses.nt_xent(
      *z,
      temperature=0.5,
      negatives=negatives,
      block_size=block_size,
      normalize=normalize,
    )

  return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "block_size, normalize", [(None, True), (None, False), (3, True)]
)
def test_negatives_are_the_papers_formula(block_size, normalize):
  z, queue = np.stack(views(7, 4)), some_queue()
  fn = nt_xent_grad(block_size, normalize)
  (loss, values), (grad, to_queue) = fn(z, queue)

  def want(z):
    return oracle(*z, queue[:5], 0.5, normalize)

  np.testing.assert_allclose(loss, want(z), rtol=1e-13)
  for i in np.ndindex(z.shape):
    step = np.zeros_like(z)
    step[i] = 1e-5
    change = (want(z + step) - want(z - step)) / 2e-5
    np.testing.assert_allclose(grad[i], change, atol=1e-8)
  assert not np.any(to_queue)
  # The metrics are about the batch alone.
  plain = losses.nt_xent(*z, temperature=0.5, normalize=normalize)[1]
  assert_close(values, plain)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("block_size", [None, 3])
def test_an_empty_memory_is_none(block_size):
  z = np.stack(views(7, 4))
  got, (grad, _) = nt_xent_grad(block_size)(z, np.zeros((9, 4)))
  fn = jax.value_and_grad(losses.nt_xent, argnums=(0, 1), has_aux=True)
  want, want_grad = fn(*z, temperature=0.5)
  assert_close((got, grad), (want, np.stack(want_grad)))


@pytest.mark.usefixtures("x64")
def test_negatives_on_8_devices_are_those_on_1():
  devices, n, inputs = 8, 3, 6
  x = np.stack(views(devices * n, inputs))
  weights = np.random.default_rng(0).normal(size=(inputs, 4))

  def loss_fn(weights, x1, x2, axis_name="devices"):
    return losses.nt_xent(
      jnp.tanh(x1 @ weights),
      jnp.tanh(x2 @ weights),
      temperature=0.3,
      negatives=some_queue(),
      axis_name=axis_name,
    )

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  want = jax.jit(grad_fn, static_argnums=3)(weights, *x, None)
  got = on_devices(loss_fn, weights, *x.reshape(2, devices, n, inputs))
  assert np.abs(want[1]).max() > 1e-2
  assert_close(got, want)


def batch_of(step):
  """From dark to bright, then back: no batch is like the one before."""
  batch = test_steps.make_batch()
  batch["image"] = batch["image"][:: 1 - 2 * (step % 2)]
  return batch


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"memory.size": 1000}, "no multiple of config.batch_size, which is 256; "
     "take 1024"),
    ({"memory.size": -256}, "config.memory.size must not be negative"),
    ({"memory.size": 256, "memory.momentum": 1.0}, "must be below 1, got 1"),
    ({"memory.size": 256, "head.num_layers": 0}, "needs a projection head"),
    ({"memory.size": 256, "loss.name": "supcon"}, "config.memory.size; leave"),
    ({"loss.block_size": 8, "loss.name": "supcon"}, "config.loss.block_size;"),
    ({"loss.name": "supcn"}, 'did you mean "supcon"?'),
  ],
)  # fmt: skip
def test_mistakes(fields, message):
  config = cli.load_recipe("digits", stage="pretrain")
  for name, value in fields.items():
    config_lib.set_field(config, name, value)
  with pytest.raises(UserError) as error:
    config_lib.check(config, num_devices=1)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def steps(state, num_steps, num_devices):
  """All states and metrics of `num_steps` steps with a memory."""
  step_fn = functools.partial(
    memory.train_step,
    step_fn=test_steps.pretrain_step(),
    model=test_steps.network(head_layer=0, probe=True),
    views_fn=VIEWS_FN,
    nt_xent_fn=test_steps.nt_xent(),
    momentum=MOMENTUM,
  )
  mapped = jax.pmap(
    step_fn,
    axis_name=parallel.AXIS,
    devices=jax.devices()[:num_devices],
    in_axes=(None, 0, None),
  )
  outs = [(state, None)]
  for step in range(num_steps):
    batch = jax.tree.map(
      lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch_of(step)
    )
    out = mapped(outs[-1][0], batch, jax.random.key(5))
    outs.append(jax.tree.map(lambda x: np.asarray(x[0]), out))
  return outs


@pytest.fixture(scope="module")
def start():
  with jax.enable_x64(True):
    state = test_steps.initial(test_steps.network(head_layer=0))
    yield memory.remember(state, size=2 * BATCH, dim=8, dtype=np.float64)


@pytest.fixture(scope="module")
def one_device(start):
  return steps(start, 3, 1)


def test_the_memory_is_the_same_on_8_devices(start, one_device):
  eight = steps(start, 3, 8)
  for one, many in zip(one_device[1:], eight[1:], strict=True):
    assert test_steps.difference(one[1], many[1]) < 1e-8
    assert test_steps.difference(vars(one[0]), vars(many[0])) < 1e-8


def test_the_moving_average_and_the_queue(one_device):
  """Against NumPy's average, the network itself and a list of batches."""
  average, queue = one_device[0][0].params, np.zeros((2 * BATCH, 8))
  model = test_steps.network(head_layer=0, axis_name=None)
  for step, (state, _) in enumerate(one_device[1:]):
    average = jax.tree.map(
      lambda a, p: MOMENTUM * a + (1 - MOMENTUM) * p, average, state.params
    )
    kept = state.opt_state[1]
    assert test_steps.difference(average, kept.params) < 1e-12
    before, batch = one_device[step][0], batch_of(step)
    views = VIEWS_FN(
      jax.random.fold_in(jax.random.key(5), before.step),
      batch["image"],
      index=np.arange(BATCH),
      sizes=batch["size"],
    )
    outputs, _ = model.apply(
      {"params": average, "batch_stats": before.batch_stats},
      views[:BATCH],
      train=True,
      mutable=["batch_stats"],
    )
    # The state begins at step 3, an odd one: the second half is filled first.
    half = slice(BATCH, None) if step % 2 == 0 else slice(BATCH)
    queue[half] = outputs["z"]
    np.testing.assert_allclose(kept.queue, queue, rtol=1e-8, atol=1e-10)


def test_the_queue_goes_around_after_2_to_31_images(start):
  """Where steps times images are beyond int32, in thirds of a queue."""
  state = start.replace(opt_state=start.opt_state[0])
  state = memory.remember(state, size=3 * BATCH, dim=8, dtype=np.float64)
  state = state.replace(step=np.int32(2**31 // BATCH + 1))  # 3 divides it
  queue = steps(state, 1, 1)[1][0].opt_state[1].queue
  assert np.all(np.any(queue, axis=1) == (np.arange(3 * BATCH) < BATCH))


def test_a_step_sees_the_memory_of_the_step_before(one_device):
  def step_fn(state, batch, key, negatives):
    nt_xent_fn = test_steps.nt_xent(negatives=negatives)
    step_fn = test_steps.pretrain_step(nt_xent_fn=nt_xent_fn)
    return step_fn(state, batch, key)

  mapped = jax.pmap(
    step_fn,
    axis_name=parallel.AXIS,
    devices=jax.devices()[:1],
    in_axes=(None, 0, None, None),
  )
  for step in (0, 1):
    state, _ = one_device[step]
    opt_state, kept = state.opt_state
    batch = jax.tree.map(lambda x: x[None], batch_of(step))
    got = vars(one_device[step + 1][0])["params"], one_device[step + 1][1]
    for queue in (kept.queue, np.zeros_like(kept.queue)):
      want = mapped(
        state.replace(opt_state=opt_state), batch, jax.random.key(5), queue
      )
      want = jax.tree.map(lambda x: x[0], (want[0].params, want[1]))
      distance = test_steps.difference(want, got)
      # The second time without what is kept, which is nothing at first.
      forgot = step == 1 and queue is not kept.queue
      assert distance > 1e-4 if forgot else distance < 1e-9


def train(workdir, **fields):
  config = cli.load_recipe("digits,width=0.0625", stage="pretrain")
  fields = {
    "batch_size": 32,
    "num_steps": 4,
    "checkpoint_every_steps": 2,
    "data.image_size": 8,
    "model.conv": "xla",
    "report": False,
  } | {k.replace("__", "."): v for k, v in fields.items()}
  for name, value in fields.items():
    config_lib.set_field(config, name, value)
  pretrain.train_and_evaluate(config, workdir)
  with checkpoint.open_manager(workdir, keep=2) as manager:
    return checkpoint._read(manager, 4)[0]


@pytest.mark.slow
def test_a_run_with_a_memory_is_resumed_exactly(tmp_path):
  fields = dict(memory__size=64, memory__momentum=0.5)
  whole = train(tmp_path, **fields)
  queue = whole["opt_state"]["[1].queue"]
  assert queue.shape == (64, 64) and np.all(np.any(queue != 0, axis=1))
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  (tmp_path / "result.json").unlink()
  again = train(tmp_path, **fields)
  jax.tree.map(np.testing.assert_array_equal, again, whole)
  lines = (tmp_path / "metrics.jsonl").read_text()
  assert lines.count('"eval_top1"') == 1
  without = train(tmp_path / "without")
  assert test_steps.difference(without["params"], whole["params"]) > 1e-3


@pytest.mark.slow
def test_supervised_contrastive_pretraining_needs_labels(tmp_path):
  known = train(tmp_path / "known", loss__name="supcon")
  plain = train(tmp_path / "plain")
  assert test_steps.difference(known["params"], plain["params"]) > 1e-3
  (tmp_path / "images").mkdir()
  for i in range(40):
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
  folder = dict(
    data__name=f"folder:{tmp_path / 'images'}",
    data__eval_split="",
    loss__name="supcon",
  )
  with pytest.raises(UserError, match="supcon needs labels, and folder:"):
    train(tmp_path / "folder", **folder)
  folder |= dict(loss__name="nt_xent", memory__size=64)
  with pytest.raises(UserError, match="size is 64, but there are 40 images"):
    train(tmp_path / "folder", **folder)
