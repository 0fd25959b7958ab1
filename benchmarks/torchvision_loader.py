"""What data.py compares with, in the environment of torch and torchvision.

torchvision's loader makes two SimCLR views of 224 pixels of every image of a
folder, in one process and thread, once for each line of the standard input.
"""

import importlib.util
import pathlib
import re
import sys

import torch

# A CPU build of torch lacks torchvision's operators; their names are enough.
library = torch.library.Library("torchvision", "DEF")
where = pathlib.Path(importlib.util.find_spec("torchvision").origin)
text = where.with_name("_meta_registrations.py").read_text()
names = re.findall(r'(?:register_meta\("|torchvision::)(\w+)"', text)
for name in set(names):
  try:
    library.define(f"{name}(Tensor x) -> Tensor")
  except RuntimeError:  # this build has them
    break

from torchvision import datasets, transforms  # noqa: E402


def main():
  torch.set_num_threads(1)
  view = transforms.Compose(
    [
      transforms.RandomResizedCrop(224),
      transforms.RandomHorizontalFlip(),
      transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
      transforms.RandomGrayscale(0.2),
      transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], 0.5),
      transforms.ToTensor(),
    ]
  )
  images = datasets.ImageFolder(sys.argv[1], lambda x: (view(x), view(x)))
  loader = torch.utils.data.DataLoader(images, batch_size=64, shuffle=True)
  print("ready", flush=True)
  for _ in sys.stdin:
    for _ in loader:
      pass
    print("done", flush=True)


if __name__ == "__main__":
  main()
