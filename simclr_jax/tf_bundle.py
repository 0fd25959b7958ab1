"""Reads the variables of a TensorFlow checkpoint without TensorFlow.

A checkpoint ("tensor bundle") is PREFIX.index, a LevelDB table from names to
where a tensor lies, and PREFIX.data-0000i-of-0000n, the raw tensors. Layouts:
tensorflow/core/protobuf/tensor_bundle.proto and leveldb/doc/table_format.md.
"""

import re
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from simclr_jax.config import UserError

_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# Where Keras and SavedModels list variables and layers a second time.
_LISTS = r"variables|keras_api|signatures|losses|^layer[-_]"
_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
# tensorflow/core/framework/types.proto; other types (strings) are left out.
_DTYPES: dict[int, Any] = {
  1: np.float32,
  2: np.float64,
  3: np.int32,
  4: np.uint8,
  5: np.int16,
  6: np.int8,
  9: np.int64,
  10: np.bool_,
  14: jnp.bfloat16,
  19: np.float16,
}


def _crc_table():
  table = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    table = np.where(
      table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1
    )
  return table


def _masked_crc32c(data: np.ndarray) -> int:
  """The checksum that TensorFlow stores for the bytes `data`, uint8 [n].

  A loop over bytes would take a minute for a ResNet-50. The checksum is linear,
  so the bytes are cut into rows, all rows go through the table together, and
  neighbours are joined: shifting the left one past the right is linear too.
  """
  table = _crc_table()

  def through(crc, columns):
    for byte in columns:
      crc = (crc >> 8) ^ table[(crc ^ byte) & 255]
    return crc

  num_rows = 1 << min(max(len(data) // 64, 1).bit_length() - 1, 16)
  length = -(-max(len(data), 4) // num_rows)
  padded = np.zeros(num_rows * length, np.uint8)
  start = len(padded) - len(data)  # leading zeros change nothing
  padded[start:] = data
  # The checksum starts from all ones, as if the first 4 bytes were inverted.
  ones = np.full(4, 255, np.uint8)[: len(data)]
  padded[start : start + 4] ^= ones
  columns = np.ascontiguousarray(padded.reshape(num_rows, length).T)
  crc = through(np.zeros(num_rows, np.uint32), columns)
  # shift[i, b] is what byte b at place i of a checksum becomes after one row.
  place = np.arange(4, dtype=np.uint32)[:, None] * 8
  shift = np.arange(256, dtype=np.uint32)[None] << place
  zero = np.zeros((), np.uint8)
  shift = through(shift, [zero] * length)

  def shifted(x):
    parts = [shift[i][(x >> (8 * i)) & 255] for i in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]

  while len(crc) > 1:
    crc = shifted(crc[::2]) ^ crc[1::2]
    shift = shifted(shift)
  # Fewer than 4 bytes leave the rest of those ones at the end.
  value = int(crc[0]) ^ 0xFFFFFFFF ^ (0xFFFFFFFF >> (8 * min(len(data), 4)))
  return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(data, at):
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _message(data):
  """A protocol buffer as {field: [values]}; messages stay bytes."""
  fields, at = {}, 0
  while at < len(data):
    tag, at = _varint(data, at)
    if tag & 7 == 0:
      value, at = _varint(data, at)
    elif tag & 7 == 5:
      (value,), at = struct.unpack_from("<I", data, at), at + 4
    elif tag & 7 == 2:
      size, at = _varint(data, at)
      value, at = data[at : at + size], at + size
    else:
      raise ValueError(f"wire type {tag & 7}")
    fields.setdefault(tag >> 3, []).append(value)
  return fields


def _block(data, handle):
  """Yields (key, value) of the block of a table at (offset, size)."""
  offset, size = handle
  block = data[offset : offset + size]
  kind, crc = struct.unpack_from("<BI", data, offset + size)
  checked = np.frombuffer(data[offset : offset + size + 1], np.uint8)
  if kind != 0 or crc != _masked_crc32c(checked):
    raise ValueError("a block is compressed or damaged")
  (num_restarts,) = struct.unpack_from("<I", block, size - 4)
  at, end, key = 0, size - 4 - 4 * num_restarts, b""
  while at < end:
    shared, at = _varint(block, at)
    added, at = _varint(block, at)
    length, at = _varint(block, at)
    key = key[:shared] + block[at : at + added]
    at += added
    yield key, block[at : at + length]
    at += length


def _handle(data, at=0):
  offset, at = _varint(data, at)
  size, at = _varint(data, at)
  return (offset, size), at


def _index(file):
  """{name: fields of its BundleEntryProto}, "" being the header's."""
  data = file.read_bytes()
  if len(data) < _FOOTER or (
    struct.unpack_from("<Q", data, len(data) - 8)[0] != _MAGIC
  ):
    raise UserError(
      f"{file} is not the index of a TensorFlow checkpoint, or is cut off"
    )
  try:
    _, at = _handle(data, len(data) - _FOOTER)  # of the empty meta index
    blocks = list(_block(data, _handle(data, at)[0]))
    return {
      key.decode(): _message(value)
      for _, where in blocks
      for key, value in _block(data, _handle(where)[0])
    }
  except (ValueError, IndexError, struct.error) as error:
    raise UserError(f"{file} is damaged: {error}") from None


def _attribute_paths(graph):
  """Key in the bundle -> path of attributes; TrackableObjectGraph in `graph`.

  A key is the shortest path to a variable, which in a SavedModel leads through
  a list of all variables and says nothing.
  """
  nodes = [_message(node) for node in _message(graph).get(1, [])]
  paths, queue, keys = {0: ""}, [0], {}
  for i in queue:
    for child in map(_message, nodes[i].get(1, [])):
      (j,), name = child.get(1, [0]), child[2][0].decode()
      if j not in paths and not re.search(_LISTS, name):
        paths[j] = f"{paths[i]}{name}/"
        queue.append(j)
    for attribute in map(_message, nodes[i].get(2, [])):
      name, key = attribute[1][0].decode(), attribute[3][0].decode()
      keys[key] = f"{paths[i]}.ATTRIBUTES/{name}"
  return keys


def _find(path):
  """The index of a prefix, a folder, or one of the checkpoint's own files."""
  path = Path(path).expanduser()
  if path.is_dir():  # a SavedModel keeps its own in variables/
    found = sorted([*path.glob("*.index"), *path.glob("variables/*.index")])
    if len(found) == 1:
      return found[0]
    names = ", ".join(str(file)[: -len(".index")] for file in found)
    raise UserError(
      f"{path} holds several checkpoints, give one of {names}"
      if found
      else f"{path} holds no TensorFlow checkpoint (no file *.index)"
    )
  prefix = str(path).removesuffix(".index").partition(".data-")[0]
  file = Path(prefix + ".index")
  if not file.is_file():
    raise UserError(
      f"there is no TensorFlow checkpoint at {path}: {file} does not exist; "
      "give the path up to .index, on this machine's disk"
    )
  return file


def read(path) -> dict[str, np.ndarray]:
  """The numeric variables of a checkpoint, checksums compared.

  Args:
    path: PREFIX (also with .index or .data-...), or a folder with one
      checkpoint or SavedModel.

  Returns:
    name -> array, read from the files when it is used; TF1 names, or object
    paths of a TF2 checkpoint or SavedModel.

  Raises:
    UserError: no such file, one of another kind, cut off or damaged.
  """
  index = _find(path)
  entries = _index(index)
  header = entries.pop("", {})
  num_shards = header.get(1, [1])[0]
  if header.get(2, [0])[0]:
    raise UserError(f"{index} is in big-endian byte order, which is not read")
  shards: dict[int, np.ndarray] = {}

  def stored(name, entry):
    """The bytes of a tensor."""
    shard, offset, size = (entry.get(k, [0])[0] for k in (3, 4, 5))
    file = index.with_suffix(f".data-{shard:05d}-of-{num_shards:05d}")
    if shard not in shards:
      if not file.is_file():
        raise UserError(f"{index} needs {file}, which does not exist")
      is_empty = not file.stat().st_size  # which cannot be mapped
      shards[shard] = (
        np.empty(0, np.uint8) if is_empty else np.memmap(file, np.uint8, "r")
      )
    data = shards[shard][offset : offset + size]
    if len(data) != size:
      raise UserError(
        f"{file} is cut off: {name} should end at byte {offset + size}, the "
        f"file has {len(shards[shard])}"
      )
    return data, file

  paths, variables = {}, {}
  if _OBJECT_GRAPH in entries:
    data, file = stored(_OBJECT_GRAPH, entries.pop(_OBJECT_GRAPH))
    try:  # one string: its length, the checksum of that, the text
      text = data.tobytes()
      paths = _attribute_paths(text[_varint(text, 0)[1] + 4 :])
    except (ValueError, IndexError, KeyError, struct.error) as error:
      raise UserError(
        f"{file} is damaged: {_OBJECT_GRAPH} cannot be read ({error})"
      ) from None
  for name, entry in entries.items():
    dtype = _DTYPES.get(entry.get(1, [0])[0])
    if dtype is None:
      continue
    if 7 in entry:
      raise UserError(f"{index}: {name} is stored in slices, which is not read")
    data, file = stored(name, entry)
    shape = [
      _message(dim).get(1, [0])[0]
      for dim in _message(entry.get(2, [b""])[0]).get(2, [])
    ]
    if len(data) != int(np.prod(shape)) * np.dtype(dtype).itemsize:
      raise UserError(f"{index}: {name} has not the size of its shape {shape}")
    if _masked_crc32c(data) != entry.get(6, [None])[0]:
      raise UserError(f"{file} is damaged: the checksum of {name} is wrong")
    variables[paths.get(name, name)] = data.view(dtype).reshape(shape)
  return variables
