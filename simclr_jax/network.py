"""A trained network, rebuilt from its run to be used on any images."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from simclr_jax import build, checkpoint, data, models, parallel, predict
from simclr_jax import config as config_lib
from simclr_jax import sources as sources_lib
from simclr_jax.config import UserError, nearest

# Images on a device at a time, where nothing is said.
_BATCH_PER_DEVICE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """What a checkpoint holds.

  Attributes:
    config: of the run, with `model` as it is used here.
    model: a `models.SimCLR`, for `apply(variables, images, train=False)`.
    variables: {"params", "batch_stats"}, numpy.
    label_names: of the classifier's outputs; () without a classifier.
    about: what `checkpoint.load_described` says: "workdir", "step", "hash".
  """

  config: ml_collections.ConfigDict = dataclasses.field(repr=False)
  model: models.SimCLR = dataclasses.field(repr=False)
  variables: dict = dataclasses.field(repr=False)
  label_names: tuple[str, ...]
  about: dict[str, Any]

  @property
  def channels(self) -> int:
    """Of the images: 1 or 3."""
    return build.channels(self.variables)


def load(workdir, *, field: str = "--checkpoint", **model_fields) -> Network:
  """Rebuilds the network of a run from its latest checkpoint.

  It computes in float32, or in bfloat16 where it was trained so and this is no
  CPU.

  Args:
    workdir: the run's directory.
    field: the name of the option that gave it, for messages.
    **model_fields: replaces fields of `config.model`, such as conv="xla".

  Raises:
    UserError: there is no checkpoint, or no such field of `config.model`.

  >>> net = load("runs/finetuned")
  >>> net.channels, net.label_names[:3]
  (1, ('0', '1', '2'))
  """
  config, variables, about = checkpoint.load_described(workdir, field=field)
  keeps = config.model.dtype == "bfloat16" and jax.default_backend() != "cpu"
  fields = {
    "dtype": "bfloat16" if keeps else "float32",
    "bn_group_size": 0,
    "remat": False,
  }
  for name, value in (fields | model_fields).items():
    if name not in config.model:
      raise UserError(
        f'config.model has no field "{name}"{nearest(name, list(config.model))}'
      )
    config_lib.set_field(config, f"model.{name}", value)
  variables = jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, variables
  )
  classifier = variables["params"].get("classifier")
  label_names, num_classes = (), None
  if classifier is not None:
    label_names = tuple(about["label_names"])
    num_classes = classifier["kernel"].shape[1]
  model = build.make_model(
    config, num_classes=num_classes, head_layer=head_layer(config)
  )
  return Network(config, model, variables, label_names, about)


def head_layer(config) -> int:
  """Which layer of the head the classifier of a run sits on.

  >>> head_layer(load("runs/finetuned").config)
  1
  """
  return 0 if config.stage == "pretrain" else config.head_layer


def check_layer(network: Network, layer: str) -> None:
  """Raises UserError for a layer that the network does not have.

  >>> check_layer(load("runs/pretrained"), "z")
  """
  num_layers = network.config.head.num_layers
  allowed = ("h", *(f"head_{k}" for k in range(1, num_layers + 1)), "z")
  if layer not in allowed:
    raise UserError(
      f'--layer: got "{layer}", this network has {", ".join(allowed)} (h is '
      "what the encoder says, head_1 the first layer of the head, z the last)"
    )


def open_source(
  network: Network, name: str, *, split: str = "", **options
) -> sources_lib.Source:
  """Opens images for a network, split as training splits them.

  Args:
    network: from `load`; says how many channels the images get: gray ones
      become RGB, RGB ones gray.
    name: "digits", "tfds:NAME" or "folder:PATH".
    split: "" is all images of a folder, else "train".
    **options: of `sources.make_source`.

  Raises:
    UserError: see `sources.make_source`; flags are named as commands have them.

  >>> len(open_source(load("runs/pretrained"), "digits", split="test"))
  360
  """
  split = split or ("all" if name.startswith("folder:") else "train")
  try:
    source = sources_lib.make_source(name, split=split, **options)
  except UserError as error:
    raise UserError(sources_lib.as_flags(str(error), name="--data")) from None
  if source.channels == network.channels:
    return source
  return dataclasses.replace(source, channels=network.channels)


def stream(
  network: Network,
  source: sources_lib.Source,
  *,
  layer: str = "h",
  batch_size: int = 0,
  start: int = 0,
  on_skip: Callable[[str], object] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Runs the network over images on all devices, in flat memory.

  Every host must call it, and gets the same.

  Args:
    network: from `load`.
    source: from `open_source`.
    layer: "h", "head_k" or "z".
    batch_size: images over all devices; 0: 64 a device.
    start: how many images to pass over.
    on_skip: called with a line about each damaged image, which is then not
      "kept"; None: damage is an error.

  Yields:
    "features" float32 [n, C], "labels" int32 [n], "kept" bool [n] and, where
    there is a classifier, "predictions" int32 [n]; images in order.

  Raises:
    UserError: no such layer, a batch that the devices do not divide, a damaged
      image.

  >>> net = load("runs/finetuned")
  >>> source = open_source(net, "digits", split="test")
  >>> rows = next(stream(net, source, batch_size=64))
  >>> rows["features"].shape, rows["predictions"].shape
  ((64, 32), (64,))
  """
  check_layer(network, layer)
  devices = jax.device_count()
  batch_size = batch_size or _BATCH_PER_DEVICE * devices
  if batch_size < 1 or batch_size % devices:
    raise UserError(
      f"--batch_size: got {batch_size}, must be a multiple of the {devices} "
      "devices"
    )
  config = network.config
  dataset = data.Streamed(
    source,
    canvas_size=config.data.canvas_size,
    on_error="skip" if on_skip else "raise",
    on_skip=on_skip,
  )
  stream_fn = predict.make_stream(
    network.model,
    size=config.data.image_size,
    dtype=build.view_dtype(config),
    outputs=(layer, "logits") if network.label_names else (layer,),
  )
  variables = parallel.replicate(network.variables)
  try:
    for rows in stream_fn(
      variables, dataset, batch_size=batch_size, start=start
    ):
      found = {
        "features": rows[layer].astype(np.float32),
        "labels": rows["label"],
        "kept": ~rows.get("replaced", np.zeros(len(rows["label"]), bool)),
      }
      if network.label_names:
        found["predictions"] = rows["logits"].argmax(1).astype(np.int32)
      yield found
  except UserError as error:
    raise UserError(sources_lib.as_flags(str(error), name="--data")) from None
