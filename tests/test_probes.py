"""probes.py against NumPy and scikit-learn."""

import numpy as np
import pytest
from sklearn import linear_model

from simclr_jax import probes
from simclr_jax.config import UserError

PROBES = [probes.knn, probes.linear, probes.ridge]


def blobs(n=90, classes=6, features=8, noise=1.5, seed=0):
  """Features around a centre a class, and the labels; classes overlap."""
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % classes
  centres = np.random.default_rng(99).normal(size=(classes, features))
  x = centres[labels] + noise * rng.normal(size=(n, features))
  return x.astype(np.float32), labels


def split():
  return *blobs(seed=1), *blobs(n=61, seed=2)


def numpy_top_k(scores, labels):
  order = np.argsort(-scores, axis=1, kind="stable")
  hits = order == labels[:, None]
  return {f"top{k}": hits[:, :k].any(1).mean() for k in (1, 5)}


def numpy_knn(train, labels, test, classes, k, temperature):
  def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  similarities = unit(test) @ unit(train).T
  votes = np.zeros((len(test), classes))
  for row, scores in enumerate(similarities):
    for i in np.argsort(-scores)[:k]:
      votes[row, labels[i]] += np.exp(scores[i] / temperature)
  return votes


@pytest.mark.parametrize("k, temperature", [(7, 0.07), (200, 0.5)])
def test_knn_is_the_weighted_vote(k, temperature):
  train, labels, test, test_labels = split()
  got = probes.knn(
    train,
    labels,
    test,
    test_labels,
    num_classes=6,
    k=k,
    temperature=temperature,
  )
  votes = numpy_knn(train, labels, test, 6, k, temperature)
  want = numpy_top_k(votes, test_labels)
  assert 0.3 < want["top1"] < want["top5"]
  assert got == pytest.approx(want)


def test_knn_votes_and_its_blocks(monkeypatch):
  """The votes themselves, with test rows that do not fill the last block."""
  train, labels, test, test_labels = split()
  options = {"num_classes": 6, "k": 7, "temperature": 0.3}
  whole = probes.knn(train, labels, test, test_labels, **options)
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
  votes = probes._knn_votes(unit[0], labels, unit[1], block_size=10, **options)
  want = numpy_knn(train, labels, test, 6, 7, 0.3)
  np.testing.assert_allclose(votes * np.exp(1 / 0.3), want, rtol=1e-4)
  monkeypatch.setattr(probes, "_BLOCK_NUMBERS", 10 * len(train))
  assert probes.knn(train, labels, test, test_labels, **options) == whole


def test_linear_is_logistic_regression_at_its_optimum():
  train, labels, test, test_labels = split()
  mean = train.mean(0)
  scale = 1 / np.sqrt(np.mean((train - mean) ** 2))
  l2 = 0.01
  peer = linear_model.LogisticRegression(
    C=1 / (l2 * len(train)), tol=1e-8, max_iter=5000
  ).fit((train - mean) * scale, labels)
  kernel, bias = probes._logistic(
    (train - mean) * scale, labels, 6, l2, num_steps=200
  )
  np.testing.assert_allclose(kernel.T, peer.coef_, atol=1e-3)
  scores = peer.decision_function((test - mean) * scale)
  np.testing.assert_allclose(
    (test - mean) * scale @ np.asarray(kernel) + bias - np.mean(bias),
    scores - np.mean(peer.intercept_),
    atol=5e-3,
  )
  got = probes.linear(train, labels, test, test_labels, num_classes=6, l2=l2)
  assert got == pytest.approx(numpy_top_k(scores, test_labels))


def test_ridge_is_least_squares():
  train, labels, test, test_labels = split()
  mean = train.mean(0)
  scale = 1 / np.sqrt(np.mean((train - mean) ** 2))
  x = (train - mean) * scale
  peer = linear_model.Ridge(alpha=0.1 * len(x)).fit(x, np.eye(6)[labels])
  kernel, bias = probes._least_squares(x, labels, 6, 0.1)
  np.testing.assert_allclose(kernel.T, peer.coef_, atol=1e-5)
  np.testing.assert_allclose(bias, peer.intercept_, atol=1e-6)
  got = probes.ridge(train, labels, test, test_labels, num_classes=6, l2=0.1)
  scores = peer.predict((test - mean) * scale)
  assert got == pytest.approx(numpy_top_k(scores, test_labels))


@pytest.mark.parametrize("probe", PROBES)
def test_unlabelled_rows_are_left_out(probe):
  train, labels, test, test_labels = split()
  want = probe(train, labels, test, test_labels, num_classes=6)
  garbage = np.full((7, train.shape[1]), 50, np.float32)
  unknown = np.full(7, -1)
  got = probe(
    np.concatenate([garbage, train]),
    np.concatenate([unknown, labels]),
    np.concatenate([test, garbage]),
    np.concatenate([test_labels, unknown]),
    num_classes=6,
  )
  assert got == want


@pytest.mark.parametrize("probe", PROBES)
def test_probes_of_separate_classes_are_perfect(probe):
  train, labels = blobs(noise=0.01, seed=1)
  test, test_labels = blobs(noise=0.01, n=61, seed=2)
  for _ in range(2):
    got = probe(train, labels, test, test_labels, num_classes=6)
    assert got == {"top1": 1.0, "top5": 1.0}
  wrong = probe(train, labels, test, (test_labels + 1) % 6, num_classes=6)
  assert wrong["top1"] == 0


@pytest.mark.parametrize("probe", [probes.knn, probes.ridge])
def test_fewer_than_5_classes(probe):
  train, labels = blobs(classes=3, seed=1)
  got = probe(train, labels, *blobs(classes=3, seed=2), num_classes=3)
  assert got["top1"] < got["top5"] == 1


@pytest.mark.parametrize("probe", [probes.knn, probes.ridge])
def test_one_label_a_class_is_enough(probe):
  train, labels = blobs(noise=0.01, n=6)
  got = probe(train, labels, *blobs(noise=0.01, seed=2), num_classes=6)
  assert got["top1"] == 1


def test_top_k_leaves_out_unlabelled():
  logits = np.eye(10)[[3, 3, 1, 9]]
  got = probes.top_k(logits, np.array([3, 4, -1, 9]))
  assert got == {"top1": pytest.approx(2 / 3), "top5": 1.0}


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("side", [0, 2])
@pytest.mark.parametrize("shape", [(3,), (7,), (6, 1)])
def test_labels_of_another_shape_are_refused(probe, side, shape):
  h, labels = np.eye(6, dtype=np.float32), np.arange(6)
  arrays = [h, labels, h, labels]
  arrays[side + 1] = np.zeros(shape, int)
  message = rf"and \({shape[0]},.*; expected \[n, C\] and \[n\]"
  with pytest.raises(UserError, match=message) as caught:
    probe(*arrays, num_classes=6)
  assert "\n" not in str(caught.value)


def test_mistakes_get_one_line():
  train, labels, test, test_labels = split()
  with pytest.raises(UserError, match="no labelled image"):
    probes.top_k(np.eye(3), np.full(3, -1))
  for probe in PROBES:
    with pytest.raises(UserError, match="label 5 with 4 classes"):
      probe(train, labels, test, test_labels, num_classes=4)
    with pytest.raises(UserError, match="no labelled image"):
      probe(train, labels * 0 - 1, test, test_labels, num_classes=6)
