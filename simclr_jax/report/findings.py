"""What the samples of a run say: maps, neighbours, confusions, mistakes."""

import warnings

import numpy as np
from sklearn import decomposition, manifold

from simclr_jax import diagnostics
from simclr_jax.report.run import Missing, Run


def notes(run: Run) -> list[tuple[int, str]]:
  """(step, text) of what the run said about its numbers while it trained."""
  options = {}
  if run.stage == "pretrain":
    options = {
      "num_pairs": run.num_pairs,
      "temperature": run.config["loss.temperature"],
    }
    if "learning_rate" in run.metrics:  # highest where the warm-up ends
      steps, rates = run.metrics["learning_rate"]
      options["warmup_steps"] = int(steps[np.argmax(rates)])
  advice = diagnostics.Advice(**options)
  return [
    (line["step"], text)
    for line in run.lines
    if "loss" in line
    for text in advice(line["step"], line)
  ]


def unit(features: np.ndarray) -> np.ndarray:
  """Rows [m, C] at length 1, float64; a zero row stays zero."""
  features = features.astype(np.float64)
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return features / np.maximum(norms, 1e-12)


def similarities(run: Run) -> tuple[np.ndarray, str]:
  """Cosines [n, n] of a batch, and what its rows and columns are.

  Of z between the two views of p pairs, which is what NT-Xent compares; where
  there is one view, of h minus its mean (h is never negative, so raw cosines
  are all near 1) between images sorted by class.
  """
  if "z" in run.samples:
    z1, z2 = np.split(unit(run.samples["z"]), 2)
    # Neighbours on the axes are alike where the labels are known.
    order = np.argsort(run.samples["z_labels"], kind="stable")
    return z1[order] @ z2[order].T, "views"
  features, labels = run.need("features", "labels")
  some = np.linspace(0, len(features) - 1, min(64, len(features))).astype(int)
  some = some[np.argsort(labels[some], kind="stable")]
  h = unit(features[some] - features.mean(0))
  return h @ h.T, "images"


def pca(run: Run) -> np.ndarray:
  """The features on their two main axes, [m, 2]."""
  (features,) = run.need("features")
  return _reduced(features, 2)


def tsne(run: Run) -> np.ndarray:
  """The features by t-SNE, [m, 2]; the same at each call."""
  (features,) = run.need("features")
  x = _reduced(features, 50)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # collapsed features divide by zero
    return manifold.TSNE(
      perplexity=min(30, (len(x) - 1) / 3),
      max_iter=500,
      init="pca",
      random_state=0,
    ).fit_transform(x)


def _reduced(features, count):
  x = unit(features)
  if len(x) < 4:
    count = "1 image is" if len(x) == 1 else f"{len(x)} images are"
    raise Missing(f"{count} too few for a map.")
  if not np.isfinite(x).all():
    raise Missing("The features are not finite.")
  if np.ptp(x, axis=0).max() < 1e-6:
    raise Missing("All images have the same features: the network collapsed.")
  count = min(count, *x.shape)
  x = decomposition.PCA(count, random_state=0).fit_transform(x)
  return np.pad(x, ((0, 0), (0, max(0, 2 - count))))


def neighbours(
  run: Run, *, num_queries: int = 8, k: int = 6
) -> list[tuple[int, list[tuple[int, float]]]]:
  """(image, its k nearest with their cosines) for images of many classes."""
  features, labels = run.need("features", "labels")
  x = unit(features)
  first = np.unique(labels, return_index=True)[1]  # one of each class
  rest = np.setdiff1d(np.arange(len(x)), first)
  queries = np.concatenate([rng_order(first), rng_order(rest)])[:num_queries]
  cosines = x[queries] @ x.T
  cosines[np.arange(len(queries)), queries] = -np.inf  # not itself
  nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(k, len(x) - 1)]
  return [
    (int(q), [(int(i), float(row[i])) for i in near])
    for q, near, row in zip(queries, nearest, cosines, strict=True)
  ]


def rng_order(indices: np.ndarray) -> np.ndarray:
  """The same indices in a random order, the same at each call."""
  return np.random.default_rng(0).permutation(indices)


def confusion(run: Run) -> np.ndarray:
  """Counts [K, K]: row the true class, column the predicted one."""
  if "predictions" not in run.samples and "features" in run.samples:
    raise Missing("This network has no classifier.")
  predictions, labels = run.need("predictions", "labels")
  known = labels >= 0
  if not known.any():
    raise Missing("No evaluation image has a label.")
  count = np.zeros((len(run.label_names),) * 2, int)
  np.add.at(count, (labels[known], predictions[known]), 1)
  return count


def mistakes(run: Run, *, most: int = 18) -> list[int]:
  """Wrongly classified images, the most confident ones first."""
  predictions, labels, confidence = run.need(
    "predictions", "labels", "confidence"
  )
  wrong = np.flatnonzero((labels >= 0) & (predictions != labels))
  order = np.argsort(-confidence[wrong], kind="stable")[:most]
  return [int(i) for i in wrong[order]]
