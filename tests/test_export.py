"""What leaves the package: torchvision's names, StableHLO, the model card."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from made_run import apply, make_run
from safetensors.numpy import load_file

from simclr_jax import cli, export, model_card, torchvision_names
from simclr_jax.config import UserError, set_field, to_json

IMAGENET = {
  "model__width": 1.0,
  "model__stem": "imagenet",
  "data__image_size": 32,
  "data__canvas_size": 32,
}
NAMES = ["a", "b", "c", "d", "e"]


def random_images(size, channels=3, num=2):
  rng = np.random.default_rng(3)
  return rng.random((num, size, size, channels), np.float32)


@pytest.fixture(scope="module")
def r18(tmp_path_factory):
  """(folder, settings, variables) of a classifier on the head, exported."""
  folder = tmp_path_factory.mktemp("r18")
  settings, variables = make_run(
    folder / "run",
    num_classes=5,
    names=NAMES,
    pretrained=f"{folder}/before",
    **IMAGENET,
  )
  (folder / "run" / "config.json").write_text(to_json(settings))
  (folder / "run" / "result.json").write_text(
    json.dumps(
      {
        "dataset": "digits",
        "protocol": "finetune 10%",
        "top1": 0.875,
        "top5": None,
        "seed": 3,
      }
    )
  )
  export.export(
    folder / "run", folder / "out" / "r18.safetensors", kind="torchvision"
  )
  return folder, settings, variables


def shapes(arrays):
  return {name: list(x.shape) for name, x in arrays.items()}


def test_names_and_shapes_are_those_of_torchvisions_resnet18(r18, golden):
  want = json.loads(golden("names_torchvision.json").read_text())["resnet18"]
  got = load_file(r18[0] / "out" / "r18.safetensors")
  assert {x.dtype for k, x in got.items() if "tracked" not in k} == {
    np.dtype(np.float32)
  }
  # What the card says is put into the module first.
  shortcut = {
    "layer1.0.downsample.0.weight": [64, 64, 1, 1],
    **{
      f"layer1.0.downsample.1.{k}": [64]
      for k in ("weight", "bias", "running_mean", "running_var")
    },
    "layer1.0.downsample.1.num_batches_tracked": [],
  }
  head = {
    "fc.0.weight": [512, 512],
    "fc.0.bias": [512],
    "fc.2.weight": [5, 512],
    "fc.2.bias": [5],
  }
  want = {k: v for k, v in want.items() if not k.startswith("fc.")}
  assert shapes(got) == want | shortcut | head


def test_resnet50_loads_as_torchvision_makes_it(tmp_path, golden):
  """Every name and shape, fc included: strict=True without any change."""
  want = json.loads(golden("names_torchvision.json").read_text())["resnet50"]
  make_run(
    tmp_path / "run",
    stage="pretrain",
    model__depth=50,
    model__pool_padding="torch",
    **IMAGENET,
  )
  output = tmp_path / "r50.safetensors"
  card = export.export(tmp_path / "run", output, kind="torchvision")
  arrays = load_file(output)
  assert shapes(arrays) == want
  assert not arrays["fc.weight"].any()
  (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.S)
  lines = [line for line in code.splitlines() if line.startswith("model")]
  assert lines == [
    "model = torchvision.models.resnet50(num_classes=1000)",
    'model.load_state_dict(load_file("r50.safetensors"), strict=True)',
    "model.eval()",
    "model.fc = torch.nn.Identity()",
  ]


# -- ResNet-18 as torchvision computes it, in NumPy ---------------------------


def conv(x, kernel, stride, padding):
  """x [n, c, h, w] float64, kernel OIHW, symmetric padding."""
  k = kernel.shape[2]
  x = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
  windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))
  windows = windows[:, :, ::stride, ::stride]
  return np.einsum("nchwij,ocij->nohw", windows, kernel, optimize=True)


def resnet18(arrays, x, *, pool):
  """(features, logits) for images [n, 3, H, H]; pool: (before, after)."""

  def weight(name):
    return arrays[f"{name}.weight"].astype(np.float64)

  def norm(x, name):
    gamma, beta, mean, var = (
      arrays[f"{name}.{k}"].astype(np.float64)[:, None, None]
      for k in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * gamma + beta

  def relu(x):
    return np.maximum(x, 0)

  x = relu(norm(conv(x.astype(np.float64), weight("conv1"), 2, 3), "bn1"))
  x = np.pad(x, ((0, 0), (0, 0), pool, pool))  # zeros: after a ReLU
  windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
  x = windows[:, :, ::2, ::2].max((4, 5))
  for group in range(1, 5):
    for block in range(2):
      name = f"layer{group}.{block}"
      stride = 2 if group > 1 and block == 0 else 1
      y = relu(norm(conv(x, weight(f"{name}.conv1"), stride, 1), f"{name}.bn1"))
      y = norm(conv(y, weight(f"{name}.conv2"), 1, 1), f"{name}.bn2")
      if f"{name}.downsample.0.weight" in arrays:
        kernel = weight(f"{name}.downsample.0")
        x = norm(conv(x, kernel, stride, 0), f"{name}.downsample.1")
      x = relu(x + y)
  h = x.mean((2, 3))
  hidden = relu(h @ weight("fc.0").T + arrays["fc.0.bias"])
  return h, hidden @ weight("fc.2").T + arrays["fc.2.bias"]


def test_the_numbers_are_those_of_the_network(r18):
  folder, settings, variables = r18
  images = random_images(32)
  want = apply(settings, variables, images, num_classes=5)
  arrays = load_file(folder / "out" / "r18.safetensors")
  x = images.transpose(0, 3, 1, 2)
  h, logits = resnet18(arrays, x, pool=(0, 1))  # TensorFlow's padding
  assert np.abs(want["h"]).max() > 0.1
  np.testing.assert_allclose(h, want["h"], atol=1e-4)
  np.testing.assert_allclose(logits, want["logits"], atol=1e-4)
  h, _ = resnet18(arrays, x, pool=(1, 1))  # torchvision's own
  change = np.linalg.norm(h - want["h"]) / np.linalg.norm(want["h"])
  assert change > 1e-3
  # The card says how much that is (on images of its own).
  text = (folder / "out" / "README.md").read_text()
  (said,) = re.findall(r"features change by (\S+) of", text)
  assert change / 3 < float(said) < 3 * change


@pytest.mark.parametrize("head_layer", [0, 1])
def test_the_classifier_on_other_layers(head_layer):
  """On h it is fc; on the head's last layer there is no ReLU between."""
  rng = np.random.default_rng(0)
  width = 6
  dense, kernel = rng.normal(size=(2, width, width))
  scale, bias, mean, var = rng.random((4, width)) + 0.5
  variables = {
    "params": {
      "classifier": {"kernel": kernel, "bias": bias},
      "projection_head": {
        "dense_1": {"kernel": dense},
        "bn_1": {"scale": scale},
      },
    },
    "batch_stats": {"projection_head": {"bn_1": {"mean": mean, "var": var}}},
  }
  layers = torchvision_names._fc(variables, 1, head_layer)
  assert list(layers) == (["fc.0", "fc.1"] if head_layer else ["fc"])
  h = out = rng.normal(size=(4, width))
  for matrix, offset in layers.values():
    out = out @ matrix + offset
  if head_layer:
    h = (h @ dense - mean) / np.sqrt(var + 1e-5) * scale
  np.testing.assert_allclose(out, h @ kernel + bias, atol=1e-12)


def test_a_card_has_no_path_of_this_machine():
  config = cli.load_recipe("folder", stage="finetune")
  local = ("pretrained", "data.name", "data.labels", "data.label_ids")
  for name in local:
    place = "/home/ann/secret/one"
    set_field(config, name, f"folder:{place}" if name == "data.name" else place)
  shown = json.dumps(model_card._published(config.to_dict()))
  assert "ann" not in shown and shown.count("one") >= len(local)


def test_the_card(r18):
  folder, _, _ = r18
  text = (folder / "out" / "README.md").read_text()
  for said in (
    "| digits | finetune 10% | 87.50% | - | 3 |",
    "no mean and standard deviation",
    "11,180,736 parameters in the encoder",
    "## Licence",
    "0 a, 1 b, 2 c, 3 d, 4 e",
    "model.layer1[0].downsample = torch.nn.Sequential(",
    "Checkpoint: step 7",
  ):
    assert said in text
  assert str(folder) not in text  # where the runs lie is not published
  assert "| pretrained | before |" in text
  # The config as it was stored, not as the network was loaded to be written.
  (fields,) = re.findall(r"```json\n(.*?)```", text, re.S)
  stored = json.loads((folder / "run" / "config.json").read_text())
  assert json.loads(fields)["model"] == stored["model"]
  second = export.export(
    folder / "run", folder / "out" / "again.safetensors", kind="torchvision"
  )
  assert second.name == "again.safetensors.md"
  assert (folder / "out" / "README.md").read_text() == text


# -- StableHLO ----------------------------------------------------------------

# Runs the code of the card where the package cannot be imported.
STABLEHLO = """
import re, sys
import numpy as np
for name in ("simclr_jax", "flax", "orbax"):
  sys.modules[name] = None
text, images, out = sys.argv[1:]
(code,) = re.findall(r"```python\\n(.*?)```", open(text).read(), re.S)
result = {}
for num in (1, 5):
  scope = {"images": np.load(images)[:num]}
  exec(code, scope)
  result |= {f"{k}{num}": np.asarray(v) for k, v in scope["outputs"].items()}
assert not [m for m in sys.modules if m.startswith("simclr_jax.")]
np.savez(out, **result)
"""


def run_card(script, folder, images, *, python=sys.executable):
  """Runs a script on the card's code; returns what it saved."""
  np.save(folder / "images.npy", images)
  argv = [folder / "README.md", folder / "images.npy", folder / "result.npz"]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [python, "-c", script, *map(str, argv)],
    cwd=folder,
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  with np.load(folder / "result.npz") as file:
    return dict(file)


@pytest.mark.parametrize(
  "name, text, why",
  [
    ("config.json", '{"a":', "Expecting value"),
    ("config.json", "{}", 'it has no "model"'),
    ("result.json", "", "Expecting value"),
    ("result.json", '{"dataset": "digits"}', 'it has no "protocol"'),
  ],
)
def test_a_damaged_file_of_the_run_is_named(tmp_path, capsys, name, text, why):
  run, output = tmp_path / "run", tmp_path / "out" / "e.safetensors"
  make_run(run, **IMAGENET)
  (run / name).write_text(text)
  flags = [f"--checkpoint={run}", "--format=torchvision", f"--output={output}"]
  with pytest.raises(SystemExit) as ended:
    export.main(flags)
  assert ended.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith(f"error: {run / name} is damaged: {why}")
  assert "--workdir" not in error and error.count("\n") == 1
  assert not output.exists()


def test_stablehlo_runs_without_this_package(tmp_path):
  """Any width, and any number of images."""
  settings, variables = make_run(tmp_path / "run", num_classes=5, names=NAMES)
  folder = tmp_path / "out"
  export.export(tmp_path / "run", folder / "net.stablehlo", kind="stablehlo")
  images = random_images(8, num=5)
  want = apply(settings, variables, images, num_classes=5)
  got = run_card(STABLEHLO, folder, images)
  assert set(got) == {f"{k}{n}" for k in ("h", "z", "logits") for n in (1, 5)}
  for name, value in got.items():
    assert value.dtype == np.float32
    expected = want[name[:-1]][: int(name[-1])]
    np.testing.assert_allclose(value, expected, atol=2e-5)
  assert np.std(got["h5"], axis=0).max() > 0.01


# -- mistakes -----------------------------------------------------------------


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"model__width": 0.125}, "width 0.125, and torchvision's ResNet width 1"),
    (
      {"model__depth": 50, "model__sk_ratio": 0.0625},
      "selective kernels",
    ),
  ],
)
def test_networks_that_torchvision_lacks(tmp_path, fields, message):
  make_run(tmp_path / "run", **fields)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError, match=f"{message}.*--format=stablehlo"):
    export.export(tmp_path / "run", tmp_path / "a", kind="torchvision")
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("output", ["gs://mine/a", "s3://mine/a", "", "/"])
def test_an_output_must_be_a_local_file(r18, tmp_path, monkeypatch, output):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f"--output={output} must be a local"):
    export.export(r18[0] / "run", output, kind="torchvision")
  assert not list(tmp_path.iterdir())


def test_mistakes_get_one_line_and_touch_nothing(r18, tmp_path, capsys):
  run = r18[0] / "run"
  taken = tmp_path / "taken"
  taken.write_text("mine")
  with pytest.raises(UserError, match="taken exists already"):
    export.export(run, taken, kind="torchvision")
  assert taken.read_text() == "mine"
  with pytest.raises(UserError, match=r"--checkpoint: .*no checkpoints"):
    export.export(tmp_path, tmp_path / "a", kind="stablehlo")
  with pytest.raises(SystemExit) as end:
    export.main([f"--checkpoint={run}", "--format=onnx", f"--output={taken}2"])
  assert end.value.code == 2
  assert capsys.readouterr().err == (
    'error: --format: got "onnx", allowed are torchvision and stablehlo\n'
  )
  assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# -- PyTorch itself -----------------------------------------------------------

# torchvision's wheel does not import beside a CPU build of torch, which lacks
# its operators: their names are declared first.
TORCH = """
import importlib.util, pathlib, re, sys
import numpy as np
import torch
spec = importlib.util.find_spec("torchvision")
try:
  import torchvision
except RuntimeError:
  for name in [m for m in sys.modules if m.startswith("torchvision")]:
    del sys.modules[name]
  folder = pathlib.Path(spec.submodule_search_locations[0])
  text = (folder / "_meta_registrations.py").read_text()
  library = torch.library.Library("torchvision", "DEF")
  for name in sorted(set(re.findall(r"torchvision::(\\w+)", text))):
    library.define(f"{name}(Tensor x) -> Tensor")
  import torchvision
text, images, out = sys.argv[1:]
(code,) = re.findall(r"```python\\n(.*?)```", open(text).read(), re.S)
images = np.load(images).transpose(0, 3, 1, 2).copy()
scope = {"images": torch.from_numpy(images)}
with torch.no_grad():
  exec(code, scope)
found = {k: scope[k].numpy() for k in ("features", "logits") if k in scope}
np.savez(out, **found)
"""


def torch_python():
  python = os.environ.get("SIMCLR_TORCH_PYTHON")
  if python:
    return python
  if importlib.util.find_spec("torch") and importlib.util.find_spec(
    "torchvision"
  ):
    return sys.executable
  return pytest.skip(
    "no PyTorch here; SIMCLR_TORCH_PYTHON names a Python with torch, "
    "torchvision and safetensors"
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "depth, stage, fields",
  [
    (18, "finetune", {}),
    (18, "finetune", {"model__stem": "cifar", "head_layer": 0}),
    (50, "finetune", {"head_layer": 2}),
    (50, "pretrain", {"model__pool_padding": "torch"}),
  ],
)
def test_pytorch_says_the_same(tmp_path, depth, stage, fields):
  """The code of the card, as it stands: strict=True, features within 1e-4."""
  python = torch_python()
  num_classes = 5 if stage == "finetune" else None
  fields = IMAGENET | {"data__image_size": 64, "model__depth": depth} | fields
  settings, variables = make_run(
    tmp_path / "run",
    stage=stage,
    num_classes=num_classes,
    names=NAMES,
    **fields,
  )
  folder = tmp_path / "out"
  export.export(
    tmp_path / "run", folder / "net.safetensors", kind="torchvision"
  )
  images = random_images(64, num=4)
  want = apply(settings, variables, images, num_classes=num_classes)
  got = run_card(TORCH, folder, images, python=python)
  assert np.abs(want["h"]).max() > 0.1
  errors = {"h": np.abs(got["features"] - want["h"]).max()}
  if num_classes:
    errors["logits"] = np.abs(got["logits"] - want["logits"]).max()
  print(f"depth {depth} {fields}: {errors}, |h| {np.abs(want['h']).max():.3g}")
  assert max(errors.values()) < 1e-4
