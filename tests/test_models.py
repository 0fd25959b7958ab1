"""The network against the official code, and what trains in each stage.

Golden numbers: google-research/simclr at 383d414 run in float64 (TF 1.15.4) on
the weights of det.py, through `convert.from_tensorflow`.
"""

import functools
import itertools

import det
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from simclr_jax import convert, cpu_conv, losses, models, optimizers, tf_names
from simclr_jax.config import UserError

R18 = {"depth": 18, "width": 1, "sk_ratio": 0.0, "stem": "cifar"}
R50 = {"depth": 50, "width": 1, "sk_ratio": 0.0, "stem": "imagenet"}
SK50 = R50 | {"sk_ratio": 0.0625}
ENDPOINTS = (
  "initial_conv",
  "initial_max_pool",
  "block_group1",
  "block_group2",
  "block_group3",
  "block_group4",
)
TINY = {"depth": 18, "width": 0.125, "stem": "cifar", "dim": 16}


def official_layout(outputs, head_layer):
  """Our outputs as the arrays that the golden files keep."""
  outputs = {name: np.asarray(x) for name, x in outputs.items()}
  kept = {f"logits_sup_sel{head_layer}": outputs["logits"]}
  for name in ENDPOINTS:
    x = outputs[name]
    kept[f"{name}/mean"], kept[f"{name}/std"] = x.mean(), x.std()
    kept[f"{name}/absmax"] = np.abs(x).max()
    kept[f"{name}/map"] = x[0, :, :, : 1 if name == "initial_conv" else 2]
    kept[f"{name}/pixel"] = x[-1, x.shape[1] // 2, x.shape[2] // 2]
  kept["final_avg_pool"] = outputs["h"]
  for k in (1, 2, 3):
    kept[f"proj_hidden_{k}"] = outputs[f"head_{k}"]
  return kept


def assert_golden(got, want, tolerance, only=None):
  for name in only or got:
    if name in want:
      x, y = got[name], want[name]
      x = x[..., : y.shape[-1]] if y.ndim else x  # some keep the first columns
      np.testing.assert_allclose(
        x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=name
      )


def golden_case(names, side, batch, arch, *, dtype, tame=False):
  variables = convert.from_tensorflow(
    det.weights(names, tame=tame, dtype=dtype), **arch
  )
  name = f"resnet/input_{side}x{side}_b{batch}"
  return variables, det.array(name, (batch, side, side, 3), "uniform", dtype)


def check_inference(golden, names, numbers, arch, *, dtype, head_layer, **case):
  names = golden(names) if isinstance(names, str) else names
  numbers = golden(numbers) if isinstance(numbers, str) else numbers
  variables, images = golden_case(names, arch=arch, dtype=dtype, **case)
  model = models.make_model(
    **arch, num_classes=1000, head_layer=head_layer, dtype=dtype, conv="xla"
  )
  outputs = jax.jit(functools.partial(model.apply, endpoints=True))(
    variables, images
  )
  wide = np.dtype(dtype)
  assert all(x.dtype == wide for x in outputs.values())
  np.testing.assert_array_equal(outputs["z"], outputs["head_3"])
  np.testing.assert_array_equal(outputs["h"], outputs["head_0"])
  got = official_layout(outputs, head_layer)
  with np.load(numbers) as want:
    assert len(set(got) & set(want)) == 35
    # TensorFlow's own float32 is 7e-7 from its float64 in these cases.
    assert_golden(got, want, 1e-6 if dtype == np.float64 else 1e-4)


def test_r18_inference_float64(golden, x64):
  check_inference(
    golden,
    "names_r18.json",
    "model_r18_eval.npz",
    R18,
    side=32,
    batch=2,
    dtype=np.float64,
    head_layer=0,
  )


def test_r18_inference_float32(golden):
  check_inference(
    golden,
    "names_r18.json",
    "model_r18_eval.npz",
    R18,
    side=32,
    batch=2,
    dtype=np.float32,
    head_layer=1,
  )


@pytest.mark.parametrize(
  "name, side, arch", [("r50", 72, R50), ("r50_sk", 64, SK50)]
)
def test_r50_inference(golden, x64, name, side, arch):
  """72 pixels make odd maps, where a padding mistake shows."""
  check_inference(
    golden,
    f"names_{name}.json",
    f"model_{name}_eval.npz",
    arch,
    side=side,
    batch=2,
    tame=True,
    dtype=np.float64,
    head_layer=1,
  )


@pytest.mark.slow
def test_r50_inference_from_reference_data(golden, shared, x64):
  check_inference(
    golden,
    "names_r50.json",
    shared / "golden" / "c_r50_1x_sk0_i64_b2_eval_plain.npz",
    R50,
    side=64,
    batch=2,
    dtype=np.float64,
    head_layer=0,
  )


def test_r18_training_moves_the_averages(golden, x64):
  variables, images = golden_case(
    golden("names_r18.json"), 32, 8, R18, dtype=np.float64
  )
  model = models.make_model(
    **R18, num_classes=1000, head_layer=0, dtype=np.float64, conv="xla"
  )
  outputs, updated = jax.jit(
    functools.partial(
      model.apply, train=True, endpoints=True, mutable=["batch_stats"]
    )
  )(variables, images)
  with np.load(golden("model_r18_train.npz")) as want:
    assert_golden(official_layout(outputs, 0), want, 1e-6)
    moved = tensorflow_values(updated)
    names = [name for name in want if name.startswith("bn_after/")]
    assert len(names) == 10
    for name in names:
      np.testing.assert_allclose(
        moved[name.removeprefix("bn_after/")], want[name], rtol=1e-6, atol=1e-7
      )
    np.testing.assert_allclose(
      [np.linalg.norm(x) for n, x in moved.items() if "/moving_" in n],
      want["bn_after_norms"],
      rtol=1e-6,
    )


def tensorflow_values(variables, names=None):
  """TF1 name -> value, in the official order of creation, of what is there."""
  names = names or tf_names.paths(depth=18, sk_ratio=0.0, stem="cifar")
  values = {}
  for name, path in names.items():
    node = variables
    for key in path:
      node = node.get(key) if isinstance(node, dict) else None
    if node is not None:
      values[name] = np.asarray(node)
  return values


@pytest.fixture
def golden_finetuning(golden):
  variables = convert.from_tensorflow(
    {
      # The classifier of this case has 10 classes rather than 1000.
      name: det.array(name, (512, 10), "kernel", np.float64)
      if x.shape == (512, 1000)
      else det.array(name, (10,), "bias", np.float64)
      if x.shape == (1000,)
      else x
      for name, x in det.weights(
        golden("names_r18.json"), dtype=np.float64
      ).items()
    },
    **R18,
  )
  images = det.array(
    "trainstep/input_finetune", (16, 32, 32, 3), "blocks", np.float64
  )
  labels = np.eye(10)[(3 * np.arange(16)) % 10]
  return variables, images, labels


@pytest.mark.slow
def test_official_finetuning_for_three_steps(golden, x64, golden_finetuning):
  """Gradients, parameters, momentum and moving averages of f_trainstep_*."""
  variables, images, labels = golden_finetuning
  model = models.make_model(
    **R18, num_classes=10, head_layer=1, dtype=np.float64, conv="xla"
  )
  mask = models.trainable(
    variables["params"], head_layer=1, train_head_layer=False
  )
  schedule = optimizers.learning_rate_schedule(
    learning_rate=3.2,
    batch_size=16,
    scaling="linear",
    warmup_steps=2,
    num_steps=10,
  )
  tx = optimizers.make_optimizer(
    "lars", learning_rate=schedule, weight_decay=1e-4, trainable=mask
  )

  def loss_fn(params, stats):
    outputs, updated = model.apply(
      {"params": params, "batch_stats": stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    loss = optax.softmax_cross_entropy(outputs["logits"], labels).mean()
    return loss, updated["batch_stats"]

  @jax.jit
  def step(params, stats, opt_state):
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, stats
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state, loss, grads

  params, stats = variables["params"], variables["batch_stats"]
  opt_state = tx.init(params)
  with np.load(golden("model_finetune_step.npz")) as want:
    want = dict(want)
  for t in range(3):
    params, stats, opt_state, loss, grads = step(params, stats, opt_state)
    moving = tensorflow_values({"batch_stats": stats})
    got = {
      "moving_norm": norms(moving.values()),
      **summary("param", tensorflow_values({"params": params})),
    }
    assert_golden({f"step{t}/{name}": x for name, x in got.items()}, want, 1e-6)
    kernel = params["classifier"]["kernel"]
    decay = 0.5 * 1e-4 * float(jnp.sum(kernel**2))
    assert loss == pytest.approx(want[f"step{t}/loss"], rel=1e-3 + decay)
    if t == 0:
      slopes = tensorflow_values({"params": grads})
      none = want["grad0/is_none"]
      # The official gradient includes the decay that the optimizer adds here.
      name = "head_supervised/linear_layer/dense/kernel"
      first = tensorflow_values(variables)[name]
      slopes[name] = slopes[name] + 1e-4 * first
      for name, x in summary("grad", slopes).items():
        golden_name = f"grad0/{name.removeprefix('grad_')}"
        np.testing.assert_allclose(
          x[~none],
          want[golden_name][~none],
          atol=1e-6 * np.abs(want[golden_name]).max(),
        )
        assert not x[none].any()
  unchanged = jax.tree.map(
    lambda a, b: bool((a == b).all()), variables["params"], params
  )
  assert jax.tree.leaves(unchanged) == [not x for x in jax.tree.leaves(mask)]


def norms(values):
  return np.array([np.linalg.norm(x) for x in values])


def summary(prefix, values):
  return {
    f"{prefix}_norm": norms(values.values()),
    f"{prefix}_first4": np.stack([x.ravel()[:4] for x in values.values()]),
  }


@pytest.fixture(scope="module")
def tiny_shapes():
  def build(channels=3, side=16, dtype=jnp.float32, **options):
    model = models.make_model(**(TINY | options), dtype=dtype, conv="xla")
    wide = jnp.promote_types(dtype, jnp.float32)
    images = jax.ShapeDtypeStruct((2, side, side, channels), wide)
    return model, jax.eval_shape(model.init, jax.random.key(0), images), images

  return build


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_heads(tiny_shapes, num_layers):
  model, variables, images = tiny_shapes(
    num_layers=num_layers, num_classes=5, head_layer=0
  )
  outputs = jax.eval_shape(model.apply, variables, images)
  want = {"h": (2, 64), "logits": (2, 5)}
  want |= {f"head_{k}": (2, 64) for k in range(num_layers)}
  want |= {f"head_{num_layers}": (2, 16 if num_layers else 64)}
  want |= {"z": want[f"head_{num_layers}"]}
  assert {name: x.shape for name, x in outputs.items()} == want
  params = variables["params"]
  assert ("projection_head" in params) == (num_layers > 0)
  head = params.get("projection_head", {})
  leaves = {name: sorted(head[name]) for name in head}
  assert leaves == {
    **{f"dense_{k}": ["kernel"] for k in range(1, num_layers + 1)},
    **{f"bn_{k}": ["bias", "scale"] for k in range(1, num_layers)},
    **({f"bn_{num_layers}": ["scale"]} if num_layers else {}),
  }


def test_a_wider_head(tiny_shapes):
  model, variables, images = tiny_shapes(num_layers=3, head_width=1.5)
  outputs = jax.eval_shape(model.apply, variables, images)
  shapes = {name: x.shape for name, x in outputs.items()}
  assert shapes == {
    "h": (2, 64),
    "head_0": (2, 64),
    "head_1": (2, 96),
    "head_2": (2, 96),
    "head_3": (2, 16),
    "z": (2, 16),
  }


@pytest.mark.parametrize(
  "width, count", [(1, 8_659_072), (2, 34_095_232), (3, 76_308_608)]
)
def test_head_parameter_count(width, count):
  model = models.ProjectionHead(num_layers=3, dim=128)
  h = jax.ShapeDtypeStruct((2, 2048 * width), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), h)["params"]
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
  "dtype, wide", [("bfloat16", "float32"), ("float32", "float32")]
)
def test_dtypes(tiny_shapes, dtype, wide):
  model, variables, images = tiny_shapes(num_classes=5, dtype=jnp.dtype(dtype))
  outputs = jax.eval_shape(model.apply, variables, images)
  for leaf in [*jax.tree.leaves(variables), *outputs.values()]:
    assert leaf.dtype == jnp.dtype(wide)


def test_flax_initial_values(tiny_shapes):
  model, _, images = tiny_shapes(num_classes=500)

  @jax.jit  # XLA drops what is not returned
  def init(key):
    params = model.init(key, jnp.zeros(images.shape))["params"]
    return params["projection_head"]["dense_1"], params["classifier"]

  dense, classifier = init(jax.random.key(0))
  assert np.std(classifier["kernel"]) == pytest.approx(0.01, rel=0.02)
  assert not classifier["bias"].any()
  assert np.std(dense["kernel"]) == pytest.approx(0.01, rel=0.05)


def test_zero_initial_classifier(tiny_shapes):
  model, _, images = tiny_shapes(num_classes=5, zero_init_classifier=True)
  classifier = jax.jit(
    lambda key: model.init(key, jnp.zeros(images.shape))["params"]["classifier"]
  )(jax.random.key(0))
  assert not classifier["kernel"].any() and not classifier["bias"].any()


@pytest.mark.parametrize(
  "arch",
  [
    {"width": 0.5, "num_classes": 500},
    {"num_classes": 500, "zero_init_classifier": True},
    {"depth": 50, "sk_ratio": 0.0625, "stem": "imagenet", "side": 32},
  ],
)
def test_init_has_the_law_of_flax(tiny_shapes, arch):
  model, shapes, images = tiny_shapes(**arch)

  def without_kernels(tree):
    flat = flatten_dict(tree)
    return {path: x for path, x in flat.items() if path[-1] != "kernel"}

  got = models.init(model, jax.random.key(0), images)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes
  )
  constants = jax.jit(
    lambda key: without_kernels(model.init(key, jnp.zeros(images.shape)))
  )(jax.random.key(0))
  for path, want in constants.items():
    np.testing.assert_array_equal(flatten_dict(got)[path], want, str(path))
  scaled = []
  for path, x in flatten_dict(got["params"]).items():
    if path[-1] == "kernel" and path[0] == "encoder":
      scaled.append(x.ravel() * np.sqrt(np.prod(x.shape[:-1])))
    elif path[-1] == "kernel":
      is_zero = path[0] == "classifier" and "zero_init_classifier" in arch
      assert x.std() == pytest.approx(0 if is_zero else 0.01, rel=0.1)
  scaled = np.concatenate(scaled)
  assert scaled.std() == pytest.approx(1, abs=0.01)
  assert scaled.mean() == pytest.approx(0, abs=0.01)
  assert 2.26 < np.abs(scaled).max() <= 2.2738


def test_init_depends_on_key_and_path_alone(tiny_shapes):
  model, _, images = tiny_shapes()
  first = models.init(model, jax.random.key(0), images)
  other = models.init(model, jax.random.key(1), images)
  with_classes = models.init(
    tiny_shapes(num_classes=5)[0], jax.random.key(0), images
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    first["params"]["encoder"],
    with_classes["params"]["encoder"],
  )
  kernels = [
    tree["params"]["encoder"]["block_group4"][block]["conv_2"]["kernel"]
    for tree, block in (
      (first, "block_0"),
      (first, "block_1"),
      (other, "block_0"),
    )
  ]
  for a, b in itertools.combinations(kernels, 2):
    assert (a != b).mean() > 0.99


@pytest.mark.parametrize("probe", [False, True])
def test_probe_does_not_reach_the_network(tiny_shapes, probe):
  model, shapes, images = tiny_shapes(num_classes=5, probe=probe)

  def loss(params, variables, images):
    outputs = model.apply(variables | {"params": params}, images)
    return jnp.sum(outputs["logits"] ** 2)

  def num_products(function):
    text = str(jax.make_jaxpr(function)(shapes["params"], shapes, images))
    # Products that are unused are still written down.
    return text.count("conv_general_dilated["), text.count("dot_general[")

  convolutions, products = num_products(loss)
  with_gradient = num_products(jax.grad(loss))
  if probe:
    assert with_gradient == (convolutions, products + 1)
  else:
    assert with_gradient == (3 * convolutions - 1, products + 4)


def test_linear_evaluation_freezes_encoder_and_head(tiny_shapes):
  model, shapes, images = tiny_shapes(num_classes=5, freeze_after_block=4)
  variables = det.variables(shapes)
  images = np.random.default_rng(0).random(images.shape, np.float32)

  @jax.jit
  def step(params):
    def loss(params):
      outputs, updated = model.apply(
        variables | {"params": params},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      return jnp.sum(outputs["logits"] ** 2), updated

    return jax.grad(loss, has_aux=True)(params)

  grads, updated = step(variables["params"])
  jax.tree.map(
    np.testing.assert_array_equal,
    updated["batch_stats"],
    variables["batch_stats"],
  )
  mask = models.trainable(variables["params"], freeze_after_block=4)
  nonzero = jax.tree.map(lambda x: bool(x.any()), grads)
  assert nonzero == mask
  assert mask["classifier"] == {"kernel": True, "bias": True}


@pytest.mark.parametrize("last_frozen", [-1, 0, 2, 4])
@pytest.mark.parametrize("head_layer", [0, 1, 3])
@pytest.mark.parametrize("train_head_layer", [True, False])
def test_trainable(tiny_shapes, last_frozen, head_layer, train_head_layer):
  params = tiny_shapes(num_classes=5)[1]["params"]
  mask = models.trainable(
    params,
    freeze_after_block=last_frozen,
    head_layer=head_layer,
    train_head_layer=train_head_layer,
  )
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  groups = ["stem", *(f"block_group{k}" for k in range(1, 5))]
  for k, group in enumerate(groups):
    assert set(jax.tree.leaves(mask["encoder"][group])) == {k > last_frozen}
  for layer, sub in mask["projection_head"].items():
    k = int(layer[-1])
    trains = k <= head_layer and train_head_layer and last_frozen < 4
    assert set(jax.tree.leaves(sub)) == {trains}
  assert all(jax.tree.leaves(mask["classifier"]))


def test_choice_of_convolution():
  def chosen(conv):
    return models.make_model(**TINY, conv=conv).encoder.conv_general_dilated

  assert chosen("xla") is jax.lax.conv_general_dilated
  assert chosen("cpu") is cpu_conv.conv_general_dilated
  assert chosen("auto") is cpu_conv.conv_general_dilated  # tests run on CPUs


@pytest.mark.slow
def test_convolutions_agree(tiny_shapes, x64):
  images = np.random.default_rng(0).random((4, 16, 16, 3))
  got = []
  for conv in ("xla", "cpu"):
    model = models.make_model(**TINY, dtype=jnp.float64, conv=conv)
    variables = det.variables(
      jax.eval_shape(model.init, jax.random.key(0), images)
    )

    def loss(params, model=model, variables=variables):
      outputs, updated = model.apply(
        variables | {"params": params},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      return jnp.sum(outputs["z"] ** 3), (outputs, updated)

    got.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))

  def close(a, b):
    scale = np.abs(a).max()
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * scale)

  jax.tree.map(close, *got)


def bfloat16_and_float32(transform, *, num):
  """A step's loss from random weights, transformed, in both precisions."""
  images = np.random.default_rng(0).random((num, 4, 4, 3), np.float32)
  images = images.repeat(4, 1).repeat(4, 2)
  noise = np.random.default_rng(1).normal(size=(2, *images.shape)) * 0.1
  views = np.clip(images + noise, 0, 1).reshape(2 * num, 16, 16, 3)
  views = views.astype(np.float32)
  for dtype in (jnp.bfloat16, jnp.float32):
    model = models.make_model(
      **(TINY | {"width": 0.25}), dtype=dtype, conv="xla"
    )
    variables = models.init(model, jax.random.key(0), views)

    def loss(params, views, model=model, variables=variables):
      outputs, _ = model.apply(
        variables | {"params": params},
        views,
        train=True,
        mutable=["batch_stats"],
      )
      z1, z2 = jnp.split(outputs["z"], 2)
      return losses.nt_xent(z1, z2, temperature=0.5)[0]

    yield jax.jit(transform(loss))(variables["params"], views)


def test_bfloat16_loss_is_near_float32():
  low, full = bfloat16_and_float32(lambda loss: loss, num=8)
  assert 0 < abs(low - full) < 0.01 * full


@pytest.mark.slow
def test_bfloat16_gradient_is_near_float32():
  low, full = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])
    for grads in bfloat16_and_float32(jax.grad, num=64)
  )
  assert low @ full / np.linalg.norm(low) / np.linalg.norm(full) > 0.99


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"depth": 19}, "model.depth: got 19"),
    ({"stem": "auto"}, 'model.stem: got "auto"'),
    ({"sk_ratio": 0.0625}, "need bottleneck blocks"),
    ({"num_layers": -1}, "head.num_layers and head.dim: got -1 and 16"),
    ({"head_width": 0.0}, "head.width: got 0.0, must be above 0"),
    ({"dim": 0}, "head.num_layers and head.dim: got 3 and 0"),
    ({"num_classes": 0}, "num_classes: got 0"),
    ({"num_classes": 5, "head_layer": 4}, "head_layer: got 4, but .* 3 layers"),
    ({"num_classes": 5, "head_layer": -1}, "head_layer: got -1"),
    ({"num_classes": 5, "num_layers": 0}, "head_layer: got 1, but .* 0 layers"),
    ({"freeze_after_block": 5}, "freeze_after_block: got 5"),
    ({"bn_group_size": -1}, "bn_group_size: got -1"),
    ({"conv": "tpu"}, 'conv: got "tpu"'),
  ],
)
def test_wrong_options(wrong, message):
  with pytest.raises(UserError, match=message) as error:
    models.make_model(**(TINY | wrong))
  assert "\n" not in str(error.value)


def test_images_must_be_float(tiny_shapes):
  model, variables, images = tiny_shapes()
  wrong = jax.ShapeDtypeStruct(images.shape, jnp.uint8)
  with pytest.raises(UserError, match="got uint8 of shape"):
    jax.eval_shape(model.apply, variables, wrong)
