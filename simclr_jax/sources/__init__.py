"""Random access to images and labels: digits, tfds:NAME, folder:PATH.

Opening a source reads no image, but for the pixels of a few 16-bit ones;
`Source.fetch` reads and decodes some.
"""

import re

from simclr_jax import config
from simclr_jax.sources import digits, folder, prepared
from simclr_jax.sources.source import Source

__all__ = ["Source", "as_flags", "make_source"]


def make_source(
  name: str,
  *,
  split: str,
  data_dir: str = "",
  labels: str = "",
  eval_fraction: float = 0.0,
  seed: int = 0,
) -> Source:
  """Opens a dataset; never downloads anything.

  Args:
    name: "digits" (scikit-learn's 1,797 handwritten digits, 8x8 pixels),
      "tfds:NAME" (a dataset that TFDS has prepared as array_record) or
      "folder:PATH" (a tree of image files).
    split: for digits "train" (1,437 images) or "test" (360); for TFDS what
      the dataset has, also with slices such as "train[:10%]"; for a folder
      see `folder.open_folder`.
    data_dir: where prepared TFDS datasets are; "" is TFDS_DATA_DIR or TFDS's
      own default.
    labels: of a folder: "" (find out), "folders", "none" or a csv.
    eval_fraction: of a folder's labelled images, to hold out as "test".
    seed: of the train/test split where the dataset has none of its own
      (digits, folders). Keep it the same in all stages of one experiment, or
      the test images of one stage have been trained on in another.

  Returns:
    A `Source`.

  Raises:
    config.UserError: unknown name or split, a dataset not prepared, a
      negative seed.

  Example:
    >>> source = make_source("digits", split="train")
    >>> len(source), source.num_classes, source[0][0].shape
    (1437, 10, (8, 8, 1))
  """
  if seed < 0:
    raise config.UserError(f"the seed of a split must not be negative: {seed}.")
  kind, _, rest = name.partition(":")
  if kind == "folder" and rest:
    return folder.open_folder(
      rest, split=split, labels=labels, eval_fraction=eval_fraction, seed=seed
    )
  if name == "folder:":
    raise config.UserError(
      'data.name is "folder:"; name the folder of the images: folder:PATH.'
    )
  known = name == "digits" or (kind == "tfds" and rest)
  if known and (labels or eval_fraction):
    field = "labels" if labels else "eval_fraction"
    raise config.UserError(
      f"data.{field} is for folder:PATH; {name} has labels and splits of its "
      f"own. Set data.{field}={' (to nothing)' if labels else '0.0'}."
    )
  if name == "digits":
    return digits.open_digits(split=split, seed=seed)
  if kind == "tfds" and rest:
    return prepared.open_tfds(rest, split=split, data_dir=data_dir)
  raise config.UserError(
    f'data.name is "{name}"; it must be digits, tfds:NAME or folder:PATH'
    f"{config.nearest(kind, ['digits', 'tfds', 'folder'])}"
  )


def as_flags(text: str, *, name: str) -> str:
  """Calls the fields of a config what they are called on a command line.

  Args:
    text: a message that names fields.
    name: what the command calls `data.name`.

  >>> as_flags("data.name: there is no folder x.", name="--data")
  '--data: there is no folder x.'
  """
  text = re.sub(r"\b(config\.)?data\.name\b", name, text)
  fields = "data_dir|labels|on_error|eval_fraction|split"
  return re.sub(rf"\b(config\.)?data\.({fields})\b", r"--\2", text)
