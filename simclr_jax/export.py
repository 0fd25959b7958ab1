"""A trained network for other programs: torchvision or StableHLO.

  python -m simclr_jax.export --checkpoint=DIR --format=torchvision
      --output=resnet50.safetensors
  python -m simclr_jax.export --checkpoint=DIR --format=stablehlo
      --output=encoder.stablehlo

`torchvision` writes encoder and classifier under the names of torchvision's
ResNet (timm's are the same), width 1 and no selective kernels. `stablehlo`
writes the whole network as a function that JAX runs without this package. A
model card beside says how to load the file and what it is.
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import (
  cli,
  errors,
  hosts,
  model_card,
  network,
  storage,
  torchvision_names,
)
from simclr_jax.config import UserError

FORMATS = ("torchvision", "stablehlo")
_MISSING = (
  "--format={} needs the package {}; in the checkout: pip install '.[export]'"
)
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# A file of the format can be no larger.
_MAX_STABLEHLO_BYTES = 2**31 - 2**24


def export(checkpoint, output, *, kind: str) -> Path:
  """Writes the network of a run for use elsewhere, and its model card.

  The card is README.md beside the output, or OUTPUT.md where there is one.

  Args:
    checkpoint: the directory of a run.
    output: the new file.
    kind: "torchvision" or "stablehlo".

  Returns:
    The path of the card.

  Raises:
    UserError: the output exists, no checkpoint, a network that the format
      cannot hold, or a package that is missing.

  >>> output = "exported/encoder.stablehlo"
  >>> export("runs/pretrained", output, kind="stablehlo").as_posix()
  wrote exported/encoder.stablehlo...
  'exported/README.md'
  """
  if kind not in FORMATS:
    raise UserError(
      f'--format: got "{kind}", allowed are {" and ".join(FORMATS)}'
    )
  # In a Path, gs:// is gs:/, a folder here.
  if "://" in str(output) or not Path(output).name:
    raise UserError(f"--output={output} must be a local file")
  output = Path(output).expanduser()
  card = output.with_name("README.md")
  if os.path.lexists(card):
    card = output.with_name(f"{output.name}.md")
  for path in (output, card):
    if os.path.lexists(path):
      raise UserError(
        f"--output={output}: {path} exists already and is left as it is; give "
        "another"
      )
  net = network.load(checkpoint, dtype="float32", conv="xla")
  make = _torchvision if kind == "torchvision" else _stablehlo
  content, options = make(net, output.name)
  text = model_card.text(net, **options)
  if jax.process_index() == 0:
    try:
      output.parent.mkdir(parents=True, exist_ok=True)
      storage.write_whole(output, content)
      card.write_text(text)
    except OSError as error:
      raise UserError(
        f"--output={output} cannot be written: {error.strerror}"
      ) from None
    print(f"wrote {output} ({len(content) / 2**20:.1f} MiB) and {card}")
    for note in options["notes"]:
      print(f"note: {note}")
  return card


# -- torchvision --------------------------------------------------------------


def _torchvision(net, name):
  """(bytes of a safetensors file, arguments of the card)."""
  try:
    import safetensors.numpy
  except ImportError:
    raise UserError(_MISSING.format("torchvision", "safetensors")) from None
  model, size = net.config.model, net.config.data.image_size
  torchvision_names.check(model)
  arrays = torchvision_names.state_dict(
    net.variables,
    depth=model.depth,
    num_layers=net.config.head.num_layers,
    head_layer=network.head_layer(net.config),
  )
  lines, notes = torchvision_names.surgery(
    arrays,
    depth=model.depth,
    stem=model.stem,
    pool_padding=model.pool_padding,
    image_size=size,
  )
  if model.stem == "imagenet" and torchvision_names.needs_pool(
    model.pool_padding, size
  ):
    change = _pool_changes(net)
    notes.append(
      "Measured on random images: with torchvision's own max-pool the "
      f"features change by {change:.2g} of their length."
    )
  if not net.label_names:
    notes.append("The run has no classifier: `fc` is zeros.")
  usage = [
    "import torch",
    "import torchvision",
    "from safetensors.torch import load_file",
    "",
    *lines,
    f'model.load_state_dict(load_file("{name}"), strict=True)',
    "model.eval()",
    *([] if not net.label_names else ["logits = model(images)"]),
    "model.fc = torch.nn.Identity()",
    f"features = model(images)  # images: [n, {net.channels}, {size}, {size}]",
  ]
  return safetensors.numpy.save(arrays, metadata={"format": "pt"}), {
    "library": "torchvision",
    "usage": "\n".join(usage),
    "notes": notes,
  }


def _random_images(net, num):
  size = net.config.data.image_size
  shape = (num, size, size, net.channels)
  return np.random.default_rng(0).random(shape, np.float32)


def _pool_changes(net) -> float:
  """|h - h with torchvision's max-pool| / |h|, on random images."""
  images = _random_images(net, 4)
  other = net.model.clone(encoder=net.model.encoder.clone(pool_padding="torch"))
  h, changed = (
    np.asarray(
      jax.jit(lambda v, x, m=model: m.apply(v, x)["h"])(net.variables, images)
    )
    for model in (net.model, other)
  )
  return float(np.linalg.norm(h - changed) / np.linalg.norm(h))


# -- StableHLO ----------------------------------------------------------------


def _stablehlo(net, name):
  """(bytes of a serialized jax.export, arguments of the card)."""
  size = net.config.data.image_size
  outputs = ("h", "z", "logits") if net.label_names else ("h", "z")
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(net.variables))
  if num_bytes > _MAX_STABLEHLO_BYTES:
    raise UserError(
      f"--format=stablehlo holds 2 GiB at most, and this network has "
      f"{num_bytes / 2**30:.1f}"
    )

  def forward(images):
    result = net.model.apply(net.variables, images, train=False)
    return {name: result[name] for name in outputs}

  (batch,) = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((batch, size, size, net.channels), jnp.float32)
  exported = jax.export.export(jax.jit(forward), platforms=_PLATFORMS)(images)
  try:
    content = bytes(exported.serialize())
  except ImportError:  # JAX needs flatbuffers for it
    raise UserError(_MISSING.format("stablehlo", "flatbuffers")) from None
  # Read back and run, before anybody relies on it.
  images = _random_images(net, 3)
  got, want = (
    jax.export.deserialize(bytearray(content)).call(images),
    (jax.jit(forward)(images)),
  )
  for key in outputs:
    np.testing.assert_allclose(got[key], want[key], rtol=1e-3, atol=1e-4)
  usage = [
    "import jax  # with the package flatbuffers; no other is needed",
    "",
    f'with open("{name}", "rb") as file:',
    "  network = jax.export.deserialize(bytearray(file.read()))",
    f"# images: float32 [n, {size}, {size}, {net.channels}] in [0, 1]",
    f"outputs = network.call(images)  # {', '.join(outputs)}",
  ]
  return content, {
    "library": "jax",
    "usage": "\n".join(usage),
    "notes": [
      f"Exported for {', '.join(_PLATFORMS)} by jax {jax.__version__}; newer "
      "releases of JAX read it too, for the time that jax.export promises."
    ],
  }


def main(argv=None) -> None:
  """The command; see the top of this file."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.export",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", required=True, help="the directory of a run")
  add("--format", required=True, dest="kind", help=" or ".join(FORMATS))
  add("--output", required=True, help="the new file")
  args = parser.parse_args(argv)
  with errors.ending():
    cli.setup()
    with hosts.together():
      export(**vars(args))


if __name__ == "__main__":
  main()
