"""Looking at a dataset before training, packing it, preparing CIFAR-10.

  python -m simclr_jax.datasets check folder:PATH --image_size=160
  python -m simclr_jax.datasets pack folder:PATH --output=DIR --canvas_size=240
  python -m simclr_jax.datasets prepare cifar10 --data_dir=DIR

`check` names damaged files and duplicates, measures how fast images are decoded
and says what canvas to take. `pack` decodes everything once into a folder that
TFDS reads too (`tfds:packed` in it), which streams about five times as fast.
`prepare` downloads the official archive, or takes it where --archive says.
"""

from simclr_jax.datasets.checking import check
from simclr_jax.datasets.cifar10 import prepare_cifar10
from simclr_jax.datasets.packing import pack

__all__ = ["check", "pack", "prepare_cifar10"]
