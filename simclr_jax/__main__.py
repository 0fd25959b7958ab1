"""python -m simclr_jax lists the commands, without importing them."""

import argparse
import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path

# In the order in which they are used.
COMMANDS = (
  "datasets",
  "plan",
  "selftest",
  "pretrain",
  "finetune",
  "distill",
  "report",
  "evaluate",
  "embed",
  "export",
  "convert",
  "sweep",
)


def describe(command: str) -> str:
  """The first line of a module's docstring, read from its source."""
  spec = importlib.util.find_spec(f"simclr_jax.{command}")
  assert spec is not None and spec.origin is not None
  text = Path(spec.origin).read_text(encoding="utf-8")
  return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the list; arguments other than --help end with exit code 2."""
  width = max(map(len, COMMANDS))
  lines = [f"  {name:{width}}  {describe(name)}" for name in COMMANDS]
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax",
    usage="python -m simclr_jax.COMMAND --help",
    description="Commands of SimCLRv2 in JAX:\n\n" + "\n".join(lines),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    add_help=False,
  )
  hidden = argparse.SUPPRESS
  parser.add_argument("-h", "--help", action="store_true", help=hidden)
  parser.parse_args(argv)
  parser.print_help()


if __name__ == "__main__":
  main()
