"""CIFAR-10 from its official archive, without TensorFlow."""

import hashlib
import os
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import auto

from simclr_jax import storage
from simclr_jax.config import UserError
from simclr_jax.datasets.packing import encoded

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def prepare_cifar10(
  data_dir: str | os.PathLike,
  *,
  archive: str | os.PathLike = "",
  url: str = URL,
  sha256: str = SHA256,
) -> Path:
  """Prepares CIFAR-10 with TFDS's own builder, without TensorFlow.

  Args:
    data_dir: where prepared datasets are.
    archive: cifar-10-binary.tar.gz; "" downloads it.
    url: where from.
    sha256: of the archive, in hexadecimal.

  Returns:
    The folder that was written.

  Raises:
    UserError: no such archive, or one with another content; a folder that
      cannot be written.

  >>> prepare_cifar10("datasets", archive="cifar-10-binary.tar.gz")
  Traceback (most recent call last):
    ...
  simclr_jax.errors.UserError: ...cifar-10-binary.tar.gz...
  """
  import tensorflow_datasets as tfds

  given = data_dir
  data_dir = storage.local_folder(given, "--data_dir").absolute()
  if archive:  # What is wrong with it is told before anything is written.
    _verify(Path(archive).expanduser(), sha256)

  class Cifar10(tfds.image_classification.Cifar10, skip_registration=True):  # type: ignore
    """TFDS encodes pixels (and opens archives) with TensorFlow alone."""

    def _split_generators(self, dl_manager):
      dl_manager.download_and_extract = lambda _: temporary
      return super()._split_generators(dl_manager)

    def _generate_examples(self, split_prefix, filepaths):
      records = np.concatenate(
        [np.fromfile(path, np.uint8).reshape(-1, 3073) for path in filepaths]
      )  # a byte of the label and three planes of 32 x 32 each
      for key, record in enumerate(records):
        image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        yield (
          key,
          {
            "id": f"{split_prefix}{key:05}",
            "image": encoded(image, "PNG"),
            "label": int(record[0]),
          },
        )

  with storage.writable(given, "--data_dir"):
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
      if archive:
        file = Path(archive).expanduser()
      else:
        file = Path(temporary, "archive.tar.gz")
        _download(url, file)
        _verify(file, sha256)
      with tarfile.open(file) as tar:
        tar.extractall(temporary, filter="data")
      builder = Cifar10(data_dir=str(data_dir), file_format="array_record")
      builder.download_and_prepare(
        download_dir=temporary,
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  return Path(builder.data_dir)


def _verify(archive, sha256):
  try:
    with open(archive, "rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise UserError(f"{archive}: cannot be read ({error.strerror}).") from None
  if found != sha256:
    raise UserError(
      f"{archive} is not the official cifar-10-binary.tar.gz: its SHA-256 is "
      f"{found}, not {sha256}."
    )


def _download(url, file):
  try:
    with urllib.request.urlopen(url, timeout=60) as response:
      size = int(response.headers.get("Content-Length") or 0) or None
      with (
        open(file, "wb") as target,
        auto.tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar,
      ):
        while part := response.read(1 << 20):
          target.write(part)
          bar.update(len(part))
  except OSError as error:
    raise UserError(
      f"{url} cannot be downloaded ({error}); get it in another "
      "way and name it with --archive."
    ) from error
