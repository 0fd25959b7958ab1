"""SimCLR = ResNet + projection head + classifier, one tree for every stage.

The tree of variables is {"params": {"encoder", "projection_head",
"classifier"}, "batch_stats": {"encoder", "projection_head"}}; a network
without classes has no "classifier", one without a head no "projection_head".
Layer k of the head is "dense_k" and "bn_k", counted from 1 like "head_k".
"""

import concurrent.futures
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import cpu_conv, gpu_conv, layers, resnet
from simclr_jax.config import UserError


class ProjectionHead(nn.Module):
  """h [n, C] to the list [h, head_1, .., head_k] (`model_util.py`).

  Every layer is dense without bias, then BatchNorm; hidden layers have `width`
  times C units (official: C) and end in ReLU, the last has `dim` outputs, no
  beta and no ReLU.
  """

  num_layers: int
  dim: int
  width: float = 1.0
  freeze: bool = False
  dtype: Any = jnp.float32
  axis_name: str | None = None
  bn_group_size: int = 0

  @nn.compact
  def __call__(self, h, *, train=False):
    norm = layers.batch_norm(
      train=train and not self.freeze,
      dtype=self.dtype,
      axis_name=self.axis_name,
      group_size=self.bn_group_size,
      initializing=self.is_initializing(),
    )
    outputs = [h]
    for k in range(1, self.num_layers + 1):
      is_last = k == self.num_layers
      x = nn.Dense(
        self.dim if is_last else max(round(self.width * h.shape[-1]), 1),
        use_bias=False,
        kernel_init=nn.initializers.normal(0.01),
        dtype=self.dtype,
        param_dtype=self.dtype,
        name=f"dense_{k}",
      )(outputs[-1])
      norm_fn = norm(use_bias=not is_last, name=f"bn_{k}")
      outputs.append(norm_fn(x, relu=not is_last))
    return outputs


class SimCLR(nn.Module):
  """The network of all three stages; build it with `make_model`."""

  encoder: resnet.ResNet
  projection_head: ProjectionHead | None
  classifier: nn.Dense | None
  head_layer: int
  detach_classifier: bool  # no gradient from the classifier into the network

  def __call__(self, images, train: bool = False, endpoints: bool = False):
    if not jnp.issubdtype(images.dtype, jnp.floating) or images.ndim != 4:
      raise UserError(
        f"images: got {images.dtype} of shape {images.shape}, expected float "
        "[n, H, W, C] in [0, 1]"
      )
    features = self.encoder(images, train=train)
    h = features.pop("h")
    hidden = [h]
    if self.projection_head is not None:
      hidden = self.projection_head(h, train=train)
    outputs = {"h": h, "z": hidden[-1]}
    outputs |= {f"head_{k}": x for k, x in enumerate(hidden)}
    if self.classifier is not None:
      x = hidden[self.head_layer]
      if self.detach_classifier:
        x = jax.lax.stop_gradient(x)
      outputs["logits"] = self.classifier(x)
    return outputs | features if endpoints else outputs


def _conv_fn(conv: str) -> Callable[..., Any]:
  """The convolution to use: XLA's, or this package's own."""
  functions = {
    "cpu": cpu_conv.conv_general_dilated,
    "gpu": gpu_conv.conv_general_dilated,
    "xla": jax.lax.conv_general_dilated,
  }
  if conv == "auto":
    conv = jax.default_backend()
    return functions.get(conv, functions["xla"])
  if conv not in functions:
    names = ", ".join(f'"{name}"' for name in ("auto", *functions))
    raise UserError(f'conv: got "{conv}", allowed are {names}')
  return functions[conv]


def make_model(
  *,
  depth: int,
  stem: str,
  width: float = 1,
  sk_ratio: float = 0.0,
  num_layers: int = 3,
  dim: int = 128,
  head_width: float = 1.0,
  num_classes: int | None = None,
  head_layer: int = 1,
  probe: bool = False,
  zero_init_classifier: bool = False,
  freeze_after_block: int = -1,
  dtype: Any = jnp.float32,
  axis_name: str | None = None,
  bn_group_size: int = 0,
  pool_padding: str = "same",
  remat: bool = False,
  conv: str = "auto",
) -> SimCLR:
  """Builds the network; nothing is computed before `init` or `apply`.

  `model.apply(variables, images, train=False, endpoints=False)` takes float
  images [n, H, W, C] in [0, 1] with any C and returns a dict: "h" [n, F],
  "head_0" (= h) .. "head_k" [n, G] after BatchNorm and ReLU, "z" [n, dim] (the
  last of them) and, with num_classes, "logits" [n, num_classes]. All have type
  promote_types(dtype, float32). With endpoints=True also the maps named in
  `resnet.ResNet`. Training: pass mutable=["batch_stats"]. Gradients are of
  reverse mode; jvp, jacfwd and hessian need conv="xla", stem="cifar" and
  train=False.

  Every head layer is built and computed whatever `head_layer` is, as in the
  official graph: one tree of variables then fits all stages, and the moving
  averages of unused layers move as they do there.

  Args:
    depth: 18, 34, 50, 101, 152 or 200.
    stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3; official for
      images up to 32 pixels).
    width: multiplies every channel count; fractions too, such as 0.25.
    sk_ratio: selective kernels; 0 is none, 0.0625 the paper's.
    num_layers: of the projection head; 0 is no head (z = h), 1 a linear one.
    dim: of z.
    head_width: units of the head's hidden layers over features of h, G / F.
    num_classes: of the classifier; None is no classifier.
    head_layer: which of head_0 .. head_k the classifier sits on.
    probe: no gradient from the classifier into the network (the linear probe
      that trains beside pretraining).
    zero_init_classifier: logits start at 0 rather than from N(0, 0.01).
    freeze_after_block: -1 none, 0 the stem, 1 to 4 also the groups up to
      there, 4 everything but the classifier. What is frozen runs BatchNorm in
      inference mode and gets a gradient of exact zeros.
    dtype: of the encoder's arithmetic. Parameters and moments are float32, or
      float64 where dtype is.
    axis_name: of the mapped axis whose batch BatchNorm normalizes as one.
    bn_group_size: devices that share moments; 0 is all of them.
    pool_padding: of the max-pool: "same" (official, TensorFlow's rule) or
      "torch" (one on each side).
    remat: recompute every residual block in the backward pass.
    conv: "xla", "cpu" (`cpu_conv.py`), "gpu" (`gpu_conv.py`) or "auto", which
      is the device's own where there is one.

  Raises:
    UserError: for a network that does not exist.

  >>> model = make_model(depth=18, stem="cifar", width=0.25, num_classes=10)
  >>> images = jnp.zeros((2, 32, 32, 3))
  >>> variables = init(model, jax.random.key(0), images)
  >>> outputs = jax.eval_shape(model.apply, variables, images)
  >>> outputs["h"].shape, outputs["z"].shape, outputs["logits"].shape
  ((2, 128), (2, 128), (2, 10))
  """
  resnet.check_architecture(
    depth=depth,
    width=width,
    sk_ratio=sk_ratio,
    stem=stem,
    pool_padding=pool_padding,
  )
  counts = {"head.num_layers": num_layers, "head.dim": dim}
  for name, value in (counts | {"num_classes": num_classes or 1}).items():
    if not hasattr(value, "__index__"):
      raise UserError(f"{name}: got {value!r}, must be an int")
  if not jnp.issubdtype(dtype, jnp.floating):
    raise UserError(f"dtype: got {jnp.dtype(dtype)}, must be a float's")
  if num_layers < 0 or dim < 1:
    raise UserError(
      f"head.num_layers and head.dim: got {num_layers} and {dim}, must be at "
      "least 0 and 1"
    )
  if not head_width > 0:
    raise UserError(f"head.width: got {head_width}, must be above 0")
  if num_classes is not None and num_classes < 1:
    raise UserError(f"num_classes: got {num_classes}, must be at least 1")
  if num_classes is not None and not 0 <= head_layer <= num_layers:
    raise UserError(
      f"head_layer: got {head_layer}, but the projection head has "
      f"{num_layers} layers; allowed are 0 (h, before the head) to {num_layers}"
    )
  if freeze_after_block not in range(-1, 5):
    raise UserError(
      f"freeze_after_block: got {freeze_after_block}, allowed are -1 (nothing "
      "is frozen) to 4 (only the classifier trains)"
    )
  if bn_group_size < 0:
    raise UserError(f"bn_group_size: got {bn_group_size}, must be 0 or above")
  # The head and the classifier cost nothing beside the encoder, and their
  # outputs feed a loss: they compute in float32 where the encoder does not.
  wide = jnp.promote_types(dtype, jnp.float32)
  is_frozen = freeze_after_block == 4
  batch = {"axis_name": axis_name, "bn_group_size": bn_group_size}
  encoder = resnet.ResNet(
    depth=depth,
    stem=stem,
    width=width,
    sk_ratio=sk_ratio,
    pool_padding=pool_padding,
    freeze_after_block=freeze_after_block,
    remat=remat,
    dtype=dtype,
    conv_general_dilated=_conv_fn(conv),
    **batch,
  )
  head = ProjectionHead(
    num_layers, dim, head_width, freeze=is_frozen, dtype=wide, **batch
  )
  zeros, normal = nn.initializers.zeros, nn.initializers.normal(0.01)
  classifier = nn.Dense(
    num_classes or 0,
    kernel_init=zeros if zero_init_classifier else normal,
    dtype=wide,
    param_dtype=wide,
  )
  return SimCLR(
    encoder=encoder,
    projection_head=head if num_layers else None,
    classifier=classifier if num_classes is not None else None,
    head_layer=head_layer,
    detach_classifier=probe or is_frozen,
  )


def init(model: SimCLR, key, images) -> dict:
  """Random variables as NumPy arrays: the law of `model.init`, no compiling.

  XLA takes more than a second on two CPU cores to compile one random draw, and
  `model.init` has one for each of 25 to 260 kernels, so these are drawn by
  NumPy from (key, path): a variable's value depends on no other's.

  Args:
    model: from `make_model`.
    key: a typed key.
    images: float [n, H, W, C] or its ShapeDtypeStruct; only C matters.

  >>> model = make_model(depth=18, stem="cifar", width=0.125)
  >>> variables = init(model, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  >>> variables["params"]["encoder"]["stem"]["conv_1"]["kernel"].shape
  (3, 3, 3, 8)
  """
  shapes = jax.eval_shape(model.init, key, images)
  seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
  is_bottleneck = resnet.DEPTHS[model.encoder.depth][1]
  last_norm = "bn_3" if is_bottleneck else "bn_2"

  def draw(path, leaf):
    names = [part.key for part in path]
    name = "/".join(names)
    rng = np.random.default_rng([*seed, zlib.crc32(name.encode())])
    if names[-1] == "kernel":
      x = rng.standard_normal(leaf.shape)
      if names[1] == "encoder":
        far = np.flatnonzero(np.abs(x) > 2)  # a normal law cut at 2
        while far.size:
          again = rng.standard_normal(far.size)
          x.flat[far] = again
          far = far[np.abs(again) > 2]
        # 0.8796 is the standard deviation that the cut leaves.
        x /= 0.87962566103423978 * np.sqrt(np.prod(leaf.shape[:-1]))
      else:
        is_zero = names[1] == "classifier" and (
          model.classifier.kernel_init is nn.initializers.zeros
        )
        x = np.zeros(leaf.shape) if is_zero else 0.01 * x
    elif names[-1] in ("scale", "var"):
      ends_block = names[-2] == last_norm and names[2] != "stem"
      is_zero = names[1] == "encoder" and ends_block and names[-1] == "scale"
      x = np.zeros(leaf.shape) if is_zero else np.ones(leaf.shape)
    else:
      x = np.zeros(leaf.shape)
    return x.astype(leaf.dtype)

  leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return structure.unflatten(pool.map(lambda leaf: draw(*leaf), leaves))


def trainable(
  params,
  *,
  freeze_after_block: int = -1,
  train_head_layer: bool = True,
  head_layer: int = 1,
):
  """Which parameters train when a classifier is: a tree of bools like params.

  The stem and the groups up to `freeze_after_block` do not (4: neither does
  any of the head), head layers above `head_layer` never do, as no gradient
  reaches them, and those up to it only with `train_head_layer` (the official
  TF2 code; its TF1 code reuses them as they are). The classifier does.

  >>> params = {"encoder": {"stem": 0}, "classifier": {"kernel": 0}}
  >>> trainable(params, freeze_after_block=4)  # linear evaluation
  {'classifier': {'kernel': True}, 'encoder': {'stem': False}}
  """

  def trains(path, _):
    top, layer = path[0].key, path[1].key
    if top == "encoder":
      group = 0 if layer == "stem" else int(layer.removeprefix("block_group"))
      return group > freeze_after_block
    if top == "projection_head":
      reused = int(layer.rsplit("_", 1)[1]) <= head_layer
      return reused and train_head_layer and freeze_after_block < 4
    return True

  return jax.tree_util.tree_map_with_path(trains, params)
