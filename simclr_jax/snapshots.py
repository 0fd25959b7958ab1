"""What the report shows of images: report.npz, made at the end of a stage."""

import io
import traceback

import jax
import numpy as np
from etils import epath
from PIL import Image

from simclr_jax import augment, report, storage

_NUM_PAIRS = 64  # of the similarity matrix; also images at a time
_NUM_SHOWN = 12  # of them with their views
_NUM_FEATURES = 1000
_IMAGE_SIDE, _THUMBNAIL_SIDE = 96, 32  # pixels, at most


def save(workdir, config, state, model, train, test, views_fn) -> None:
  """Writes report.npz and report.html where `config.report` asks for them.

  On host 0 and one of its devices. A fault here is printed, not raised: the
  run is complete.

  Args:
    workdir: the run's directory.
    config: of the run, resolved.
    state: its last `TrainState`, numpy leaves.
    model: its network.
    train: the dataset that it was trained on.
    test: the dataset that it was evaluated on, or None.
    views_fn: (key, images, index=, sizes=) -> [2n, H, H, C] or [n, H, H, C].
  """
  if not config.report or jax.process_index() != 0:
    return
  try:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    arrays = take(config, variables, model, train, test, views_fn)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    with storage.writing(workdir):
      (epath.Path(workdir) / report.SAMPLES).write_bytes(file.getvalue())
      report.write(workdir)
  except Exception as error:
    traceback.print_exc()
    print(f"warning: no report was written: {error}", flush=True)


def take(config, variables, model, train, test, views_fn) -> dict:
  """The arrays of report.npz; arguments as in `save`.

  Returns:
    "originals" uint8 [n, P, P, C], top left in squares, "original_sizes" int32
    [n, 2]; "views" uint8 [2n or n, V, V, C], view 1 first, and their "boxes"
    float32 [.., 4]: top, left, height, width as fractions of the original.
    "z" [2p, D] of p pairs, view 1 first, with "z_labels" [p], where there are
    two views. "features" float32 [m, C] of evaluation images with "labels",
    "thumbnails" uint8 [m, T, T, C], and where the network has a classifier
    "predictions" int32 [m] and "confidence" float32 [m], a probability.
    "label_names" and "split" are text.
  """
  rng = np.random.default_rng(config.seed)
  forward = jax.jit(_forward(model))
  arrays = _views(config, variables, forward, train, views_fn, rng)
  shown = train if test is None else test
  split = config.data.split if test is None else config.data.eval_split
  chosen = _some(rng, len(shown), _NUM_FEATURES)
  parts = []
  for start in range(0, len(chosen), _NUM_PAIRS):
    batch = shown.gather(chosen[start : start + _NUM_PAIRS])
    images = augment.eval_view(
      batch["image"], size=config.data.image_size, sizes=batch["size"]
    )
    out = _padded(forward, variables, images)
    part = {
      "features": out["h"].astype(np.float32),
      "labels": batch["label"],
      "thumbnails": _pixels(images, _THUMBNAIL_SIDE),
    }
    if "logits" in out:
      part["predictions"] = out["logits"].argmax(1).astype(np.int32)
      probabilities = jax.nn.softmax(out["logits"])
      part["confidence"] = np.max(probabilities, 1).astype(np.float32)
    parts.append(part)
  arrays |= {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  names = [str(name) for name in train.label_names]
  return arrays | {"label_names": np.array(names, str), "split": split}


def _forward(model):
  def forward(variables, images):
    out = model.apply(variables, images, train=False)
    return {k: out[k] for k in ("h", "z", "logits") if k in out}

  return forward


def _views(config, variables, forward, train, views_fn, rng) -> dict:
  batch = train.gather(_some(rng, len(train), _NUM_PAIRS))
  key, index = jax.random.key(config.seed), np.arange(len(batch["label"]))
  views = jax.jit(views_fn)(
    key, batch["image"], index=index, sizes=batch["size"]
  )
  boxes = augment.view_boxes(
    key,
    index=index,
    sizes=batch["size"],
    area_range=config.augment.area_range,
    aspect_range=config.augment.aspect_range,
  )
  n, count = len(index), len(views) // len(index)
  shown = np.arange(min(n, _NUM_SHOWN))
  rows = np.concatenate([shown + n * i for i in range(count)])
  sizes = np.asarray(batch["size"])
  scale = np.tile(sizes[rows % n], 2)  # height, width of top, left and the box
  originals = [
    _pixels(image[None, :height, :width] / 255, _IMAGE_SIDE)[0]
    for image, (height, width) in zip(
      batch["image"][shown], sizes[shown], strict=True
    )
  ]
  side = max(max(image.shape[:2]) for image in originals)
  arrays = {
    "originals": np.stack([_on_square(image, side) for image in originals]),
    "original_sizes": np.array([x.shape[:2] for x in originals], np.int32),
    "views": _pixels(np.asarray(views)[rows], _IMAGE_SIDE),
    "boxes": (np.asarray(boxes)[rows] / scale).astype(np.float32),
  }
  if count == 2:
    z = [_padded(forward, variables, half)["z"] for half in np.split(views, 2)]
    arrays |= {"z": np.concatenate(z), "z_labels": batch["label"]}
  return arrays


def _some(rng, count: int, most: int) -> np.ndarray:
  return np.sort(rng.choice(count, min(count, most), replace=False))


def _padded(forward, variables, images) -> dict:
  """The outputs for up to _NUM_PAIRS images, by one compiled program."""
  n = len(images)
  images = np.pad(images, ((0, _NUM_PAIRS - n), (0, 0), (0, 0), (0, 0)))
  return {k: np.asarray(v)[:n] for k, v in forward(variables, images).items()}


def _pixels(images, side: int) -> np.ndarray:
  """[n, H, W, C] in [0, 1] to uint8, the longer side at most `side`."""
  images = np.round(np.asarray(images, np.float32) * 255).astype(np.uint8)
  height, width = images.shape[1:3]
  scale = side / max(height, width)
  if scale >= 1:
    return images
  size = max(1, round(width * scale)), max(1, round(height * scale))
  box = Image.Resampling.BOX
  small = [
    np.asarray(Image.fromarray(image.squeeze()).resize(size, box))
    for image in images
  ]
  return np.stack(small).reshape(len(images), size[1], size[0], -1)


def _on_square(image, side: int) -> np.ndarray:
  height, width = image.shape[:2]
  return np.pad(image, ((0, side - height), (0, side - width), (0, 0)))
