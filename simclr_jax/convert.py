"""Official TensorFlow checkpoints as runs of this project.

  python -m simclr_jax.convert --tensorflow_checkpoint=PREFIX --workdir=DIR

The network's size is read off the variables. DIR then serves as
--config.pretrained of every stage, or with --head_layer, which says where its
classifier sits, as a fine-tuned network: --config.teacher of distill.
"""

import argparse
import collections
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from simclr_jax import (
  checkpoint,
  cli,
  errors,
  models,
  resnet,
  rundir,
  storage,
  tf_bundle,
  tf_names,
  weights,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError

_MAX_NAMED = 8  # names listed of each kind


def _described(depth, width, sk_ratio, stem):
  return f"depth {depth}, width {width:g}, sk_ratio {sk_ratio:g}, {stem} stem"


def from_tensorflow(
  variables,
  *,
  depth: int,
  width: float,
  sk_ratio: float,
  stem: str,
  ema: bool = False,
) -> dict:
  """Maps official variables onto this project's; every one is used or named.

  Encoder, projection head (of any number of layers, or none) and classifier (if
  there is one) are taken. `tf_names.select` drops what is not part of the
  network.

  Args:
    variables: TF1 name, such as "base_model/conv2d_1/kernel", or TF2 object
      path -> array.
    depth: of the ResNet, as in `make_model`; so are the next three.
    width: multiplies channels.
    sk_ratio: of selective kernels.
    stem: "imagenet" or "cifar".
    ema: take the averaged copy ("ema_model/...") in place of the last weights.

  Returns:
    {"params": ..., "batch_stats": ...} of NumPy arrays, in the dtype given.

  Raises:
    UserError: variables are missing, not expected or of another shape; all of
      them in one line, with the nearest name that is there.

  >>> network = dict(depth=18, width=0.125, sk_ratio=0.0, stem="cifar")
  >>> model = models.make_model(**network, num_layers=0)
  >>> shape = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  >>> mine = flatten_dict(models.init(model, jax.random.key(0), shape))
  >>> paths = tf_names.paths(
  ...   depth=18, sk_ratio=0.0, stem="cifar", num_layers=0, has_classifier=False
  ... )
  >>> official = {name: mine[path] for name, path in paths.items()}
  >>> sorted(from_tensorflow(official, **network))
  ['batch_stats', 'params']
  """
  wanted = dict(depth=depth, width=width, sk_ratio=sk_ratio, stem=stem)
  resnet.check_architecture(**wanted)
  named, _ = tf_names.select(variables, ema=ema)
  head = tf_names.head(named)
  paths = tf_names.paths(
    depth=depth,
    sk_ratio=sk_ratio,
    stem=stem,
    num_layers=head["num_layers"],
    has_classifier=any(name.startswith("head_supervised") for name in named),
  )
  first = np.shape(named.get("base_model/conv2d/kernel"))
  channels = first[2] if len(first) == 4 else 3
  expected = flatten_dict(
    jax.eval_shape(
      models.make_model(**wanted, **head, conv="xla").init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32),
    )
  )
  have = {name: np.shape(value) for name, value in named.items()}
  want = {
    # What is left of a classifier without a kernel has no shape to compare.
    name: expected[path].shape if path in expected else have.get(name)
    for name, path in paths.items()
  }
  if problem := weights.difference(want, have):
    try:
      found = tf_names.architecture(named)
      hint = (
        f" (they look like {_described(**found)})" if found != wanted else ""
      )
    except UserError:
      hint = ""
    raise UserError(
      f"the TensorFlow variables do not fit {_described(**wanted)}{hint}: "
      f"{problem}"
    )
  return unflatten_dict(
    {paths[name]: np.asarray(value) for name, value in named.items()}
  )


def convert(
  tensorflow_checkpoint,
  workdir,
  *,
  ema: bool = False,
  head_layer: int | None = None,
  label_names=(),
  image_size: int = 0,
) -> None:
  """Writes a run's directory with the network of a TensorFlow checkpoint.

  Args:
    tensorflow_checkpoint: its prefix, one of its files, a folder that holds
      one, or a SavedModel.
    workdir: the new run's directory; nothing may be there.
    ema: take the averaged copy of the weights.
    head_layer: which layer of the head the classifier sits on (official: 1 for
      the networks fine-tuned on 1% and 10%, 0 on 100%); None leaves a
      classifier out, and the run is one of pretraining.
    label_names: of the classifier's outputs, in order; default their numbers.
      A name that comes twice gets them too: "crane (134)", "crane (517)".
    image_size: pixels that the stages which start from the run will see; 0: as
      official, 224, or 32 with the CIFAR stem. The weights fit every size.

  Raises:
    UserError: a file or name that does not fit; nothing has been written then.

  >>> convert("r50_1x_sk0/model.ckpt-250228", "runs/official")
  Traceback (most recent call last):
    ...
  simclr_jax.errors.UserError: ...r50_1x_sk0/model.ckpt-250228...
  """
  _check_free(workdir)
  found = tf_bundle.read(tensorflow_checkpoint)
  named, left_out = tf_names.select(found, ema=ema)
  if head_layer is None:
    classifier = {k for k in named if k.startswith("head_supervised/")}
    left_out += sorted(classifier)
    named = {k: v for k, v in named.items() if k not in classifier}
  arch, head = tf_names.architecture(named), tf_names.head(named)
  variables = from_tensorflow(named, **arch)
  config = _config(arch, head, head_layer, image_size)
  num_classes = head["num_classes"] or 0
  label_names = list(label_names) or [str(i) for i in range(num_classes)]
  if head_layer is not None and len(label_names) != num_classes:
    raise UserError(
      f"--label_names: got {len(label_names)} names, but the classifier has "
      f"{num_classes} outputs"
    )
  label_names = _told_apart(label_names)
  rundir.claim(config, workdir)
  with checkpoint.open_manager(workdir, keep=1) as manager:
    checkpoint.save(
      manager,
      {"step": np.asarray(0, np.int32), "opt_state": {}, **variables},
      config,
      extra={
        "label_names": label_names,
        "labels_used": {"percent": 100.0, "seed": 0},
        "tensorflow_checkpoint": str(tensorflow_checkpoint),
      },
    )
  print(
    f"converted {len(named)} variables ({_described(**arch)}, "
    f"{head['num_layers']} head layers, {num_classes} classes) into {workdir}"
  )
  if left_out:
    more = len(left_out) - _MAX_NAMED
    shown = ", ".join(left_out[:_MAX_NAMED])
    shown += f" and {more} more" if more > 0 else ""
    print(f"left out {len(left_out)}: {shown}", flush=True)


def _check_free(workdir):
  """Raises UserError where something is in a run's directory, or bucket."""
  root = storage.root(workdir)
  try:
    is_taken = root.exists() and (not root.is_dir() or any(root.iterdir()))
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be read: {error.strerror or error}"
    ) from None
  if is_taken:
    raise UserError(
      f"--workdir={workdir} exists already and is left as it is; give another"
    )


def _told_apart(names):
  """Adds their number to names that come twice, so that each means one class.

  A dataset's classes are found by name; lists of ImageNet's repeat "crane".
  """
  counts = collections.Counter(names)
  repeated = {i: f"{x} ({i})" for i, x in enumerate(names) if counts[x] > 1}
  if repeated:
    shown = ", ".join(list(repeated.values())[:_MAX_NAMED])
    shown += ", ..." * (len(repeated) > _MAX_NAMED)
    print(f"--label_names: repeated names got their outputs' numbers: {shown}")
  return [repeated.get(i, name) for i, name in enumerate(names)]


def _config(arch, head, head_layer, size):
  """The config of a run that such a network could have come from."""
  if head_layer is not None and head["num_classes"] is None:
    raise UserError("--head_layer: the checkpoint has no classifier")
  if head_layer is not None and not 0 <= head_layer <= head["num_layers"]:
    raise UserError(
      f"--head_layer: got {head_layer}, but the projection head has "
      f"{head['num_layers']} layers; allowed are 0 to {head['num_layers']}"
    )
  if size < 0:
    raise UserError(f"--image_size: got {size}, must be above 0 (pixels)")
  is_small = arch["stem"] == "cifar"
  config = cli.load_recipe(
    "cifar10" if is_small else "imagenet",
    stage="pretrain" if head_layer is None else "finetune",
  )
  size = size or (32 if is_small else 224)
  fields = {f"model.{name}": value for name, value in arch.items()} | {
    "model.pool_padding": "same",
    "model.dtype": "float32",
    "head.num_layers": head["num_layers"],
    "head.dim": head["dim"],
    "head.width": 1.0,
    "data.image_size": size,
    "data.canvas_size": size if size <= 64 else size * 3 // 2,
  }
  if head_layer is not None:
    fields["head_layer"] = head_layer
  for name, value in fields.items():
    config_lib.set_field(config, name, value)
  return config


def main(argv=None) -> None:
  """The command; see the top of this file."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.convert",
    description=convert.__doc__.split("\n")[0],
  )
  parser.add_argument(
    "--tensorflow_checkpoint",
    required=True,
    help="its prefix (the path up to .index), one of its files, a folder with "
    "one checkpoint, or a SavedModel",
  )
  parser.add_argument(
    "--workdir", required=True, help="the new run's directory"
  )
  parser.add_argument(
    "--ema", action="store_true", help="take the averaged weights (ema_model/)"
  )
  parser.add_argument(
    "--head_layer",
    type=int,
    help="keep the classifier, which sits on this layer of the head: 1 for "
    "finetuned_1pct and finetuned_10pct, 0 for finetuned_100pct; default: the "
    "classifier is left out",
  )
  parser.add_argument(
    "--label_names",
    help="a file with a class name a line, such as TFDS's label.labels.txt; "
    "default: their numbers",
  )
  parser.add_argument(
    "--image_size",
    type=int,
    default=0,
    help="pixels that training from it will use; 0: 224, or 32 with the CIFAR "
    "stem",
  )
  args = parser.parse_args(argv)
  with errors.ending():
    names = ()
    if args.label_names:
      try:
        file = Path(args.label_names).expanduser()
        names = file.read_text(encoding="utf-8").split("\n")
      except UnicodeDecodeError:
        raise UserError(
          f"--label_names={args.label_names} is not text (UTF-8, a name a line)"
        ) from None
      except OSError as error:
        raise UserError(
          f"--label_names={args.label_names}: {error.strerror}"
        ) from None
    convert(
      args.tensorflow_checkpoint,
      args.workdir,
      ema=args.ema,
      head_layer=args.head_layer,
      label_names=[name for name in names if name],
      image_size=args.image_size,
    )


if __name__ == "__main__":
  main()
