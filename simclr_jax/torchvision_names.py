"""A network under the names of torchvision's ResNet (timm's are the same).

torchvision has no projection head, no selective kernels and one width; what
else differs is put into the module before loading, by the lines of
`surgery`, and changes no name.
"""

from typing import Any

import numpy as np

from simclr_jax import resnet
from simclr_jax.config import UserError

_EPSILON = 1e-5  # of BatchNorm, on both sides
_BATCH_NORM = {
  "weight": ("params", "scale"),
  "bias": ("params", "bias"),
  "running_mean": ("batch_stats", "mean"),
  "running_var": ("batch_stats", "var"),
}


def check(model) -> None:
  """Raises UserError for a network that torchvision's ResNet cannot hold.

  Args:
    model: `config.model` of a run.
  """
  instead = "take --format=stablehlo, which holds every network"
  if model.sk_ratio:
    raise UserError(
      "--format=torchvision: this network has selective kernels (sk_ratio "
      f"{model.sk_ratio:g}), which torchvision lacks; {instead}"
    )
  if model.width != 1:
    raise UserError(
      f"--format=torchvision: this network has width {model.width:g}, and "
      "torchvision's ResNet width 1 only (its wide_resnet50_2 widens other "
      f"layers); {instead}"
    )


def state_dict(
  variables, *, depth: int, num_layers: int, head_layer: int
) -> dict[str, np.ndarray]:
  """The network's encoder and classifier, by torchvision's names.

  A classifier on h is `fc`; one on a layer of the head is, with the layers
  before it, `fc.0`, `fc.2`, .. (their BatchNorm is folded into the linear
  maps). Without a classifier `fc` is zeros for 1000 classes, so that a module
  as torchvision makes it loads with strict=True.

  Args:
    variables: {"params", "batch_stats"} of a `models.SimCLR` of width 1.
    depth: of the encoder.
    num_layers: of its head.
    head_layer: which of them the classifier sits on.

  Returns:
    {name: float32 array (OIHW kernels), or the int64 count of batches}.
  """
  arrays: dict[str, np.ndarray] = {}

  def module(*path):
    found = {}
    for kind in ("params", "batch_stats"):
      tree: Any = variables[kind]["encoder"]
      for key in path:
        tree = tree.get(key, {})
      found[kind] = tree
    return found

  def conv(name, *path):
    kernel = module(*path)["params"]["kernel"]
    arrays[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)

  def norm(name, *path):
    for torch_name, (kind, leaf) in _BATCH_NORM.items():
      arrays[f"{name}.{torch_name}"] = module(*path)[kind][leaf]
    arrays[f"{name}.num_batches_tracked"] = np.asarray(0, np.int64)

  conv("conv1", "stem", "conv_1")
  norm("bn1", "stem", "bn_1")
  num_blocks, is_bottleneck = resnet.DEPTHS[depth]
  for group in range(4):
    for block in range(num_blocks[group]):
      name = f"layer{group + 1}.{block}"
      path = (f"block_group{group + 1}", f"block_{block}")
      for k in range(1, 4 if is_bottleneck else 3):
        conv(f"{name}.conv{k}", *path, f"conv_{k}")
        norm(f"{name}.bn{k}", *path, f"bn_{k}")
      if block == 0:
        conv(f"{name}.downsample.0", *path, "shortcut_conv")
        norm(f"{name}.downsample.1", *path, "shortcut_bn")

  for name, (kernel, bias) in _fc(variables, num_layers, head_layer).items():
    arrays[f"{name}.weight"], arrays[f"{name}.bias"] = kernel.T, bias
  return {
    name: np.array(
      x, np.int64 if x.dtype == np.int64 else np.float32, order="C"
    )
    for name, x in arrays.items()
  }


def _fc(variables, num_layers, head_layer) -> dict[str, tuple]:
  """{module's name: (kernel, bias)} from h to the logits."""
  params, stats = variables["params"], variables["batch_stats"]
  if "classifier" not in params:
    features = params["encoder"]["block_group4"]["block_0"]["shortcut_conv"]
    width = features["kernel"].shape[-1]
    return {"fc": (np.zeros((width, 1000)), np.zeros(1000))}
  last = params["classifier"]["kernel"], params["classifier"]["bias"]
  if head_layer == 0:
    return {"fc": last}
  layers, index = {}, 0
  for k in range(1, head_layer + 1):
    kernel = params["projection_head"][f"dense_{k}"]["kernel"]
    norm = params["projection_head"][f"bn_{k}"]
    moments = stats["projection_head"][f"bn_{k}"]
    variance = np.asarray(moments["var"], np.float64)
    scale = norm["scale"] / np.sqrt(variance + _EPSILON)
    bias = norm.get("bias", 0) - moments["mean"] * scale
    layers[f"fc.{index}"] = kernel * scale, bias
    index += 1 if k == num_layers else 2  # the last one has no ReLU
  return layers | {f"fc.{index}": last}


def surgery(
  arrays: dict, *, depth: int, stem: str, pool_padding: str, image_size: int
) -> tuple[list[str], list[str]]:
  """The lines of PyTorch that build a module for `arrays`.

  Args:
    arrays: from `state_dict`.
    depth: of the encoder.
    stem: "imagenet" or "cifar".
    pool_padding: "same" or "torch".
    image_size: side of the images in pixels.

  Returns:
    (lines that end with `model`, ready to load; what differs from the module
    as torchvision makes it, a sentence each).
  """
  fc = [n for n in arrays if n.startswith("fc.") and n.endswith("weight")]
  num_classes = len(arrays[fc[-1]])
  blocks, is_bottleneck = resnet.DEPTHS[depth]
  make = f"resnet{depth}("
  if depth == 200:
    make = f"ResNet(\n  torchvision.models.resnet.Bottleneck, {list(blocks)}, "
  lines = [f"model = torchvision.models.{make}num_classes={num_classes})"]
  notes = []
  channels, nn = arrays["conv1.weight"].shape[1], "torch.nn"
  if stem == "cifar":
    lines += [
      f"model.conv1 = {nn}.Conv2d({channels}, 64, 3, padding=1, bias=False)",
      f"model.maxpool = {nn}.Identity()",
    ]
    notes.append(
      "The stem for small images is a 3x3 convolution without max-pool, where "
      "torchvision has 7x7, stride 2, and a max-pool."
    )
  elif channels != 3:
    lines.append(
      f"model.conv1 = {nn}.Conv2d({channels}, 64, 7, 2, 3, bias=False)"
    )
  if channels != 3:
    notes.append(f"The images have {channels} channel(s) in place of 3.")
  if stem == "imagenet" and needs_pool(pool_padding, image_size):
    lines += [
      f"model.maxpool = {nn}.Sequential(",
      f"  {nn}.ZeroPad2d((0, 1, 0, 1)), {nn}.MaxPool2d(3, 2)",
      ")",
    ]
    notes.append(
      "The max-pool pads at the end only, as TensorFlow does at even sizes "
      f"(these lines are for images of {image_size} pixels); torchvision's "
      "pads on both sides. It has no parameters, so a module without this line "
      "loads too, but says something else."
    )
  if not is_bottleneck:
    lines += [
      f"model.layer1[0].downsample = {nn}.Sequential(",
      f"  {nn}.Conv2d(64, 64, 1, bias=False), {nn}.BatchNorm2d(64)",
      ")",
    ]
    notes.append(
      "The first block has a convolution in its shortcut, as in every group of "
      "SimCLR's code; torchvision's ResNet-18 and 34 have none there, and no "
      "choice of their weights is equal to it."
    )
  if len(fc) > 1:
    lines.append(f"model.fc = {nn}.Sequential(")
    for name, after in zip(fc, [*fc[1:], ""], strict=True):
      out, width = arrays[name].shape
      skipped = after and int(after[3]) - int(name[3]) > 1
      relu = f", {nn}.ReLU()" if skipped else ""
      lines.append(f"  {nn}.Linear({width}, {out}){relu},")
    lines.append(")")
    notes.append(
      "The classifier sits on a layer of the projection head, which is part of "
      "`fc`, its BatchNorm folded into the linear map."
    )
  return lines, notes


def needs_pool(pool_padding: str, image_size: int) -> bool:
  """Whether the max-pool differs from torchvision's at this size.

  The stem halves the side, rounded up; at odd sizes TensorFlow pads both sides.
  """
  return pool_padding == "same" and -(-image_size // 2) % 2 == 0
