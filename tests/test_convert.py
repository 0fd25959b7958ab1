"""Official names, object paths, errors, and a checkpoint made into a run.

names_*.json: the variables of graphs that the official code built (TF 1.15.4).
"""

import importlib.util
import json
import re
import struct

import det
import jax
import numpy as np
import PIL.Image
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

from simclr_jax import (
  checkpoint,
  cli,
  convert,
  distill,
  embed,
  finetune,
  models,
  network,
  pretrain,
  storage,
  tf_bundle,
  tf_names,
)
from simclr_jax import config as config_lib
from simclr_jax.config import UserError

ARCHS = {
  "r18": {"depth": 18, "width": 1, "sk_ratio": 0.0, "stem": "cifar"},
  "r50": {"depth": 50, "width": 1, "sk_ratio": 0.0, "stem": "imagenet"},
  "r50_sk": {"depth": 50, "width": 1, "sk_ratio": 0.0625, "stem": "imagenet"},
}
OBJECT = "/.ATTRIBUTES/VARIABLE_VALUE"


def official(golden, name):
  """TF1 name -> an array without storage, in the order of creation."""
  listed = json.loads(golden(f"names_{name}.json").read_text())["variables"]
  return {name: np.broadcast_to(0.0, shape) for name, shape, _ in listed}


def size_options(arch):
  return {k: v for k, v in arch.items() if k != "width"}


@pytest.mark.parametrize("name", ARCHS)
def test_names_in_the_official_order(golden, name):
  listed = official(golden, name)
  assert list(tf_names.paths(**size_options(ARCHS[name]))) == list(listed)
  assert tf_names.architecture(listed) == ARCHS[name]


def test_every_value_finds_its_place(golden):
  variables = det.weights(golden("names_r18.json"))
  converted = convert.from_tensorflow(variables, **ARCHS["r18"])
  flat = flatten_dict(converted)
  assert len(flat) == len(variables)
  # Kernels are recognised by their shape, norms by their values.
  for name, path in tf_names.paths(**size_options(ARCHS["r18"])).items():
    np.testing.assert_array_equal(flat[path], variables[name])
  model = models.make_model(**ARCHS["r18"], num_classes=1000, conv="xla")
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert jax.tree.map(np.shape, converted) == jax.tree.map(np.shape, shapes)


def object_paths(arch, paths):
  """TF2 object path -> TF1 name, written out from tf2/resnet.py."""
  is_bottleneck = arch["depth"] >= 50
  has_sk = arch["sk_ratio"] > 0
  stem = "initial_conv_relu_max_pool"
  # DropBlock and identity layers take places in these lists.
  if has_sk:
    stem_places = {"conv_1": 0, "bn_1": 1, "conv_2": 2, "bn_2": 3}
    stem_places |= {"conv_3": 4, "bn_3": 6}
    main = {"conv_1": 0, "bn_1": 1, "conv_3": 5, "bn_3": 6}
  else:
    stem_places = {"conv_1": 0, "bn_1": 2}
    main = {"conv_1": 0, "bn_1": 1, "conv_2": 3, "bn_2": 4}
    main |= {"conv_3": 6, "bn_3": 7}
  if not is_bottleneck:
    main = {"conv_1": 0, "bn_1": 1, "conv_2": 2, "bn_2": 3}
  selective = {
    "conv_2": "3/conv2d_fixed_padding/conv2d",
    "bn_2": "3/batch_norm_relu/bn",
    "gate_conv_1": "3/conv2d_0",
    "gate_bn": "3/batch_norm_relu_1/bn",
    "gate_conv_2": "3/conv2d_1",
  }
  main_list = (
    "conv_relu_dropblock_layers" if is_bottleneck else "conv2d_bn_layers"
  )
  first_list = "projection_layers" if is_bottleneck else "shortcut_layers"
  found = {}
  for name, (_, top, *middle, _) in paths.items():
    leaf = name.rsplit("/", 1)[1]
    layer = middle[-1] if middle else ""
    kind = "conv2d" if "conv" in layer else "bn"
    if top == "classifier":
      path = f"supervised_head/linear_layer/dense/{leaf}"
    elif top == "projection_head":
      what = "dense" if "dense" in layer else "bn_relu/bn"
      k = int(layer[-1]) - 1
      path = f"_projection_head/linear_layers/{k}/{what}/{leaf}"
    elif middle[0] == "stem":
      path = f"resnet_model/{stem}/{stem_places[layer]}/{kind}/{leaf}"
    else:
      group, block = int(middle[0][-1]) - 1, middle[1].removeprefix("block_")
      start = f"resnet_model/block_groups/{group}/layers/{block}"
      if layer.startswith("shortcut"):
        # ResNet-D pools first, and pads before where it strides.
        place = (1 + (group > 0)) * has_sk + (kind == "bn")
        path = f"{start}/{first_list}/{place}/{kind}/{leaf}"
      elif has_sk and layer in selective:
        path = f"{start}/{main_list}/{selective[layer]}/{leaf}"
      else:
        path = f"{start}/{main_list}/{main[layer]}/{kind}/{leaf}"
    found[f"model/{path}{OBJECT}"] = name
  return found


@pytest.mark.parametrize("name", ARCHS)
def test_tf2_object_paths(golden, name):
  named = official(golden, name)
  paths = object_paths(ARCHS[name], tf_names.paths(**size_options(ARCHS[name])))
  assert len(paths) == len(named)
  variables = {path: [name] for path, name in sorted(paths.items())}
  extra = ["save_counter" + OBJECT, "optimizer/iter" + OBJECT]
  extra += [next(iter(paths)) + "/.OPTIMIZER_SLOT/optimizer/m" + OBJECT]
  got, left_out = tf_names.select(variables | dict.fromkeys(extra))
  assert got == {name: [name] for name in named}
  assert sorted(left_out) == sorted(extra)


def test_averaged_copy_slots_and_memory(golden):
  names = official(golden, "r18")
  variables = {name: ("last", name) for name in names}
  network = [n for n in names if not n.startswith("head_supervised")]
  variables |= {f"ema_model/{name}": ("ema", name) for name in network}
  slots = [f"{name}/Momentum" for name in names if "moving" not in name]
  others = [*slots, "global_step", "memory", "memory_pointer", "beta1_power"]
  others += ["base_model/conv2d/kernel/Adam_1"]
  variables |= dict.fromkeys(others)
  # Some tools list names with the number of an operation's output.
  variables = {f"{name}:0": value for name, value in variables.items()}
  got, left_out = tf_names.select(variables)
  assert got == {name: ("last", name) for name in names}
  assert set(left_out) == {*others, *(f"ema_model/{n}" for n in network)}
  assert left_out.index("base_model/conv2d_2/kernel/Momentum") < (
    left_out.index("base_model/conv2d_10/kernel/Momentum")
  )
  got, left_out = tf_names.select(variables, ema=True)
  assert got == {name: ("ema", name) for name in network}
  assert set(left_out) == {*others, *names}
  with pytest.raises(UserError, match="no averaged copy"):
    tf_names.select(dict.fromkeys(names, 0), ema=True)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_other_heads(golden, num_layers):
  variables = {
    name: x
    for name, x in official(golden, "r18").items()
    if name.startswith("base_model")
  }
  for k in range(num_layers):
    last = k == num_layers - 1
    name = "head_contrastive/" + ("l_0" if num_layers == 1 else f"nl_{k}")
    size = 64 if last else 512
    variables[f"{name}/dense/kernel"] = np.zeros((512, size))
    leaves = ["gamma", "moving_mean", "moving_variance"]
    for leaf in leaves if last else [*leaves, "beta"]:
      variables[f"{name}/batch_normalization/{leaf}"] = np.zeros(size)
  converted = convert.from_tensorflow(variables, **ARCHS["r18"])
  model = models.make_model(
    **ARCHS["r18"], num_layers=num_layers, dim=64, conv="xla"
  )
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert jax.tree.map(np.shape, converted) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize(
  "wrong, hint",
  [
    ({"depth": 101}, "depth 50, width 1, sk_ratio 0, imagenet stem"),
    ({"width": 2}, "depth 50, width 1,"),
    ({"sk_ratio": 0.0625}, "sk_ratio 0, imagenet stem"),
    ({"stem": "cifar"}, "imagenet stem"),
    ({"depth": 18}, "depth 50"),
  ],
)
def test_another_network(golden, wrong, hint):
  with pytest.raises(UserError) as error:
    convert.from_tensorflow(official(golden, "r50"), **(ARCHS["r50"] | wrong))
  text = str(error.value)
  assert "\n" not in text
  assert re.search(rf"they look like .*{hint}", text), text


def test_missing_extra_and_misshapen(golden):
  variables = official(golden, "r18")
  for number in (10, 2):
    name = f"base_model/conv2d_{number}/kernel"
    variables[name + "s"] = variables.pop(name)
  del variables["head_contrastive/nl_2/batch_normalization/gamma"]
  variables["base_model/conv2d_3/kernel"] = np.zeros((3, 3, 64, 65))
  variables["quite_another_thing"] = np.zeros(3)
  with pytest.raises(UserError) as error:
    convert.from_tensorflow(variables, **ARCHS["r18"])
  text = str(error.value).partition(": ")[2]
  assert text == (
    "missing base_model/conv2d_10/kernel (nearest: "
    "base_model/conv2d_10/kernels), base_model/conv2d_2/kernel (nearest: "
    "base_model/conv2d_2/kernels), "
    "head_contrastive/nl_2/batch_normalization/gamma; "
    "not expected base_model/conv2d_10/kernels (nearest: "
    "base_model/conv2d_10/kernel), base_model/conv2d_2/kernels (nearest: "
    "base_model/conv2d_2/kernel), quite_another_thing; "
    "base_model/conv2d_3/kernel has shape (3, 3, 64, 65), needed (3, 3, 64, 64)"
  )


def test_no_network_at_all():
  with pytest.raises(UserError, match="are not those of a SimCLR ResNet"):
    tf_names.architecture({"conv1/weights": np.zeros((7, 7, 3, 64))})


# A writer of TensorFlow's format, as its documents describe it.


def crc32c(data):
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(crc):
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value):
  data = b""
  while value > 127:
    data += bytes([value & 127 | 128])
    value >>= 7
  return data + bytes([value])


def field(number, value):
  if isinstance(value, bytes):
    return varint(number << 3 | 2) + varint(len(value)) + value
  return varint(number << 3) + varint(value)


def table_block(entries):
  """Entries with shared prefixes, one restart every four."""
  data, restarts, last = b"", [], b""
  for i, (key, value) in enumerate(entries):
    shared = 0
    if i % 4 == 0:
      restarts.append(len(data))
    else:
      while key[shared : shared + 1] == last[shared : shared + 1] != b"":
        shared += 1
    data += varint(shared) + varint(len(key) - shared) + varint(len(value))
    data, last = data + key[shared:] + value, key
  data += b"".join(struct.pack("<I", r) for r in [*restarts, len(restarts)])
  return data


def write_bundle(
  prefix, variables, *, crc=crc32c, endianness=0, graph=None, **fields
):
  """Writes two shards and an index of two blocks."""
  shards = [b"", b""]
  entries = [(b"", field(1, 2) + field(2, endianness))]
  for i, (name, x) in enumerate(sorted(variables.items())):
    data, shard = x.tobytes(), i % 2
    dtype = {"float32": 1, "int64": 9, "bfloat16": 14}[x.dtype.name]
    shape = b"".join(field(2, field(1, n)) for n in x.shape)
    entry = field(1, dtype) + field(2, shape) + field(3, shard)
    entry += field(4, len(shards[shard])) + field(5, len(data))
    entry += varint(6 << 3 | 5) + struct.pack("<I", masked(crc(data)))
    entry += fields.get("entry", b"")
    entries.append((name.encode(), entry))
    shards[shard] += data
  text = field(1, 7) + field(3, 0) + field(4, 0) + field(5, 0)  # a string
  entries.append((b"zz_graph", text))
  if graph is not None:
    data = varint(len(graph)) + b"crc." + graph
    entry = field(1, 7) + field(4, len(shards[0])) + field(5, len(data))
    entries.insert(1, (b"_CHECKPOINTABLE_OBJECT_GRAPH", entry))
    shards[0] += data
  file, handles = b"", []

  def add(block):
    nonlocal file
    handle = varint(len(file)) + varint(len(block))
    file += block + b"\0" + struct.pack("<I", masked(crc32c(block + b"\0")))
    return handle

  half = len(entries) // 2
  for part in (entries[:half], entries[half:]):
    handles.append((part[-1][0], add(table_block(part))))
  footer = add(table_block([])) + add(table_block(handles))
  file += footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
  index = prefix.with_name(prefix.name + ".index")
  index.write_bytes(file)
  for shard, data in enumerate(shards):
    name = f"{prefix.name}.data-{shard:05d}-of-00002"
    prefix.with_name(name).write_bytes(data)
  return index


@pytest.fixture
def some_variables():
  rng = np.random.default_rng(0)
  return {
    "a/bias": rng.normal(size=(7,)).astype(np.float32),
    "a/kernel": rng.normal(size=(3, 3, 5, 7)).astype(np.float32),
    "a/kernel/Momentum": rng.normal(size=(301,)).astype(np.float32),
    "b/half": rng.normal(size=(2, 3)).astype(jax.numpy.bfloat16),
    "c/empty": np.zeros((0, 4), np.float32),
    "global_step": np.asarray(250228, np.int64),
  }


@pytest.mark.parametrize("size", [0, 1, 3, 4, 63, 64, 127, 128, 1000, 5001])
def test_checksum_against_a_bitwise_one(size):
  data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
  assert tf_bundle._masked_crc32c(data) == masked(crc32c(data.tobytes()))


def test_known_checksum():
  assert crc32c(b"123456789") == 0xE3069283  # RFC 3720


@pytest.mark.parametrize("given", ["", ".index", ".data-00000-of-00002", "dir"])
def test_bundle_is_read(tmp_path, some_variables, given):
  prefix = tmp_path / "model.ckpt-1"
  write_bundle(prefix, some_variables)
  path = tmp_path if given == "dir" else f"{prefix}{given}"
  got = tf_bundle.read(path)
  assert got.keys() == some_variables.keys()
  for name, x in some_variables.items():
    assert got[name].dtype == x.dtype
    np.testing.assert_array_equal(got[name], x)


def test_saved_model_is_read(tmp_path, some_variables):
  """Its keys run through a list of variables; the graph has better paths."""
  listed = {
    f"trainable_variables_list/{i}{OBJECT}": x
    for i, x in enumerate(some_variables.values())
  }

  def node(children=(), key=None):
    data = b"".join(
      field(1, field(1, i) + field(2, name.encode())) for name, i in children
    )
    if key is not None:
      entry = field(1, b"VARIABLE_VALUE") + field(2, b"n") + field(3, key)
      data += field(2, entry)
    return field(1, data)

  # Root -> [a list of all, model]; model -> [layer-0, layer -> all].
  first = 4
  leaves = [(str(i), first + i) for i in range(len(listed))]
  graph = node([("trainable_variables_list", 1), ("model", 2)])
  graph += node(leaves)
  graph += node([("layer-0", 3), ("layer", 3)]) + node(leaves)
  graph += b"".join(node(key=key.encode()) for key in listed)
  (tmp_path / "variables").mkdir()
  write_bundle(tmp_path / "variables" / "variables", listed, graph=graph)
  got = tf_bundle.read(tmp_path)
  assert got.keys() == {f"model/layer/{i}{OBJECT}" for i in range(len(listed))}
  for i, x in enumerate(some_variables.values()):
    np.testing.assert_array_equal(got[f"model/layer/{i}{OBJECT}"], x)
  write_bundle(tmp_path / "variables" / "variables", listed, graph=b"\7")
  with pytest.raises(UserError, match="GRAPH cannot be read"):
    tf_bundle.read(tmp_path)


def cut(file, size):
  file.write_bytes(file.read_bytes()[:size])


def spoil(file, at):
  data = bytearray(file.read_bytes())
  data[at] ^= 64
  file.write_bytes(data)


@pytest.mark.parametrize(
  "harm, message",
  [
    (lambda i, d: cut(i, -1), "is not the index .* or is cut off"),
    (lambda i, d: cut(i, 10), "is not the index .* or is cut off"),
    (lambda i, d: i.write_bytes(b""), "is not the index"),
    (lambda i, d: spoil(i, 3), "m.index is damaged"),
    (lambda i, d: spoil(i, -45), "m.index is damaged"),
    (lambda i, d: cut(d, -1), r"is cut off: .* the file has 1\d\d\d"),
    (lambda i, d: d.write_bytes(b""), "is cut off: .* the file has 0"),
    (lambda i, d: spoil(d, 7), "the checksum of a/bias is wrong"),
    (lambda i, d: d.unlink(), "needs .*00000-of-00002, which does not exist"),
    (lambda i, d: i.unlink(), "there is no TensorFlow checkpoint at"),
  ],
)
def test_damaged_bundles(tmp_path, some_variables, harm, message):
  prefix = tmp_path / "m"
  index = write_bundle(prefix, some_variables)
  harm(index, tmp_path / "m.data-00000-of-00002")
  with pytest.raises(UserError, match=message) as error:
    tf_bundle.read(prefix)
  assert "\n" not in str(error.value)


def test_other_kinds_of_bundles(tmp_path, some_variables):
  with pytest.raises(UserError, match="holds no TensorFlow checkpoint"):
    tf_bundle.read(tmp_path)
  write_bundle(tmp_path / "m", some_variables, endianness=1)
  with pytest.raises(UserError, match="big-endian"):
    tf_bundle.read(tmp_path)
  write_bundle(tmp_path / "m", some_variables, entry=field(7, b""))
  with pytest.raises(UserError, match="a/bias is stored in slices"):
    tf_bundle.read(tmp_path)
  write_bundle(tmp_path / "other", some_variables)
  with pytest.raises(UserError, match="several checkpoints, give one of"):
    tf_bundle.read(tmp_path)


def fast_crc32c(data):  # the bitwise one would take a minute
  value = tf_bundle._masked_crc32c(np.frombuffer(data, np.uint8))
  value = (value - 0xA282EAD8) & 0xFFFFFFFF
  return (value >> 17 | value << 15) & 0xFFFFFFFF


def small_network(num_classes=10, width=0.25):
  """A narrow ResNet-18 under its official names."""
  model = models.make_model(
    depth=18, width=width, stem="cifar", num_classes=num_classes, conv="xla"
  )
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  tree = det.variables(jax.eval_shape(model.init, jax.random.key(0), images))
  paths = tf_names.paths(depth=18, sk_ratio=0.0, stem="cifar")
  flat = flatten_dict(tree)
  return tree, {name: np.asarray(flat[path]) for name, path in paths.items()}


@pytest.mark.parametrize("head_layer", [None, 1])
def test_command_writes_a_run(tmp_path, monkeypatch, capsys, head_layer):
  tree, variables = small_network()
  variables["global_step"] = np.asarray(7)
  variables["base_model/conv2d/kernel/Momentum"] = np.zeros(3, np.float32)

  write_bundle(tmp_path / "model.ckpt-7", variables, crc=fast_crc32c)
  monkeypatch.chdir(tmp_path)
  argv = ["--tensorflow_checkpoint=model.ckpt-7", "--workdir=run"]
  names = [f"class {i}" for i in range(10)]
  (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
  if head_layer is not None:
    argv += [f"--head_layer={head_layer}", "--label_names=labels.txt"]
  convert.main(argv)
  num_left_out = 2 if head_layer is not None else 4
  assert f"left out {num_left_out}: " in capsys.readouterr().out
  config, loaded, about = checkpoint.load_described("run")
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert written == json.loads(config_lib.to_json(config))
  assert (config.model.depth, config.model.width) == (18, 0.25)
  assert (config.head.num_layers, config.head.dim) == (3, 128)
  if head_layer is None:
    assert config.stage == "pretrain"
    del tree["params"]["classifier"]
  else:
    assert (config.stage, config.head_layer) == ("finetune", head_layer)
    assert about["label_names"] == names
  jax.tree.map(np.testing.assert_array_equal, loaded, tree)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(SystemExit) as stopped:
    convert.main(argv)
  assert stopped.value.code == 2
  assert "run exists already" in capsys.readouterr().err
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--head_layer=4"], "--head_layer: got 4, but .* 3 layers"),
    (["--head_layer=1", "--label_names=two"], "got 2 names, but .* 10 outputs"),
    (["--head_layer=1", "--label_names=none"], "--label_names=none: No such"),
    (
      ["--head_layer=1", "--label_names=binary"],
      r"--label_names=binary is not text \(UTF-8, a name a line\)",
    ),
    (["--ema"], "no averaged copy"),
    (["--image_size=-1"], "--image_size: got -1, must be above 0"),
  ],
)
def test_command_refuses(tmp_path, monkeypatch, capsys, argv, message):
  _, variables = small_network()
  monkeypatch.setattr(tf_bundle, "read", lambda path: variables)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "two").write_text("a\nb\n")
  (tmp_path / "binary").write_bytes(b"\x89PNG\r\n\xff")
  with pytest.raises(SystemExit) as stopped:
    convert.main(["--tensorflow_checkpoint=x", "--workdir=run", *argv])
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert re.search(message, error) and error.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_repeated_class_names_get_their_number(tmp_path, monkeypatch, capsys):
  """As "crane" and "maillot" in ImageNet's names."""
  _, variables = small_network(num_classes=6)
  monkeypatch.setattr(tf_bundle, "read", lambda path: variables)
  monkeypatch.chdir(tmp_path)
  names = ["crane", "dog", "maillot", "maillot", "crane", "cranes"]
  (tmp_path / "names").write_text("\n".join(names) + "\n")
  argv = ["--tensorflow_checkpoint=x", "--workdir=run", "--head_layer=1"]
  convert.main([*argv, "--label_names=names"])
  assert capsys.readouterr().out.splitlines()[0] == (
    "--label_names: repeated names got their outputs' numbers: crane (0), "
    "maillot (2), maillot (3), crane (4)"
  )
  assert network.load("run").label_names == (
    "crane (0)",
    "dog",
    "maillot (2)",
    "maillot (3)",
    "crane (4)",
    "cranes",
  )


@pytest.mark.parametrize(
  "workdir, message",
  [
    ("gs://bucket/run", r"needs the package gcsfs: .*\[gcs\]"),
    ("hdfs://host/run", r"must be a local path, gs://"),
  ],
)
def test_a_bucket_that_cannot_be_reached(
  tmp_path, monkeypatch, capsys, workdir, message
):
  _, variables = small_network()
  monkeypatch.setattr(tf_bundle, "read", lambda path: variables)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stopped:
    convert.main(["--tensorflow_checkpoint=x", f"--workdir={workdir}"])
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert re.search(message, error) and error.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_a_bucket_gets_the_run(tmp_path, monkeypatch, capsys):
  """A folder stands for the bucket; nothing is written beside it."""
  _, variables = small_network()
  monkeypatch.setattr(tf_bundle, "read", lambda path: variables)
  monkeypatch.chdir(tmp_path)
  bucket = epath.Path(tmp_path) / "bucket"

  def root(workdir):
    if bucket in epath.Path(workdir).parents:  # asked once more
      return workdir
    assert str(workdir).startswith("gs://")
    return bucket / str(workdir).removeprefix("gs://")

  monkeypatch.setattr(storage, "root", root)
  argv = ["--tensorflow_checkpoint=x", "--workdir=gs://mine/run"]
  convert.main(argv)
  assert "into gs://mine/run" in capsys.readouterr().out
  assert (tmp_path / "bucket/mine/run/config.json").exists()
  assert [path.name for path in tmp_path.iterdir()] == ["bucket"]
  with pytest.raises(SystemExit):
    convert.main(argv)
  assert "--workdir=gs://mine/run exists already" in capsys.readouterr().err

  def lost(path):
    raise ConnectionRefusedError(111, "Connection refused")

  monkeypatch.setattr(type(bucket), "exists", lost)
  with pytest.raises(SystemExit) as stopped:
    convert.main(argv)
  assert stopped.value.code == 2
  assert capsys.readouterr().err == (
    "error: --workdir=gs://mine/run cannot be read: Connection refused\n"
  )


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """Runs converted from one checkpoint, and gray pictures in two folders."""
  root = tmp_path_factory.mktemp("official")
  tree, variables = small_network(num_classes=2, width=0.0625)
  variables |= {
    f"ema_model/{name}": value + 1
    for name, value in variables.items()
    if not name.startswith("head_supervised")
  }
  write_bundle(root / "model.ckpt-3", variables, crc=fast_crc32c)
  for name, options in (
    ("pretrained", {}),
    ("averaged", {"ema": True}),
    ("finetuned", {"head_layer": 1, "label_names": ["a", "b"]}),
  ):
    convert.convert(
      root / "model.ckpt-3", root / name, image_size=16, **options
    )
  rng = np.random.default_rng(0)
  for label in "ab":
    (root / "pictures" / label).mkdir(parents=True)
    for i in range(8):
      pixels = rng.integers(0, 256, (20, 20), np.uint8)
      PIL.Image.fromarray(pixels).save(root / f"pictures/{label}/{i}.png")
  return root, tree


def run_stage(module, root, workdir, recipe="folder", **fields):
  stage = module.__name__.rpartition(".")[2]
  config = cli.load_recipe(recipe, stage=stage)
  fields = {
    "batch_size": 8,
    "num_steps": 2,
    "data.name": f"folder:{root / 'pictures'}",
    "model.conv": "xla",
    "report": False,
    **fields,
  }
  for name, value in fields.items():
    config_lib.set_field(config, name, value)
  return module.train_and_evaluate(config, workdir)


def test_pretraining_takes_over_the_network(converted):
  root, tree = converted
  config = cli.load_recipe("folder,depth=18", stage="pretrain")
  config_lib.set_field(config, "pretrained", str(root / "pretrained"))
  loaded = pretrain.resolve_network(config)
  jax.tree.map(
    np.testing.assert_array_equal,
    loaded["params"]["projection_head"],
    tree["params"]["projection_head"],
  )
  # The recipe says depth 50, width 1, 160 pixels and 64 outputs.
  assert (config.model.depth, config.model.width) == (18, 0.0625)
  assert (config.model.stem, config.head.dim) == ("cifar", 128)
  assert (config.data.image_size, config.data.canvas_size) == (16, 16)


@pytest.mark.slow
def test_pretraining_goes_on_with_a_converted_network(converted):
  root, tree = converted
  workdir = root / "continued"
  run_stage(
    pretrain,
    root,
    workdir,
    pretrained=str(root / "averaged"),
    **{"optim.learning_rate": 0.0, "knn.num_neighbors": 2},
  )
  config, variables = checkpoint.load(workdir)
  assert (config.model.depth, config.data.image_size) == (18, 16)
  # Gray pictures, but the network takes three channels.
  for part in ("encoder", "projection_head"):
    jax.tree.map(
      lambda got, last: np.testing.assert_allclose(got, last + 1, rtol=1e-6),
      variables["params"][part],
      tree["params"][part],
    )


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("model.depth", 34, "config.model.depth is 34, but the checkpoint"),
    ("head.num_layers", 2, "config.head.num_layers is 2, but the checkpoint"),
    ("data.image_size", 224, "config.data.image_size is 224, but the"),
    ("data.canvas_size", 24, "config.data.canvas_size is 24, but the"),
  ],
)
def test_pretraining_refuses_another_network(converted, field, value, message):
  root, _ = converted
  with pytest.raises(UserError, match=message) as error:
    run_stage(
      pretrain,
      root,
      root / "refused",
      pretrained=str(root / "pretrained"),
      **{field: value},
    )
  assert "\n" not in str(error.value)
  assert not (root / "refused").exists()


@pytest.mark.slow
def test_other_stages_take_a_converted_network(converted):
  root, tree = converted
  source = {"pretrained": str(root / "pretrained")}
  run_stage(finetune, root, root / "tuned", head_layer=1, **source)
  run_stage(finetune, root, root / "linear", recipe="folder,linear", **source)
  _, linear = checkpoint.load(root / "linear")
  jax.tree.map(
    np.testing.assert_array_equal,
    linear["params"]["encoder"],
    tree["params"]["encoder"],
  )
  run_stage(distill, root, root / "student", teacher=str(root / "finetuned"))
  config, student, about = checkpoint.load_described(root / "student")
  assert (config.model.depth, config.head_layer) == (18, 1)
  assert student["params"]["classifier"]["kernel"].shape == (512 // 16, 2)
  assert about["label_names"] == ["a", "b"]
  embed.embed(
    checkpoint=root / "pretrained",
    data=f"folder:{root / 'pictures'}",
    output=root / "features.npz",
  )
  with np.load(root / "features.npz") as file:
    assert file["features"].shape == (16, 32)
