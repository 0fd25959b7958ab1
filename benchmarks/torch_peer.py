"""The peers' side of the benchmarks: PyTorch, lightly, kornia, one process.

Started by rounds.py in the peers' environment. Prints its versions, then runs a
round for each line that it reads and prints the seconds that it took.
"""

import importlib.metadata
import json
import os
import sys
import time

import numpy as np
import PIL.Image
import torch

if not torch.cuda.is_available():
  # torchvision's operators are missing on a CPU build, and their names must be
  # there before it is imported; none of them is used here.
  lib = torch.library.Library("torchvision", "DEF")
  for name in (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "qroi_align",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
  ):
    lib.define(f"{name}(Tensor x) -> Tensor")

import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_transform(o):
  """Without their normalisation, which is no part of SimCLR's views."""
  return SimCLRTransform(
    input_size=o["size"],
    cj_strength=o["strength"],
    gaussian_blur=o["blur"],
    normalize=None,
  )


def views(o):
  """Two views of each image, in `processes` processes; nothing is passed on."""
  import multiprocessing

  pixels = np.random.default_rng(0).integers(
    0, 256, (o["count"], o["canvas"], o["canvas"], 3), np.uint8
  )
  torch.set_num_threads(1)
  images = [PIL.Image.fromarray(x) for x in pixels]
  global _part

  def _part(i):
    transform = make_transform(o)
    for image in images[i :: o["processes"]]:
      transform(image)

  pool = multiprocessing.get_context("fork").Pool(o["processes"])

  def one_round():
    pool.map(_part, range(o["processes"]), chunksize=1)

  return one_round


def kornia_views(o):
  """Two views of a batch on the device, by kornia's batched augmentation."""
  import kornia.augmentation as K

  s = o["strength"]
  operations = [
    K.RandomResizedCrop((o["size"], o["size"]), scale=(0.08, 1.0)),
    K.RandomHorizontalFlip(p=0.5),
    K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=0.8),
    K.RandomGrayscale(p=0.2),
  ]
  if o["blur"]:
    kernel = o["size"] // 10 | 1
    operations.append(
      K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=o["blur"])
    )
  transform = K.AugmentationSequential(*operations, data_keys=["input"])
  pixels = np.random.default_rng(0).integers(
    0, 256, (o["count"], 3, o["canvas"], o["canvas"]), np.uint8
  )
  images = torch.from_numpy(pixels).to(DEVICE)

  def one_round():
    with torch.no_grad():
      x = images.float() / 255
      transform(x), transform(x)
    _wait()

  one_round()
  return one_round


class Network(torch.nn.Module):
  """torchvision's ResNet and lightly's head with three layers."""

  def __init__(self, o):
    super().__init__()
    net = getattr(torchvision.models, f"resnet{o['depth']}")
    width = round(64 * o["width"])
    if width == 64:
      encoder = net()
    else:
      blocks = {18: (2, 2, 2, 2)}[o["depth"]]
      encoder = _narrow(blocks, width)
    features = encoder.fc.in_features
    if o["size"] <= 64:
      encoder.conv1 = torch.nn.Conv2d(3, width, 3, 1, 1, bias=False)
      encoder.maxpool = torch.nn.Identity()
    encoder.fc = torch.nn.Identity()
    self.encoder = encoder
    self.head = SimCLRProjectionHead(features, features, 128, num_layers=3)

  def forward(self, x):
    return self.head(self.encoder(x))


def _narrow(blocks, width):
  """A ResNet of basic blocks with fewer channels than torchvision offers."""
  block = torchvision.models.resnet.BasicBlock
  net = torchvision.models.ResNet(block, list(blocks))
  net.inplanes = width
  net.bn1 = torch.nn.BatchNorm2d(width)
  for i, count in enumerate(blocks):
    layer = net._make_layer(block, width * 2**i, count, 1 if i == 0 else 2)
    setattr(net, f"layer{i + 1}", layer)
  net.fc = torch.nn.Linear(8 * width, 10)
  return net


def exp_sum_loss(z1, z2, temperature=0.5):
  """NT-Xent in the form of solo-learn: exponentials, then sums, then logs."""
  z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
  e = torch.exp(z @ z.T / temperature)
  n = len(z1)
  positive = torch.cat([e.diagonal(n), e.diagonal(-n)])
  return -torch.log(positive / (e.sum(1) - e.diagonal())).mean()


def make_step(o):
  """Views [2n, 3, H, W] on the device -> nothing; updates the network."""
  torch.backends.cudnn.benchmark = True
  model = Network(o).to(DEVICE, memory_format=torch.channels_last).train()
  optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
  loss_fn = NTXentLoss(temperature=0.5)
  if o.get("loss") == "exp_sum":
    loss_fn = exp_sum_loss
  forward = torch.compile(model) if o["compile"] else model
  half = torch.autocast(
    DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"
  )

  def step(x):
    with half:
      z1, z2 = forward(x).chunk(2)
      loss = loss_fn(z1, z2)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()

  return step


def _wait():
  if DEVICE.type == "cuda":
    torch.cuda.synchronize()


def step(o):
  """Network, loss, gradient and update on views that are there already."""
  run = make_step(o)
  x = torch.rand(2 * o["batch"], 3, o["size"], o["size"], device=DEVICE)
  x = x.to(memory_format=torch.channels_last)

  def one_round():
    for _ in range(o["steps"]):
      run(x)
    _wait()

  for _ in range(3):
    one_round()  # compiling, and cuDNN's choices
  return one_round


class Images(torch.utils.data.Dataset):
  """Decoded images in memory (.npy), or JPEG files of a folder."""

  def __init__(self, o):
    self.transform = make_transform(o)
    path = o["path"]
    is_array = path.endswith(".npy")
    self.images = np.load(path) if is_array else None
    self.files = (
      [] if is_array else [f"{path}/{f}" for f in sorted(os.listdir(path))]
    )

  def __len__(self):
    return len(self.files) if self.images is None else len(self.images)

  def __getitem__(self, i):
    if self.images is None:
      with PIL.Image.open(self.files[i]) as file:
        return self.transform(file.convert("RGB"))
    return self.transform(PIL.Image.fromarray(self.images[i]))


def train(o):
  """Images through workers and transform into the step."""
  run = make_step(o)
  images = Images(o)
  loader = torch.utils.data.DataLoader(
    images,
    batch_size=o["batch"],
    sampler=torch.utils.data.RandomSampler(
      images, num_samples=o["steps"] * o["batch"]
    ),
    num_workers=o["workers"],
    persistent_workers=True,
    prefetch_factor=4,
    pin_memory=DEVICE.type == "cuda",
  )

  def one_round():
    for pair in loader:  # the workers make one round's and wait
      x = torch.cat([views.to(DEVICE, non_blocking=True) for views in pair])
      run(x.to(memory_format=torch.channels_last))
    _wait()

  shape = (2 * o["batch"], 3, o["size"], o["size"])
  run(torch.rand(shape, device=DEVICE).to(memory_format=torch.channels_last))
  return one_round


def main():
  work = {
    "views": views,
    "kornia_views": kornia_views,
    "step": step,
    "train": train,
  }[sys.argv[1]]
  one_round = work(json.loads(sys.argv[2]))
  versions = {
    name: importlib.metadata.version(name)
    for name in ("torch", "torchvision", "lightly", "kornia", "pillow")
  }
  print(json.dumps(versions), flush=True)
  for _ in sys.stdin:
    begin = time.perf_counter()
    one_round()
    print(json.dumps(time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
  main()
