"""Datasets that TFDS has prepared, read without TensorFlow."""

import hashlib
import json
import os
import shlex

from simclr_jax import config
from simclr_jax.sources.decode import one_line
from simclr_jax.sources.source import Source

# Features of text that tell records apart.
_ID_KEYS = ("file_name", "filename", "image/filename", "id", "image_id")


def open_tfds(name: str, *, split: str, data_dir: str) -> Source:
  """A prepared TFDS dataset, read without TensorFlow.

  Records are parsed and decoded here: TFDS's parser takes longer than
  decoding a small image, and its decoder returns four channels for CMYK and
  RGBA, and palette indices for palette images.
  """
  import tensorflow_datasets as tfds  # Takes a second.
  from tensorflow_datasets.proto import tf_example_pb2

  data_dir = os.path.expanduser(
    data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  )
  builder = _tfds_builder(name, data_dir=data_dir)
  info = builder.info
  image_key, label_key = _tfds_keys(name, info)
  try:
    records = builder.as_data_source(
      split=split,
      file_format="array_record",
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )
  except ValueError as error:
    raise config.UserError(
      f'tfds:{name} has no split "{split}", or it is empty; there are: '
      f"{', '.join(info.splits)}, and slices such as "
      f"{next(iter(info.splits), 'train')}[:10%]."
    ) from error

  def describe(index):
    return f"tfds:{name} {split} record {index} in {builder.data_dir}"

  def read(indices, value=lambda x: x[image_key].bytes_list.value[0]):
    try:
      examples = [
        tf_example_pb2.Example.FromString(record).features.feature
        for record in records.__getitems__(indices)
      ]
      return [
        (
          value(example),
          int(example[label_key].int64_list.value[0]) if label_key else -1,
        )
        for example in examples
      ]
    except Exception as error:  # array_record and protobuf raise many types.
      if len(indices) > 1:  # Find the damaged one.
        return [read([index], value)[0] for index in indices]
      raise config.UserError(
        f"{describe(indices[0])}: cannot be read ({one_line(error)}); "
        "prepare the dataset again."
      ) from error

  def id_of(example):
    return example[id_key].bytes_list.value[0].decode("utf-8", "replace")

  id_key = next((k for k in _ID_KEYS if k in info.features), None)
  channels = info.features[image_key].shape[-1]
  names = info.features[label_key].names if label_key else ()
  splits = [[k, s.shard_lengths, s.num_bytes] for k, s in info.splits.items()]
  content = json.dumps([names, splits])
  digest = hashlib.sha256(content.encode()).hexdigest()
  return Source(
    name=f"tfds:{name}",
    split=split,
    num_examples=len(records),
    read=read,
    describe=describe,
    label_names=tuple(names),
    channels=1 if channels == 1 else 3,
    fingerprint=f"tfds:{info.full_name}:{split}:{len(records)}:{digest[:16]}",
    read_ids=(lambda indices: read(indices, id_of)) if id_key else None,
  )


def _tfds_builder(name, *, data_dir):
  """Finds the dataset on disk; `tfds.builder` may ask the network instead."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  def command(target):
    """What prepares the dataset in that folder."""
    if name == "cifar10":  # without TensorFlow
      return (
        "python -m simclr_jax.datasets prepare cifar10 "
        f"--data_dir={shlex.quote(target)}"
      )
    manual = registered and tfds.builder_cls(base).MANUAL_DOWNLOAD_INSTRUCTIONS
    return (
      f"pip install tensorflow && tfds build {name} "
      f"--file_format=array_record --data_dir={shlex.quote(target)}"
      + (" --manual_dir=FOLDER_OF_ITS_ARCHIVES" if manual else "")
    )

  base = name.split("/")[0].split(":")[0]
  known = set(tfds.list_builders(with_community_datasets=False))
  registered = base in known
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except Exception as error:  # ValueError, OSError, errors of JSON and proto.
    present = os.listdir(data_dir) if os.path.isdir(data_dir) else []
    if registered or base in present:
      raise config.UserError(
        f"tfds:{name} is not prepared in {data_dir}; set data.data_dir (or "
        f"TFDS_DATA_DIR) to where it is, or prepare it: {command(data_dir)}"
      ) from error
    raise config.UserError(
      f"tfds:{name} is neither in {data_dir} nor a dataset that TFDS knows"
      f"{config.nearest(base, sorted(known.union(present)))}"
    ) from error
  formats = sorted(f.value for f in builder.info.available_file_formats())
  if "array_record" not in formats:
    # TFDS does not write a second format beside the first.
    target = data_dir.rstrip("/") + "_array_record"
    raise config.UserError(
      f"tfds:{name} in {data_dir} is stored as {' and '.join(formats)}, which "
      "cannot be read by index; prepare it once more and set "
      f"data.data_dir={target}: {command(target)}"
    )
  return builder


def _tfds_keys(name, info):
  """(image feature, label feature or None) of a dataset."""
  import tensorflow_datasets as tfds

  kinds = (tfds.features.Image, tfds.features.ClassLabel)
  features = dict(info.features.items())
  supervised = [k for k in info.supervised_keys or () if k in features]
  ordered = [*supervised, *features]  # The dataset's own choice first.
  # Not isinstance: a segmentation map is a subclass of an image.
  image_key, label_key = (
    next((k for k in ordered if type(features[k]) is kind), None)
    for kind in kinds
  )
  if image_key is None:
    raise config.UserError(
      f"tfds:{name} has no image feature; it has: {', '.join(features)}."
    )
  return image_key, label_key
