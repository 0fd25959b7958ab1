"""The tour: cleared, kind to Colab's JAX, and green from a clean kernel."""

import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = (
  pathlib.Path(__file__).resolve().parents[1]
  / "notebooks"
  / "simclr_jax_tour.ipynb"
)
# Put behind the last cell: what it found, as JSON.
RESULTS = """
import json
print(json.dumps({
  "loss": curve[-1], "uniform": uniform_loss(BATCH), "pairs": accuracy,
  "top1": [pretrained["top1"], finetuned["top1"], distilled["top1"]],
  "protocols": [row["protocol"] for row in scores["results"]],
  "files": len(mine["files"]), "text": text_losses[-1],
  "text_uniform": uniform_loss(len(text)), "by_caption": by_caption,
}))
"""


def cells(kind="code"):
  found = json.loads(NOTEBOOK.read_text())["cells"]
  return [cell for cell in found if cell["cell_type"] == kind]


def source(cell):
  return "".join(cell["source"])


def test_outputs_are_cleared():
  for cell in cells():
    assert cell["outputs"] == []
    assert cell["execution_count"] is None


def test_the_install_cell_keeps_jax(monkeypatch, capsys):
  commands, constraints = [], []

  def run(command, **_):
    commands.append(command)
    constraints.append(pathlib.Path(command[command.index("-c") + 1]))
    return subprocess.CompletedProcess(command, len(commands) - 1)

  monkeypatch.setattr(subprocess, "run", run)
  exec(source(cells()[0]), {})
  assert not commands, "the package is importable"
  assert f"JAX {importlib.metadata.version('jax')}, " in capsys.readouterr().out

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  exec(source(cells()[0]), {})
  (command,) = commands
  assert command[:4] == [sys.executable, "-m", "pip", "install"]
  assert command[-1] == ".."
  kept = constraints[0].read_text().split()
  for name in ("jax", "jaxlib"):
    assert f"{name}=={importlib.metadata.version(name)}" in kept
  with pytest.raises(SystemExit, match=r"install \.\. beside jax"):
    exec(source(cells()[0]), {})


@pytest.mark.slow
def test_from_a_clean_kernel(tmp_path, monkeypatch):
  notebook = json.loads(NOTEBOOK.read_text())
  last = dict(cells()[0], id="results", source=[RESULTS])
  notebook["cells"].append(last)
  (tmp_path / "tour.ipynb").write_text(json.dumps(notebook))
  monkeypatch.setenv("XLA_FLAGS", "")  # one device, as most people have
  subprocess.run(
    [
      *(sys.executable, "-c", "from nbclient.cli import main; main()"),
      *("--output=done.ipynb", "--timeout=500", "tour.ipynb"),
    ],
    cwd=tmp_path,
    timeout=580,
    check=True,
  )
  done = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
  outputs = [out for cell in done for out in cell.get("outputs", ())]
  assert not any(out["output_type"] == "error" for out in outputs)
  images = [out for out in outputs if "image/png" in out.get("data", {})]
  assert len(images) == 3
  found = json.loads("".join(outputs[-1]["text"]))
  assert found["loss"] < 0.9 * found["uniform"]
  assert found["pairs"] > 0.05  # by chance 0.008
  pretrained, finetuned, distilled = found["top1"]
  assert pretrained > 0.8
  assert finetuned > 0.4
  assert distilled > 0.3
  assert "linear (L-BFGS) 5 per class" in found["protocols"]
  assert found["files"] == 60
  assert found["text"] < 0.5 * found["text_uniform"]
  assert found["by_caption"] > 0.7
