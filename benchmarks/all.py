"""Runs every benchmark of speed and prints one table.

  python benchmarks/all.py --peers=peers/bin/python --output=results \
      [--data_dir=DIR] [augment step ...]

Each script is a process of its own, so that none has another's memory; the
table and results/*.json are what benchmarks/README.md is written from. On a
machine with a GPU the scripts use it. Where a script fails the others run all
the same, and the exit code is 1.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# With a GPU some minutes in all, on two CPU cores half an hour.
SCRIPTS = ("augment", "step", "train", "nt_xent", "cache")


def main():
  formatter = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=formatter
  )
  parser.add_argument("scripts", nargs="*", default=SCRIPTS)
  parser.add_argument("--peers", default="")
  parser.add_argument("--data_dir", default="", help="of TFDS, for CIFAR-10")
  parser.add_argument("--output", default="results", help="a folder")
  args = parser.parse_args()
  folder = Path(args.output)
  folder.mkdir(parents=True, exist_ok=True)
  failed = []
  for name in args.scripts:
    command = [sys.executable, str(HERE / f"{name}.py")]
    command.append(f"--output={folder / name}.json")
    if name in ("augment", "step", "train") and args.peers:
      command.append(f"--peers={args.peers}")
    if name == "train" and args.data_dir:
      command.append(f"--data_dir={args.data_dir}")
    print(f"\n$ {' '.join(command)}", flush=True)
    if subprocess.run(command).returncode:
      failed.append(name)
  print("\n| measure | here | peer | ratio | wanted |")
  print("| --- | --- | --- | --- | --- |")
  for name in args.scripts:
    file = folder / f"{name}.json"
    for line in json.loads(file.read_text())["lines"] if file.exists() else ():
      show(line)
  if failed:
    sys.exit(f"failed: {', '.join(failed)}")


def show(line: dict) -> None:
  """A row of the table for each peer, or one for a measure without peers."""
  rows = line.get("rows", {})
  for name, row in rows.items():
    if "ratio" in row:
      ours = rows[line["ours"]]["images_per_second"]
      print(
        f"| {line['title']} | {ours:.0f} | {name} "
        f"{row['images_per_second']:.0f} | {row['ratio']:.2f} | "
        f"{row['at_least'] or ''} |"
      )
  if "ratio" in line:
    at_most = line["at_most"]
    print(
      f"| {line['title']} | | | {line['ratio']:.3f} | at most {at_most:.3g} |"
    )


if __name__ == "__main__":
  main()
