"""ResNet: sizes, padding, stems, precision, freezing and global BatchNorm."""

import functools

import det
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from simclr_jax import layers, resnet
from simclr_jax.config import UserError

# (depth, width, selective kernels): trainable parameters of the encoder, those
# and the moving statistics in millions (the official README's column). The 13
# published networks.
PARAMETER_COUNTS = {
  (50, 1, False): (23_508_032, 23.56),
  (50, 1, True): (35_215_584, 35.28),
  (50, 2, False): (93_907_072, 94.01),
  (50, 2, True): (140_306_048, 140.43),
  (101, 1, False): (42_500_160, 42.61),
  (101, 1, True): (64_662_304, 64.79),
  (101, 2, False): (169_771_136, 169.98),
  (101, 2, True): (257_132_224, 257.38),
  (152, 1, False): (58_143_808, 58.30),
  (152, 1, True): (88_940_896, 89.12),
  (152, 2, False): (232_253_568, 232.56),
  (152, 2, True): (353_398_528, 353.75),
  (152, 3, True): (794_704_160, 795.24),
}


def size(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(model, image_shape=(1, 32, 32, 3), dtype=jnp.float32):
  images = jax.ShapeDtypeStruct(image_shape, dtype)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def small(**options):
  """18 layers of 8 to 64 channels, on images of 16x16."""
  return resnet.ResNet(
    **({"depth": 18, "width": 0.125, "stem": "cifar"} | options)
  )


@pytest.mark.parametrize(
  "depth, width, has_sk",
  [
    # A second or two each: the others run with --all.
    case
    if case[0] == 50 or case == (152, 3, True)
    else pytest.param(*case, marks=pytest.mark.slow)
    for case in PARAMETER_COUNTS
  ],
)
def test_published_parameter_counts(depth, width, has_sk):
  trainable, millions = PARAMETER_COUNTS[depth, width, has_sk]
  model = resnet.ResNet(
    depth=depth,
    width=width,
    sk_ratio=0.0625 * has_sk,
    stem="imagenet",
  )
  tree = shapes(model)
  assert size(tree["params"]) == trainable
  assert round(size(tree) / 1e6, 2) == millions


@pytest.mark.parametrize(
  "depth, stem, count",
  [(18, "cifar", 11_173_056), (18, "imagenet", 11_180_736)],
)
def test_small_networks_parameter_counts(depth, stem, count):
  model = resnet.ResNet(depth=depth, stem=stem)
  assert size(shapes(model)["params"]) == count


@pytest.mark.slow
def test_34_and_200_layers():
  model = resnet.ResNet(depth=34, stem="imagenet")
  assert size(shapes(model)["params"]) == 21_288_896
  tree = shapes(resnet.ResNet(depth=200, stem="imagenet"))["params"]
  assert [len(tree[f"block_group{k}"]) for k in (1, 2, 3, 4)] == [3, 24, 36, 3]


@pytest.mark.parametrize(
  "width, channels", [(0.25, 16), (0.5, 32), (1, 64), (2, 128)]
)
def test_width_and_stems(width, channels):
  for stem, first, pooled in (("imagenet", 36, 18), ("cifar", 72, 72)):
    model = resnet.ResNet(depth=18, width=width, stem=stem)
    images = jax.ShapeDtypeStruct((2, 72, 72, 1), jnp.float32)
    outputs, _ = jax.eval_shape(
      model.init_with_output, jax.random.key(0), images
    )
    got = {name: x.shape for name, x in outputs.items()}
    assert got["initial_conv"] == (2, first, first, channels)
    assert got["initial_max_pool"] == (2, pooled, pooled, channels)
    side = pooled
    for group in (1, 2, 3, 4):
      assert got[f"block_group{group}"] == (
        2, side, side, channels * 2 ** (group - 1)
      )  # fmt: skip
      side = -(-side // 2)
    assert got["h"] == (2, 8 * channels)


def test_initial_values():
  @jax.jit  # XLA drops the other blocks
  def init(key):
    tree = small(width=0.5).init(key, jnp.zeros((1, 16, 16, 3)))
    return tree["params"]["block_group4"]["block_0"]

  block = init(jax.random.key(0))
  assert not block["bn_2"]["scale"].any()  # the last one of every block
  for name in ("bn_1", "shortcut_bn"):
    assert (block[name]["scale"] == 1).all()
  kernel = np.asarray(block["conv_2"]["kernel"])
  scaled = kernel * np.sqrt(np.prod(kernel.shape[:3]))
  assert scaled.std() == pytest.approx(1, abs=0.01)
  # A normal one cut at two of its own standard deviations, then widened.
  assert 2.2 < np.abs(scaled).max() <= 2.2737


@pytest.mark.parametrize("side", [16, 18])
@pytest.mark.parametrize("padding", ["same", "torch"])
def test_max_pool_against_numpy(padding, side):
  model = resnet.ResNet(
    depth=18, width=0.0625, stem="imagenet", pool_padding=padding
  )
  images = np.random.default_rng(0).random((1, side, side, 3), np.float32)
  variables = det.variables(shapes(model))
  outputs = jax.jit(model.apply)(variables, images)
  bn = variables["params"]["stem"]["bn_1"]
  moving = variables["batch_stats"]["stem"]["bn_1"]
  x = np.asarray(outputs["initial_conv"])
  x = (x - moving["mean"]) / np.sqrt(moving["var"] + 1e-5)
  x = np.maximum(x * bn["scale"] + bn["bias"], 0)
  # TensorFlow's rule: as little as needed, the odd one at the end.
  height = x.shape[1]
  out = -(-height // 2)
  needed = (out - 1) * 2 + 3 - height
  before = 1 if padding == "torch" else needed // 2
  after = 1 if padding == "torch" else needed - before
  pads = ((0, 0), (before, after), (before, after), (0, 0))
  x = np.pad(x, pads, constant_values=-np.inf)
  want = np.stack(
    [
      [
        x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1))
        for j in range(out)
      ]
      for i in range(out)
    ]
  )
  np.testing.assert_allclose(
    outputs["initial_max_pool"][0], want, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("side", [8, 9])
def test_resnet_d_shortcut_pools_as_official(strides, side):
  def untouched(*args, name, **kwargs):
    return lambda x: x

  x = np.random.default_rng(0).random((1, side, side, 3), np.float32)
  got = resnet._shortcut(
    x, 3, strides, resnet_d=True, conv=untouched, norm=untouched
  )
  # Stride 2 counts the appended zeros (odd maps), stride 1 leaves them out.
  padded = np.pad(x[0], ((0, 1), (0, 1), (0, 0)))
  real = np.pad(np.ones((side, side, 1)), ((0, 1), (0, 1), (0, 0)))
  out = -(-side // strides)
  want = np.zeros((out, out, 3))
  for i in range(out):
    for j in range(out):
      window = np.s_[i * strides :, j * strides :]
      count = 4 if strides == 2 else real[window][:2, :2].sum()
      want[i, j] = padded[window][:2, :2].sum((0, 1)) / count
  np.testing.assert_allclose(got[0], want, rtol=1e-5)


def gradient(model, variables, images):
  """Loss, gradient and new moving averages of one training step's forward."""

  def loss_fn(params):
    outputs, updated = model.apply(
      variables | {"params": params},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    h = outputs["h"]
    weights = jnp.cos(jnp.arange(h.shape[-1], dtype=h.dtype))
    return jnp.mean((h**2) @ weights), updated["batch_stats"]

  (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    variables["params"]
  )
  return loss, grads, stats


def assert_trees_close(got, want, rtol):
  def close(path, a, b):
    np.testing.assert_allclose(
      a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=str(path)
    )

  jax.tree_util.tree_map_with_path(close, got, want)


def asymmetric_images(num, dtype=np.float64):
  images = np.random.default_rng(1).random((num, 16, 16, 3))
  return (images * np.linspace(0.1, 1, num)[:, None, None, None]).astype(dtype)


@pytest.fixture(scope="module")
def single_device():
  """One step of a small network in float64 on one device."""
  with jax.enable_x64(True):
    images = asymmetric_images(16)
    model = small(dtype=jnp.float64)
    variables = det.variables(shapes(model, dtype=jnp.float64))
    step = jax.jit(functools.partial(gradient, model))
    return variables, images, step(variables, images)


def test_float64_throughout(single_device):
  for leaf in jax.tree.leaves(single_device):
    assert leaf.dtype == np.float64


def test_batch_norm_is_global_over_8_devices(single_device, x64):
  variables, images, (loss, grads, stats) = single_device
  model = small(dtype=jnp.float64, axis_name="batch")

  def step(variables, images):
    loss, grads, stats = gradient(model, variables, images)
    return jax.lax.pmean((loss, grads), "batch"), stats

  step = jax.pmap(step, axis_name="batch", in_axes=(None, 0))
  (got_loss, got_grads), got_stats = step(
    variables, images.reshape(8, 2, 16, 16, 3)
  )
  for device in (0, 7):
    part = jax.tree.map(
      lambda x, device=device: x[device], (got_loss, got_grads, got_stats)
    )
    assert_trees_close(part, (loss, grads, stats), rtol=1e-9)


def test_remat_keeps_the_tree():
  plain, remat = shapes(small()), shapes(small(remat=True))
  assert jax.tree.structure(plain) == jax.tree.structure(remat)
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  step = functools.partial(gradient, small(remat=True))
  text = str(jax.make_jaxpr(step)(plain, images))
  # Each of the 8 blocks is computed again beside its gradient.
  assert text.count("remat2[") + text.count("checkpoint[") == 8


@pytest.mark.slow
def test_remat_changes_no_number(single_device, x64):
  variables, images, want = single_device
  model = small(dtype=jnp.float64, remat=True)
  step = jax.jit(functools.partial(gradient, model))
  assert_trees_close(step(variables, images), want, rtol=1e-10)


def test_batch_norm_over_groups_of_devices(x64):
  x = (
    np.random.default_rng(2).normal(size=(8, 4, 6))
    * np.arange(1, 9)[:, None, None]
  )

  def normalize(x):
    norm = layers.batch_norm(
      train=True, dtype=x.dtype, axis_name="batch", group_size=2
    )()
    variables = {
      "params": {"scale": jnp.ones(6), "bias": jnp.zeros(6)},
      "batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)},
    }
    return norm.apply(variables, x, mutable=["batch_stats"])[0]

  got = jax.pmap(normalize, axis_name="batch")(x).reshape(4, 8, 6)
  pairs = x.reshape(4, 8, 6)
  want = pairs - pairs.mean(1, keepdims=True)
  want /= np.sqrt(pairs.var(1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_batch_norm_of_one_device_sends_nothing():
  """XLA keeps a collective of one device on CPUs, and copies its operand."""
  variables = {
    "params": {"scale": np.ones(6), "bias": np.zeros(6)},
    "batch_stats": {"mean": np.zeros(6), "var": np.ones(6)},
  }

  def normalize(x, group_size=0, train=True):
    norm = layers.batch_norm(
      train=train, dtype=x.dtype, axis_name="batch", group_size=group_size
    )()
    return norm.apply(variables, x, mutable=["batch_stats"])[0]

  def collectives(x, **options):
    fn = functools.partial(normalize, **options)
    return str(jax.make_jaxpr(jax.pmap(fn, axis_name="batch"))(x)).count("psum")

  x = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
  assert collectives(x)
  assert not collectives(x[:1])
  assert collectives(x, group_size=1) == 1  # for the moving averages
  # Moving averages need no axis: networks are also used outside of one.
  assert normalize(x[0], group_size=2, train=False).shape == (4, 6)


@pytest.mark.parametrize("remat", [False, True])
def test_equal_blocks_are_lowered_once(remat):
  """Of 33 convolutions beside shortcuts, the stem's and 4 x 2 blocks' stay."""
  model = resnet.ResNet(depth=34, stem="cifar", width=0.125, remat=remat)
  variables = shapes(model)
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  lowered = jax.jit(functools.partial(model.apply, train=False)).lower(
    variables, images
  )
  shortcuts = 4
  count = lowered.as_text().count("stablehlo.convolution")
  assert count == 1 + 4 * 2 * 2 + shortcuts


@pytest.mark.parametrize("last_frozen", [-1, 2])
def test_no_backward_into_frozen_groups(last_frozen):
  model = small(freeze_after_block=last_frozen)
  variables = shapes(model)
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

  def count(function):
    text = str(jax.make_jaxpr(function)(variables, images))
    return text.count("conv_general_dilated[")

  forward = count(model.apply)
  backward = count(functools.partial(gradient, model)) - forward
  trained = forward - {-1: 0, 2: 11}[last_frozen]
  # Two for each trained convolution, less the gradient of the input: of the
  # images for the stem, else of what the first block and its shortcut share.
  assert backward == 2 * trained - {-1: 1, 2: 2}[last_frozen]


@pytest.mark.parametrize("last_frozen", [2, 4])
def test_frozen_groups_keep_everything(single_device, x64, last_frozen):
  variables, images, _ = single_device
  model = small(dtype=jnp.float64, freeze_after_block=last_frozen)
  loss, grads, stats = jax.jit(functools.partial(gradient, model))(
    variables, images
  )
  groups = ["stem", *(f"block_group{k}" for k in range(1, 5))]
  for k, group in enumerate(groups):
    before = jax.tree.leaves(variables["batch_stats"][group])
    after = jax.tree.leaves(stats[group])
    same = [(a == b).all() for a, b in zip(before, after, strict=True)]
    sloped = [x.any() for x in jax.tree.leaves(grads[group])]
    if k <= last_frozen:
      assert all(same) and not any(sloped), group
    else:
      assert not any(same) and all(sloped), group
  if last_frozen == 4:
    inference = small(dtype=jnp.float64).apply
    h = jax.jit(inference)(variables, images)["h"]
    weights = jnp.cos(jnp.arange(h.shape[-1], dtype=h.dtype))
    np.testing.assert_allclose(loss, jnp.mean((h**2) @ weights), rtol=1e-12)


def test_bfloat16_keeps_float32_variables():
  model = small(dtype=jnp.bfloat16)
  images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
  step = functools.partial(gradient, model)
  variables = shapes(model)
  for tree in (variables, jax.eval_shape(step, variables, images)):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {
      np.dtype(np.float32)
    }
  outputs = jax.eval_shape(model.apply, variables, images)
  assert outputs.pop("h").dtype == jnp.float32
  assert {x.dtype for x in outputs.values()} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"depth": 42}, "model.depth: got 42, allowed are 18, 34, 50"),
    ({"width": 0}, "model.width: got 0"),
    ({"width": -1}, "model.width: got -1"),
    ({"sk_ratio": 2.0}, "model.sk_ratio: got 2.0"),
    ({"depth": 34, "sk_ratio": 0.0625}, "need bottleneck blocks"),
    ({"stem": "imgnet"}, 'model.stem: got "imgnet"'),
    ({"pool_padding": "valid"}, 'pool_padding: got "valid"'),
  ],
)
def test_networks_that_do_not_exist(wrong, message):
  right = {"depth": 50, "width": 1, "sk_ratio": 0.0, "stem": "imagenet"}
  resnet.check_architecture(**right)
  with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
    resnet.check_architecture(**(right | wrong))
  assert "\n" not in str(error.value)


def test_given_parameters_are_not_drawn_again(monkeypatch):
  """Flax traces the initializer of every parameter at every call."""
  model = small()
  images = jnp.zeros((1, 16, 16, 3))
  variables = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes(model)
  )
  drawn = []

  def init(*args):
    drawn.append(args)
    return jnp.zeros(args[1], args[2])

  monkeypatch.setattr(layers, "_kernel_init", init)
  jax.eval_shape(model.apply, variables, images)
  assert not drawn
  jax.eval_shape(model.init, jax.random.key(0), images)
  assert len(drawn) >= 8


@pytest.mark.parametrize(
  "path", [("conv_1", "kernel"), ("bn_1", "scale"), ("bn_1", "bias")]
)
def test_a_parameter_of_another_shape_is_refused(path):
  model = small()
  images = jnp.zeros((1, 16, 16, 3))
  variables = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes(model)
  )
  module, name = path
  variables["params"]["stem"][module][name] = jnp.zeros(1)
  with pytest.raises(errors.ScopeParamShapeError, match=name):
    jax.eval_shape(model.apply, variables, images)
