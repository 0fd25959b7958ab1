"""What a network says about every image of a dataset, on all devices."""

import functools

import jax
import numpy as np

from simclr_jax import augment, data, parallel


def make_stream(model, *, size: int, dtype, outputs: tuple[str, ...]):
  """Maps inference over all devices, one batch after the other.

  Args:
    model: from `models.make_model`.
    size: side of the evaluation view in pixels.
    dtype: of that view.
    outputs: which of the network's outputs to return, such as ("h", "logits").

  Returns:
    stream(variables, dataset, *, batch_size, start=0), which yields {name:
    numpy [n, ...]}: n = batch_size rows, fewer at the end, in the order of the
    dataset from `start` on, each once, the same on every host. Beside
    `outputs` there is "label", and "replaced" where the dataset has it.
    `variables` are replicated.
  """

  def forward(variables, batch):
    images = augment.eval_view(
      batch.pop("image"), size=size, sizes=batch.pop("size"), dtype=dtype
    )
    result = model.apply(variables, images, train=False)
    gather = functools.partial(
      jax.lax.all_gather, axis_name=parallel.AXIS, tiled=True
    )
    return jax.tree.map(gather, batch | {k: result[k] for k in outputs})

  mapped = parallel.pmap(forward)

  def stream(variables, dataset, *, batch_size: int, start: int = 0):
    batches = data.eval_batches(
      dataset,
      batch_size=batch_size,
      start=start,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    missing, waiting = len(dataset) - start, None

    def rows(out):
      nonlocal missing
      found = jax.tree.map(lambda x: x[:missing], parallel.unreplicate(out))
      missing -= batch_size
      return found

    for batch in parallel.prefetch(batches):
      batch.pop("weight")
      out = mapped(variables, batch)
      if waiting is not None:  # read while the next one is computed
        yield rows(waiting)
      waiting = out
    if waiting is not None:
      yield rows(waiting)

  return stream


def make_predict(model, *, size: int, dtype, outputs: tuple[str, ...]):
  """As `make_stream`, for outputs that fit the memory.

  Returns:
    predict(variables, dataset, *, batch_size) -> {name: numpy [N, ...]}.
    `labels` of a streamed dataset are then right on every host: for a damaged
    image, -1 where it was dropped, or the label of the image in its place.
  """
  stream = make_stream(model, size=size, dtype=dtype, outputs=outputs)

  def predict(variables, dataset, *, batch_size: int) -> dict:
    parts = list(stream(variables, dataset, batch_size=batch_size))
    found = {
      name: np.concatenate([part[name] for part in parts])
      for name in ("label", *outputs)
    }
    labels = found.pop("label")
    if isinstance(dataset, data.Streamed):  # each host has read a part of it
      dataset.note_labels(labels)
    return found

  return predict
