"""What a network says about every image of a dataset, on all devices."""

import functools

import jax
import numpy as np

from simclr_jax import augment, data, parallel


def make_predict(model, *, size: int, dtype, outputs: tuple[str, ...]):
  """Maps inference over all devices.

  Args:
    model: from `models.make_model`.
    size: side of the evaluation view in pixels.
    dtype: of that view.
    outputs: which of the network's outputs to return, such as ("h", "logits").

  Returns:
    predict(variables, dataset, *, batch_size) -> {name: numpy [N, ...]}: rows
    in the order of the dataset, each once, the same on every host. `variables`
    are replicated.
  """

  def forward(variables, batch):
    images = augment.eval_view(
      batch["image"], size=size, sizes=batch["size"]
    ).astype(dtype)
    result = model.apply(variables, images, train=False)
    gather = functools.partial(
      jax.lax.all_gather, axis_name=parallel.AXIS, tiled=True
    )
    return {name: gather(result[name]) for name in outputs}

  mapped = parallel.pmap(forward)

  def predict(variables, dataset, *, batch_size: int) -> dict:
    batches = data.eval_batches(
      dataset,
      batch_size=batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    parts = []
    for batch in parallel.prefetch(batches):
      out = mapped(variables, {k: batch[k] for k in ("image", "size")})
      parts.append(parallel.unreplicate(out))
    return {
      name: np.concatenate([part[name] for part in parts])[: len(dataset)]
      for name in outputs
    }

  return predict
