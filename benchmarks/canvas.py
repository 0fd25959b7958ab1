"""How much detail crops from a canvas lose against crops from the full file.

The official code crops the full-resolution image; here the host shrinks it to a
canvas first. For the two photographs of scikit-learn (640x427), shrunk with
antialiasing to several canvases, views of 224 pixels of the same boxes (drawn
by the official law) are compared with those from the full file, by crop area:

  difference   mean of |pixel - pixel|, of 255
  sharpness    mean |difference of neighbours|, over that of the other view

  python benchmarks/canvas.py [--output=canvas.json]      (a minute)
"""

import argparse
import itertools
import json
import pathlib

import jax
import numpy as np
from sklearn import datasets

from simclr_jax import augment
from simclr_jax.sources import decode

SIZE, NUM_CROPS = 224, 500
AREAS = (0.08, 0.2, 0.4, 0.7, 1.0)
CANVASES = (224, 280, 336, 448)


def sharpness(views):
  """[n, H, W, C] -> [n]."""
  across = np.abs(np.diff(views, axis=2)).mean((1, 2, 3))
  return across + np.abs(np.diff(views, axis=1)).mean((1, 2, 3))


@jax.jit
def crops(image, boxes):
  """Bicubic without antialiasing, as official; boxes may be fractions."""

  def crop(box):
    scale = SIZE / box[2:]
    return jax.image.scale_and_translate(
      image / 255,
      (SIZE, SIZE, 3),
      (0, 1),
      scale,
      -box[:2] * scale,
      method="cubic",
      antialias=False,
    )

  return jax.numpy.clip(jax.lax.map(crop, boxes), 0.0, 1.0)


def compare(photo, key):
  """(area of each crop [n], {canvas: (difference, sharpness) [2, n]})."""
  shape = photo.shape[:2]
  boxes = np.asarray(
    augment.sample_crop_boxes(
      key,
      shape,
      num=NUM_CROPS,
      area_range=(0.08, 1.0),
      aspect_range=(0.75, 4 / 3),
    ),
    np.float32,
  )
  full = np.asarray(crops(photo.astype(np.float32), boxes))
  found = {}
  for canvas in CANVASES:
    small = decode.decode(photo, channels=3, max_size=canvas)
    scale = np.float32(np.tile(np.divide(small.shape[:2], shape), 2))
    views = np.asarray(crops(small.astype(np.float32), boxes * scale))
    difference = 255 * np.abs(views - full).mean((1, 2, 3))
    found[canvas] = np.stack([difference, sharpness(views) / sharpness(full)])
  return boxes[:, 2] * boxes[:, 3] / (shape[0] * shape[1]), found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--output", default="", help="JSON")
  args = parser.parse_args()
  photos = datasets.load_sample_images().images
  results = [
    compare(photo, jax.random.key(i)) for i, photo in enumerate(photos)
  ]
  areas = np.concatenate([area for area, _ in results])
  rows = []
  print("canvas  crop area    crops  difference  sharpness")
  for canvas in CANVASES:
    values = np.concatenate([found[canvas] for _, found in results], axis=1)
    for low, high in [*itertools.pairwise(AREAS), (0.08, 1.0)]:
      inside = (areas >= low) & (areas <= high)
      difference, sharp = values[:, inside].mean(1)
      rows.append(
        dict(
          canvas=canvas,
          area=(low, high),
          crops=int(inside.sum()),
          difference=round(float(difference), 2),
          sharpness=round(float(sharp), 3),
        )
      )
      print(
        f"{canvas:6}  {low:.2f}..{high:.2f} {inside.sum():8} "
        f"{difference:11.2f} {sharp:10.3f}",
        flush=True,
      )
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
  main()
