"""A model card: what a file of weights is, how it was made, how to use it."""

import json
import os

import jax
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import network as network_lib
from simclr_jax import rundir
from simclr_jax.provenance import provenance

_LOCAL = (
  "pretrained",
  "teacher",
  "data.name",
  "data.data_dir",
  "data.labels",
  "data.label_ids",
)
_SHOWN = (
  "data.name",
  "data.split",
  "num_epochs",
  "num_steps",
  "batch_size",
  "optim.name",
  "optim.learning_rate",
  "optim.scaling",
  "optim.weight_decay",
  "loss.temperature",
  "augment.strength",
  "label_percent",
  "labels_per_class",
  "pretrained",
  "teacher",
  "seed",
)

_DERIVED = ("num_epochs", "num_steps", "labels_per_class")  # not shown at 0


def text(
  net: network_lib.Network, *, library: str, usage: str, notes: list[str]
) -> str:
  """The card as Markdown, with the header that model hubs read.

  Args:
    net: the network that was written.
    library: that reads it: "torchvision" or "jax".
    usage: Python code that loads it.
    notes: sentences about what differs from what one might expect.

  Raises:
    UserError: config.json or result.json of the run is damaged.
  """
  config = _published(_stored(net))
  flat = config_lib.flat(config)
  model, size = net.config.model, net.config.data.image_size
  made = provenance()
  count = sum(
    x.size for x in jax.tree.leaves(net.variables["params"]["encoder"])
  )
  kernels = f", selective kernels {model.sk_ratio:g}" if model.sk_ratio else ""
  training = [
    f"| {k} | {flat[k]} |"
    for k in _SHOWN
    if flat.get(k, "") != "" and (flat[k] or k not in _DERIVED)
  ]
  crop = "" if size <= 32 else "the central 87.5% of "
  lines = [
    "---",
    "license: other  # fill in",
    f"library_name: {library}",
    "tags: [simclr, self-supervised-learning, image-feature-extraction]",
    "---",
    "",
    f"# ResNet-{model.depth}, SimCLRv2 {net.config.stage} on "
    f"{flat['data.name']}",
    "",
    f"Architecture: ResNet-{model.depth}, width {model.width:g}{kernels}, "
    f"{model.stem} stem, max-pool padding {model.pool_padding}; "
    f"{count:,} parameters in the encoder; projection head of "
    f"{net.config.head.num_layers} layers, {net.config.head.dim} outputs; "
    + (
      f"a classifier of {len(net.label_names)} classes on head layer "
      f"{network_lib.head_layer(net.config)} (0: on the encoder)."
      if net.label_names
      else "no classifier."
    ),
    "",
    "## Use",
    "",
    "```python",
    usage.rstrip(),
    "```",
    "",
    f"Input: float32, {net.channels} channel(s), values in [0, 1] (bytes / "
    "255), **no mean and standard deviation**. The evaluation view is "
    f"{crop}the largest central square, resized to {size}x{size}, bicubic.",
    "",
    *(f"* {note}" for note in notes),
    "",
    "## Results",
    "",
    *_results(net.about["workdir"]),
    "",
    "## Training",
    "",
    "| field | value |",
    "| --- | --- |",
    *training,
    "",
    "<details><summary>All fields</summary>",
    "",
    "```json",
    json.dumps(config, indent=2),
    "```",
    "",
    "</details>",
    "",
    f"Checkpoint: step {net.about['step']}, hash {net.about['hash']}. Exported "
    f"by simclr_jax {made['versions']['simclr_jax']} (commit "
    f"{made['commit'] or 'unknown'}), jax {made['versions']['jax']}, flax "
    f"{made['versions']['flax']}, on {made['device']}.",
  ]
  if net.label_names:
    names = ", ".join(f"{k} {name}" for k, name in enumerate(net.label_names))
    lines += ["", "## Classes", "", names]
  lines += [
    "",
    "## Licence",
    "",
    "*Fill in before publishing: what the licence of the training images and "
    "your own choice allow. The code is under Apache-2.0.*",
    "",
  ]
  return "\n".join(lines)


def _results(workdir) -> list[str]:
  file = epath.Path(workdir) / "result.json"
  if not file.exists():
    return ["The run has no result.json: not evaluated, or not finished."]
  result = rundir.read_json(file, "dataset", "protocol", "top1", "top5", "seed")

  def percent(value):
    return "-" if value is None else f"{value:.2%}"

  return [
    "| dataset | protocol | top-1 | top-5 | seed |",
    "| --- | --- | --- | --- | --- |",
    f"| {_without_folders(result['dataset'])} | {result['protocol']} | "
    f"{percent(result['top1'])} | {percent(result['top5'])} | "
    f"{result['seed']} |",
  ]


def _stored(net) -> dict:
  """The run's config; the network has fields of `model` for this machine."""
  config = net.config.to_dict()
  file = epath.Path(net.about["workdir"]) / "config.json"
  if file.exists():
    config["model"] = rundir.read_json(file, "model")["model"]
  return config


def _published(tree, prefix=""):
  """A config without the folders of the machine that it was trained on."""
  return {
    key: _published(value, f"{prefix}{key}.")
    if isinstance(value, dict)
    else _without_folders(value)
    if prefix + key in _LOCAL
    else value
    for key, value in tree.items()
  }


def _without_folders(name: str) -> str:
  kind, colon, path = (
    name.rpartition(":") if "://" not in name else ("", "", name)
  )
  if kind == "tfds":
    return name
  return kind + colon + os.path.basename(path.rstrip("/"))
