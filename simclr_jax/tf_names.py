"""The names of official TensorFlow variables, and where they belong here.

Both official codes number the encoder's layers in their order of construction,
one count for convolutions and one for BatchNorms, with the shortcut of a block
before its main path. TF2 checkpoints have object paths instead, which sort into
the same order. Kernels are laid out as here: nothing is transposed.
"""

import itertools
import re

import numpy as np

from simclr_jax import resnet
from simclr_jax.config import UserError

# Leaves: official name -> (collection, ours).
_BATCH_NORM = {
  "gamma": ("params", "scale"),
  "beta": ("params", "bias"),
  "moving_mean": ("batch_stats", "mean"),
  "moving_variance": ("batch_stats", "var"),
}
_EMA = "ema_model/"
_OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"
# Optimizer slots, counters, the memory bank of the paper's runs, TF2's graph.
_NOT_THE_NETWORK = (
  r"/(Momentum|Adam(_1)?)$|^beta\d_power$|\.OPTIMIZER_SLOT|(^|/)optimizer/"
  r"|(^|/)memory(_\w+)?(/|$)|^global_step|^save_counter"
  r"|^_CHECKPOINTABLE_OBJECT_GRAPH$"
)
# Where object paths would not sort into the order of construction.
_RANKS = {
  "initial_conv_relu_max_pool": 0,
  "block_groups": 1,
  "projection_layers": 0,  # the shortcut of bottleneck blocks
  "shortcut_layers": 0,  # and of basic blocks
  "conv_relu_dropblock_layers": 1,
  "conv2d_bn_layers": 1,
  "conv2d_fixed_padding": 0,  # from here on inside a selective kernel
  "batch_norm_relu": 1,
  "conv2d_0": 2,
  "batch_norm_relu_1": 3,
  "conv2d_1": 4,
}


def _numbered(kind, number):
  return f"base_model/{kind}_{number}" if number else f"base_model/{kind}"


def natural(name):
  """A sort key that puts conv2d_2 before conv2d_10."""
  return [
    (part.isdigit(), int(part) if part.isdigit() else part)
    for part in re.split(r"(\d+)", name)
  ]


def _encoder_layers(depth, sk_ratio, stem):
  """Paths of all convolutions and BatchNorms in the order of construction."""
  blocks, is_bottleneck = resnet.DEPTHS[depth]
  for i in range(1, 4 if sk_ratio > 0 and stem == "imagenet" else 2):
    yield from (("stem", f"conv_{i}"), ("stem", f"bn_{i}"))
  main = "conv_1 bn_1 conv_2 bn_2"
  if is_bottleneck:
    main += " gate_conv_1 gate_bn gate_conv_2" if sk_ratio > 0 else ""
    main += " conv_3 bn_3"
  for group, num_blocks in enumerate(blocks, start=1):
    for i in range(num_blocks):
      shortcut = "shortcut_conv shortcut_bn " if i == 0 else ""
      for layer in (shortcut + main).split():
        yield f"block_group{group}", f"block_{i}", layer


def paths(
  *,
  depth: int,
  sk_ratio: float,
  stem: str,
  num_layers: int = 3,
  has_classifier: bool = True,
) -> dict[str, tuple[str, ...]]:
  """TF1 name -> path such as ("params", "encoder", "stem", "conv_1", "kernel").

  In the order in which `resnet.py` and `model_util.py` create them.
  """
  names = {}

  def add(name, path, leaves):
    for leaf in leaves:
      collection, ours = _BATCH_NORM.get(leaf, ("params", leaf))
      names[f"{name}/{leaf}"] = (collection, *path, ours)

  counts = {"conv2d": 0, "batch_normalization": 0}
  for path in _encoder_layers(depth, sk_ratio, stem):
    kind = "conv2d" if "conv" in path[-1] else "batch_normalization"
    leaves = ["kernel"] if kind == "conv2d" else _BATCH_NORM
    add(_numbered(kind, counts[kind]), ("encoder", *path), leaves)
    counts[kind] += 1
  for k in range(1, num_layers + 1):
    layer, head = f"head_contrastive/nl_{k - 1}", "projection_head"
    leaves = [leaf for leaf in _BATCH_NORM if k < num_layers or leaf != "beta"]
    add(f"{layer}/dense", (head, f"dense_{k}"), ["kernel"])
    add(f"{layer}/batch_normalization", (head, f"bn_{k}"), leaves)
  if has_classifier:
    layer = "head_supervised/linear_layer/dense"
    add(layer, ("classifier",), ["kernel", "bias"])
  return names


def _from_object_paths(variables):
  """Gives the variables of a TF2 checkpoint their TF1 names."""
  encoder, named = {}, {}
  for name, value in variables.items():
    path = name.removesuffix(_OBJECT)
    if match := re.search(r"(?:^|/)resnet_model/(.+)/(\w+)$", path):
      encoder.setdefault(match[1], {})[match[2]] = value
      continue
    path = re.sub(r"^(.*/)?supervised_head/", "head_supervised/", path)
    path = re.sub(
      r"^(.*/)?_projection_head/linear_layers/", "head_contrastive/nl_", path
    )
    named[path.replace("/bn_relu/bn/", "/batch_normalization/")] = value

  def order(layer):
    return [
      int(part) if part.isdigit() else _RANKS.get(part, 0)
      for part in layer.split("/")
    ]

  counts = {"conv2d": 0, "batch_normalization": 0}
  for layer in sorted(encoder, key=order):
    kind = "conv2d" if "kernel" in encoder[layer] else "batch_normalization"
    for leaf, value in encoder[layer].items():
      named[f"{_numbered(kind, counts[kind])}/{leaf}"] = value
    counts[kind] += 1
  return named


def select(variables, *, ema: bool = False) -> tuple[dict, list[str]]:
  """Splits a checkpoint's variables into the network and what is not of it.

  Args:
    variables: TF1 names or TF2 object paths -> arrays.
    ema: take the averaged copy ("ema_model/...") rather than the last weights.

  Returns:
    (TF1 name -> array, sorted names left out: the optimizer's slots, counters,
    the memory bank, the copy that was not asked for).

  Raises:
    UserError: `ema`, but there is no averaged copy.
  """
  if ema and not any(name.startswith(_EMA) for name in variables):
    raise UserError(
      f'ema: the checkpoint has no averaged copy (no name starts with "{_EMA}")'
    )
  named, left_out = {}, []
  for name, value in variables.items():
    name = name.removesuffix(":0")
    if name.startswith(_EMA) != ema or re.search(_NOT_THE_NETWORK, name):
      left_out.append(name)
    else:
      name = name.removeprefix(_EMA)
      # A linear head is one layer without beta too, under another name.
      named[name.replace("head_contrastive/l_0/", "head_contrastive/nl_0/")] = (
        value
      )
  if any(name.endswith(_OBJECT) for name in named):
    named = _from_object_paths(named)
  return named, sorted(left_out, key=natural)


def architecture(named) -> dict:
  """Reads depth, width, sk_ratio and stem off TF1 names and shapes.

  Args:
    named: TF1 name -> array, as from `select`.

  Raises:
    UserError: this is no ResNet of SimCLR.
  """
  first = np.shape(named.get("base_model/conv2d/kernel"))
  num_convs = sum(
    bool(re.match(r"base_model/conv2d(_\d+)?/kernel$", name)) for name in named
  )
  for depth, sk_ratio, stem in itertools.product(
    resnet.DEPTHS, (0.0, 0.0625), resnet.STEMS
  ):
    layers = _encoder_layers(depth, sk_ratio, stem)
    is_resnet_d = sk_ratio > 0 and stem == "imagenet"
    kernel_size = 7 if stem == "imagenet" and not sk_ratio else 3
    if (
      sum("conv" in layer[-1] for layer in layers) == num_convs
      and len(first) == 4
      and first[0] == kernel_size
    ):
      width = first[-1] / (32 if is_resnet_d else 64)
      return dict(depth=depth, width=width, sk_ratio=sk_ratio, stem=stem)
  raise UserError(
    f"the TensorFlow variables ({len(named)} of them, {num_convs} called "
    "base_model/conv2d...) are not those of a SimCLR ResNet"
  )


def head(named) -> dict:
  """What `make_model` must be told besides the encoder's shape."""

  def size(name, axis):
    return np.shape(named[name])[axis] if name in named else None

  layers = [re.match(r"head_contrastive/nl_(\d+)/", name) for name in named]
  num_layers = max((int(layer[1]) + 1 for layer in layers if layer), default=0)
  dim = size(f"head_contrastive/nl_{num_layers - 1}/dense/kernel", -1) or 128
  classifier = "head_supervised/linear_layer/dense/kernel"
  # Every layer that a classifier may sit on is as wide as h, except the head's
  # output.
  on_output = num_layers and size(classifier, 0) == dim
  return {
    "num_layers": num_layers,
    "dim": dim,
    "num_classes": size(classifier, -1),
    "head_layer": num_layers if on_output else 0,
  }
