"""The command line; see `simclr_jax.datasets`."""

import argparse
import shlex
import sys

from simclr_jax import datasets, errors, sources
from simclr_jax.config import UserError
from simclr_jax.datasets.checking import print_report


def main(argv=None) -> None:
  """Runs the command line; a UserError is one line and exit code 2."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.datasets",
    description=datasets.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  check = commands.add_parser("check", help="look at every image")
  pack = commands.add_parser("pack", help="decode once, for fast reading")
  for sub in (check, pack):
    add = sub.add_argument
    add("name", help="digits, tfds:NAME or folder:PATH")
    add("--data_dir", default="", help=_TFDS_DIR)
    add("--labels", default="", help=_LABELS)
    add("--eval_fraction", type=float, default=0.0, help=_EVAL_FRACTION)
  _flags_of_check(check.add_argument)
  _flags_of_pack(pack.add_argument)
  prepare = commands.add_parser("prepare", help="CIFAR-10 without TensorFlow")
  add = prepare.add_argument
  add("name", choices=["cifar10"], help="the dataset")
  add("--data_dir", required=True, help="the folder of prepared datasets")
  add("--archive", default="", help="cifar-10-binary.tar.gz; default: download")
  args = parser.parse_args(argv)
  with errors.ending():
    {"check": _check, "pack": _pack, "prepare": _prepare}[args.command](args)


_TFDS_DIR = "of tfds:NAME; default: TFDS_DATA_DIR or ~/tensorflow_datasets"
_LABELS = "of a folder: a csv, folders or none; default: find out"
_EVAL_FRACTION = (
  'part of a folder\'s labelled images that is split "test"; default: 0, none'
)


def _flags_of_check(add):
  add("--split", default="", help='default: all of a folder, else "train"')
  add(
    "--image_size",
    type=int,
    default=0,
    help="side of the network's images in pixels, to say which canvas to take; "
    "default: 0, not said",
  )
  add(
    "--images_per_second",
    type=float,
    default=0.0,
    help="of the training step, to say whether decoding keeps up; default: 0, "
    "not said",
  )


def _flags_of_pack(add):
  add("--output", required=True, help="the folder to write: data.data_dir")
  add(
    "--canvas_size",
    type=int,
    required=True,
    help="longest side in pixels; larger images are shrunk to it",
  )
  add(
    "--splits",
    default="train",
    help="with a comma between, such as train,test; default: %(default)s",
  )
  add(
    "--as",
    dest="as_name",
    default="packed",
    help="name of the new dataset, tfds:NAME; default: %(default)s",
  )
  add("--lossless", action="store_true", help="PNG; default: JPEG")
  add(
    "--skip",
    action="store_true",
    help="leave damaged images out; default: stop at the first",
  )


def _open(args, *splits):
  """Opens splits of one dataset; what is understood of it is said once."""
  options = {
    "data_dir": args.data_dir,
    "labels": args.labels,
    "eval_fraction": args.eval_fraction,
  }
  try:
    opened = [
      sources.make_source(args.name, split=split, **options) for split in splits
    ]
  except UserError as error:
    raise UserError(
      sources.as_flags(str(error), name="the dataset's name")
    ) from None
  for note in dict.fromkeys(source.note for source in opened):
    if note:
      print(sources.as_flags(note, name="the dataset's name"), flush=True)
  return opened


def _check(args):
  everything = "all" if args.name.startswith("folder:") else "train"
  (source,) = _open(args, args.split or everything)
  report = datasets.check(
    source,
    image_size=args.image_size,
    images_per_second=args.images_per_second,
  )
  print_report(report, source, args.images_per_second)
  if report["damaged"]:
    sys.exit(2)


def _pack(args):
  names = args.splits.split(",")
  splits = dict(zip(names, _open(args, *names), strict=True))
  skipped = []
  try:
    folder = datasets.pack(
      splits,
      output=args.output,
      canvas_size=args.canvas_size,
      name=args.as_name,
      lossless=args.lossless,
      on_skip=skipped.append if args.skip else None,
    )
  finally:  # They also say why nothing was packed.
    for line in skipped:
      print(f"skipped: {line}")
  # As the pack is, whatever a recipe says of splits and of holding out.
  train = "train" if "train" in splits else names[0]
  others = ["test", *names] if "test" in splits else names
  fields = {
    "name": f"tfds:{args.as_name}",
    "data_dir": args.output,
    "split": train,
    "eval_split": next((name for name in others if name != train), ""),
    "eval_fraction": "0.0",
  }
  flags = [f"--config.data.{k}={v}" for k, v in fields.items()]
  print(
    f"packed into {folder}; train on it with {shlex.join(flags)}", flush=True
  )


def _prepare(args):
  folder = datasets.prepare_cifar10(args.data_dir, archive=args.archive)
  print(
    f"prepared {folder}; use it with --config.data.data_dir={args.data_dir}",
    flush=True,
  )


if __name__ == "__main__":
  main()
