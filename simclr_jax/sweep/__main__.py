"""The command python -m simclr_jax.sweep."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from simclr_jax import cli, storage, sweep
from simclr_jax import config as config_lib
from simclr_jax.config import UserError
from simclr_jax.sweep import page
from simclr_jax.sweep.claims import Claim, make_claim_cells, make_claims
from simclr_jax.sweep.grid import (
  METHODS,
  SIZES,
  Cell,
  check_cells,
  make_cells,
)
from simclr_jax.sweep.running import STAGES, run_cells


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  try:
    return _main(argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _main(argv) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.sweep",
    description=sweep.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--recipe", default="digits")
  parser.add_argument("--workdir", required=True)
  parser.add_argument(
    "--claims",
    action="store_true",
    help="compare what SimCLRv2 compares, instead of the grid",
  )
  parser.add_argument("--sizes", help="DEPTHxWIDTH, from small to big")
  parser.add_argument("--labels", default="1,10,100", help="percentages")
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--methods", help=",".join(METHODS))
  parser.add_argument("--task", default="", help="I/N: part I of N, from 0")
  args, rest = parser.parse_known_args(argv)
  workdir = _folder(args.workdir)
  fields = [_parse_field(flag) for flag in rest]
  cells, claims = _plan(args, fields)
  mine = _part(cells, args.task)
  with storage.writable(workdir, "--workdir"):
    check_cells(cells, workdir, fields)
  os.environ["JAX_NUM_PROCESSES"] = "1"  # processes share cells, not a run
  cli.setup()
  try:
    failed = run_cells(mine, workdir, locks=not args.task)
  finally:
    page.write(cells, workdir, claims)
  for name in failed:
    file = workdir / name / "error.txt"
    where = f", see {file}" if file.exists() else ""  # not for what needs it
    print(f"failed: {name}{where}", file=sys.stderr)
  return 1 if failed else 0


def _folder(workdir: str) -> Path:
  if not workdir:
    raise UserError("--workdir is empty; name a folder.")
  if "://" in workdir:  # In a Path, gs:// is gs:/, a folder here.
    raise UserError(
      f"--workdir={workdir} is in a bucket, which has no locks; give a folder "
      "that the machines share."
    )
  return Path(workdir).expanduser().absolute()


def _plan(args, fields) -> tuple[list[Cell], list[Claim]]:
  """The cells, and the claims where these are asked for."""
  sizes = args.sizes or SIZES.get(args.recipe.partition(",")[0])
  if not sizes:
    raise UserError(
      f'--sizes is missing; recipe "{args.recipe}" has no default'
      f"{config_lib.nearest(args.recipe, list(SIZES))}"
    )
  grid = {
    "recipe": args.recipe,
    "sizes": list(dict.fromkeys(sizes.split(","))),
    "percents": _numbers("labels", args.labels, float),
    "seeds": _numbers("seeds", args.seeds, int),
    "fields": fields,
  }
  if not all(0 < percent <= 100 for percent in grid["percents"]):
    raise UserError(f"--labels: above 0 and at most 100, got {args.labels}.")
  if not all(0 <= seed < 2**32 for seed in grid["seeds"]):
    raise UserError(f"--seeds: 0 or more and below 2**32, got {args.seeds}.")
  if args.claims:
    if args.methods:
      raise UserError("--methods does not go with --claims.")
    if not args.sizes:
      grid["sizes"] = grid["sizes"][:2]
    cells = make_claim_cells(**grid)
    return cells, make_claims(args.recipe, grid["sizes"], grid["percents"])
  methods = args.methods.split(",") if args.methods else list(METHODS)
  for method in methods:
    if method not in METHODS:
      raise UserError(
        f'--methods: "{method}" is unknown'
        f"{config_lib.nearest(method, list(METHODS))} There are: "
        f"{', '.join(METHODS)}."
      )
  return make_cells(**grid, methods=methods), []


def _numbers(name: str, text: str, kind) -> list:
  try:
    # Twice the same would be one run that counts as two.
    return list(dict.fromkeys(kind(part) for part in text.split(",")))
  except ValueError:
    raise UserError(
      f"--{name}: numbers with commas between them, got {text!r}."
    ) from None


def _parse_field(flag: str) -> tuple[str, str]:
  """--pretrain.num_steps=3 -> ("pretrain", "num_steps=3")."""
  scope, dot, field = flag.removeprefix("--").partition(".")
  if not flag.startswith("--") or scope not in (*STAGES, "config") or not dot:
    raise UserError(
      f"unknown flag {flag}; a field is set by --config.FIELD=VALUE, in one "
      f"stage by {', '.join(f'--{stage}.FIELD=VALUE' for stage in STAGES)}."
    )
  return scope, field


def _part(cells: Sequence[Cell], task: str) -> Sequence[Cell]:
  """The cells of part I of I/N: whole chains of a size and a seed."""
  if not task:
    return cells
  index, _, count = task.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise UserError(f'--task: I/N with I from 0 to N - 1, got "{task}".')
  chains = list(dict.fromkeys((cell.size, cell.seed) for cell in cells))
  mine = chains[int(index) :: int(count)]
  return [cell for cell in cells if (cell.size, cell.seed) in mine]


if __name__ == "__main__":
  sys.exit(main())
