"""How much of the memory decoded images may take, alone and on one host.

This file is also the program that a test starts: `python test_budget.py OUT`.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax

from simclr_jax import data, datasets, hosts
from simclr_jax.data import memory
from simclr_jax.datasets import checking
from simclr_jax.sources import make_source

# On a canvas of 100 pixels: 3.6 and 14.37 million bytes.
TEST, TRAIN = 360 * 100**2, 1437 * 100**2


def kind_of(num_bytes, split="test", **options):
  """How a split is opened on a machine with this memory."""
  before = memory.memory_bytes
  memory.memory_bytes = lambda: num_bytes
  try:
    source = make_source("digits", split=split)
    dataset = data.open_dataset(source, canvas_size=100, **options)
  finally:
    memory.memory_bytes = before
  return type(dataset).__name__


def test_alone_it_is_half_of_the_memory():
  assert kind_of(2 * TEST) == "Dataset"
  assert kind_of(2 * TEST - 2) == "Streamed"
  assert kind_of(TEST, memory_gib=TEST / 2**30) == "Dataset"


def test_training_and_evaluation_images_share_it():
  source = make_source("digits", split="train")
  train = data.load(source, canvas_size=100)
  both = TEST + TRAIN
  assert kind_of(2 * both, beside=train) == "Dataset"
  assert kind_of(2 * both - 2, beside=train) == "Streamed"
  assert kind_of(TEST, memory_gib=both / 2**30, beside=train) == "Dataset"
  assert kind_of(TEST, memory_gib=TEST / 2**30, beside=train) == "Streamed"
  # What is streamed takes nothing.
  streamed = data.Streamed(source, canvas_size=100)
  assert kind_of(2 * TEST, beside=streamed) == "Dataset"


def test_check_says_what_training_does(monkeypatch, capsys):
  source = make_source("digits", split="test")
  report = datasets.check(source, image_size=8)
  size = 360 * 8 * 8
  for num_bytes, end in (
    (2 * size, "kept in memory"),
    (2 * size - 2, "streamed (above 0.0 GiB)"),
  ):
    monkeypatch.setattr(memory, "memory_bytes", lambda n=num_bytes: n)
    checking.print_report(report, source, 0.0)
    assert capsys.readouterr().out.splitlines()[-1].endswith(end)


# name: (processes on this process's host, its memory in the test set's sizes)
# for both processes, and what becomes of the test set.
CASES = {
  "one host": ([("a", 3), ("a", 3)], "Streamed"),
  "one host with enough": ([("a", 4), ("a", 4)], "Dataset"),
  "two hosts": ([("a", 3), ("b", 3)], "Dataset"),
  "a small one": ([("a", 3), ("b", 1)], "Streamed"),
}


def open_all(output):
  """Writes how this process opens the test set in each of the cases."""
  hosts.initialize()
  index, found = jax.process_index(), {}
  for name, (processes, _) in CASES.items():
    host, sets = processes[index]
    socket.gethostname = lambda host=host: host
    found[name] = kind_of(sets * TEST)
  pathlib.Path(f"{output}/{index}.json").write_text(json.dumps(found))


def test_processes_of_a_host_share_it(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  children = [
    subprocess.Popen(
      [sys.executable, __file__, str(tmp_path)],
      env=os.environ
      | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(i),
        "XLA_FLAGS": "",
      },
    )
    for i in range(2)
  ]
  assert [child.wait(timeout=100) for child in children] == [0, 0]
  expected = {name: kind for name, (_, kind) in CASES.items()}
  for i in range(2):
    assert json.loads((tmp_path / f"{i}.json").read_text()) == expected


if __name__ == "__main__":
  open_all(*sys.argv[1:])
