"""The command line; see `simclr_jax.datasets`."""

import argparse
import sys

from simclr_jax import datasets, errors, sources
from simclr_jax.datasets.checking import print_report


def main(argv=None) -> None:
  """Runs the command line; a UserError is one line and exit code 2."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.datasets",
    description=datasets.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for command in ("check", "pack"):
    sub = commands.add_parser(command)
    sub.add_argument("name", help="digits, tfds:NAME or folder:PATH")
    sub.add_argument("--data_dir", default="", help="of TFDS")
    sub.add_argument("--labels", default="", help="of a folder: data.labels")
    sub.add_argument("--eval_fraction", type=float, default=0.0)
  check_parser, pack_parser = commands.choices.values()
  check_parser.add_argument("--split", default="")
  check_parser.add_argument("--image_size", type=int, default=0)
  check_parser.add_argument("--images_per_second", type=float, default=0.0)
  pack_parser.add_argument("--splits", default="train", help="a comma between")
  pack_parser.add_argument("--output", required=True, help="data_dir to write")
  pack_parser.add_argument("--canvas_size", type=int, required=True)
  pack_parser.add_argument("--as", dest="as_name", default="packed")
  pack_parser.add_argument("--lossless", action="store_true", help="PNG")
  pack_parser.add_argument("--skip", action="store_true", help="damaged images")
  prepare_parser = commands.add_parser("prepare")
  prepare_parser.add_argument("name", choices=["cifar10"])
  prepare_parser.add_argument("--data_dir", required=True)
  prepare_parser.add_argument("--archive", default="")
  args = parser.parse_args(argv)
  with errors.ending():
    {"check": _check, "pack": _pack, "prepare": _prepare}[args.command](args)


def _open(args, split):
  source = sources.make_source(
    args.name,
    split=split,
    data_dir=args.data_dir,
    labels=args.labels,
    eval_fraction=args.eval_fraction,
  )
  if source.note:
    print(source.note, flush=True)
  return source


def _check(args):
  everything = "all" if args.name.startswith("folder:") else "train"
  source = _open(args, args.split or everything)
  report = datasets.check(
    source,
    image_size=args.image_size,
    images_per_second=args.images_per_second,
  )
  print_report(report, source, args.images_per_second)
  if report["damaged"]:
    sys.exit(2)


def _pack(args):
  splits = {split: _open(args, split) for split in args.splits.split(",")}
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
  print(
    f"packed into {folder}; train on it with --config.data.name="
    f"tfds:{args.as_name} --config.data.data_dir={args.output}",
    flush=True,
  )


def _prepare(args):
  folder = datasets.prepare_cifar10(args.data_dir, archive=args.archive)
  print(
    f"prepared {folder}; use it with --config.data.data_dir={args.data_dir}",
    flush=True,
  )


if __name__ == "__main__":
  main()
