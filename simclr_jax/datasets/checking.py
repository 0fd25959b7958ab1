"""What is in a dataset: sizes, classes, damage, duplicates, decoding speed."""

import collections
import hashlib
import io
import math
import time

import numpy as np
import PIL.Image
from tqdm import auto

from simclr_jax import sources
from simclr_jax.config import UserError
from simclr_jax.data import fetch, memory
from simclr_jax.sources import workers
from simclr_jax.sources.labels_csv import shown

# Images that one thread looks at before it takes others.
CHUNK = 64


def check(
  source: sources.Source, *, image_size: int = 0, images_per_second: float = 0.0
) -> dict:
  """Reads and decodes every image of a source.

  Args:
    source: from `sources.make_source`.
    image_size: side that the network will see in pixels, for the canvas; 0
      leaves this out.
    images_per_second: of the training step, to say whether decoding keeps up.

  Returns:
    "num_examples", "damaged" (list of messages), "duplicates" (list of lists of
    names with the same content), "classes" (name -> count, "" for unlabelled),
    "heights" and "widths" (least, median, largest), "modes" (Pillow's modes of
    the stored images -> count), "images_per_second" (decoded, all cores),
    "canvas_size" and "canvas_gib" (with image_size), "feeds" (whether decoding
    keeps up with `images_per_second`, else None).

  Raises:
    UserError: a number below 0, or not finite.

  >>> found = check(sources.make_source("digits", split="test"), image_size=16)
  >>> found["num_examples"], found["damaged"], found["canvas_size"]
  (360, [], 8)
  """
  numbers = {"image_size": image_size, "images_per_second": images_per_second}
  for name, number in numbers.items():
    if not 0 <= number < math.inf:
      raise UserError(f"--{name} must be 0 or more, got {number}.")
  begin = time.perf_counter()
  max_size = image_size * 3 // 2 if image_size > 64 else image_size

  def look(start):
    found = []
    for i in range(start, min(start + CHUNK, len(source))):
      try:
        ((record, _),) = source.read([i])
        mode, size = header(record)
        # Damage inside is found by decoding as training does.
        ((_, label),) = source.fetch([i], max_size=max_size)
        digest = hashlib.sha256(_bytes(record)).digest()
        found.append((i, label, mode, size, digest))
      except UserError as error:
        found.append((i, error))
      except Exception:  # Pillow's header reader; decoding says what it is.
        (error,) = fetch.fetch_each(source, [i], max_size=max_size)
        found.append((i, error))
    return found

  looked = []
  starts = range(0, len(source), CHUNK)
  with auto.tqdm(total=len(source), unit="image", disable=None) as bar:
    for found in workers.threads().map(look, starts):
      looked += found
      bar.update(len(found))
  rate = len(looked) / max(time.perf_counter() - begin, 1e-9)
  good = [item for item in looked if len(item) == 5]
  same = collections.defaultdict(list)
  for i, _, _, _, digest in good:
    same[digest].append(source.describe(i))
  counts = collections.Counter(label for _, label, *_ in good)
  names = {-1: "", **dict(enumerate(source.label_names))}
  sizes = np.array([size for *_, size, _ in good] or [(0, 0)])
  report = {
    "num_examples": len(source),
    "damaged": [str(item[1]) for item in looked if len(item) == 2],
    "duplicates": [group for group in same.values() if len(group) > 1],
    "classes": {
      name: counts[k] for k, name in names.items() if k >= 0 or counts[k]
    },
    "heights": _spread(sizes[:, 0]),
    "widths": _spread(sizes[:, 1]),
    "modes": dict(collections.Counter(mode for _, _, mode, *_ in good)),
    "images_per_second": round(rate, 1),
    "feeds": rate >= images_per_second if images_per_second else None,
  }
  if image_size:
    # No more than the images have; 3/2 of the view, so that crops are sharp.
    canvas = int(min(max_size, max(sizes.max(), 1)))
    report["canvas_size"] = canvas
    report["canvas_gib"] = len(source) * canvas**2 * source.channels / 2**30
  return report


def _spread(values):
  return int(values.min()), int(np.median(values)), int(values.max())


def _bytes(record):
  return record.tobytes() if isinstance(record, np.ndarray) else record


def header(record):
  """(Pillow's mode, (height, width)) of a record."""
  if isinstance(record, np.ndarray):
    return "L" if record.shape[-1] == 1 else "RGB", record.shape[:2]
  with PIL.Image.open(io.BytesIO(record)) as image:
    return image.mode, (image.height, image.width)


def print_report(
  report: dict, source: sources.Source, images_per_second: float
) -> None:
  """Prints what `check` returned, in lines."""
  lines = [f"{source.name} {source.split}: {report['num_examples']} images"]
  for name in ("heights", "widths"):
    low, middle, high = report[name]
    lines.append(f"{name}: {low} to {high} pixels, median {middle}")
  modes = ", ".join(f"{m} {n}" for m, n in sorted(report["modes"].items()))
  lines.append(f"stored as {modes}; read as {source.channels} channel(s)")
  if source.num_classes:
    classes = ", ".join(
      f"{shown(name) or '(unlabelled)'} {n}"
      for name, n in report["classes"].items()
    )
    lines.append(f"classes: {classes}")
  else:
    lines.append("no labels")
  lines.append(f"damaged: {len(report['damaged'])}")
  lines += [f"  {message}" for message in report["damaged"]]
  groups = report["duplicates"]
  lines.append(f"contents that are there more than once: {len(groups)}")
  lines += [f"  {' = '.join(group)}" for group in groups]
  rate, cores = report["images_per_second"], workers.num_cores()
  lines.append(f"read and decoded: {rate:.0f} images/s on {cores} core(s)")
  in_memory = False
  if "canvas_size" in report:
    budget = memory.budget_bytes() / 2**30
    in_memory = report["canvas_gib"] <= budget
    lines.append(
      f"take config.data.canvas_size={report['canvas_size']}: "
      f"{report['canvas_gib']:.2f} GiB, "
      + (
        "kept in memory" if in_memory else f"streamed (above {budget:.1f} GiB)"
      )
    )
  if report["feeds"] is not None:
    if report["feeds"] or in_memory:
      how = "from memory" if in_memory else "streamed"
      lines.append(f"feeds a step of {images_per_second:g} images/s, {how}")
    else:
      lines.append(
        f"does not feed a step of {images_per_second:g} images/s if streamed: "
        f"about {images_per_second / rate * cores:.0f} cores would; or pack it"
      )
  print("\n".join(lines), flush=True)
