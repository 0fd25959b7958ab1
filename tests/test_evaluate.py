"""Protocols on frozen features: what trains, what tests, mean and spread."""

import json

import numpy as np
import pytest
from made_run import apply, make_run

from simclr_jax import augment, evaluate, probes, sources
from simclr_jax.config import UserError

NAMES = [f"class {k}" for k in range(6)]


def blobs(n=90, noise=1.5, seed=1):
  """Features around a centre a class; every seventh has no label."""
  rng = np.random.default_rng(seed)
  labels = np.arange(n, dtype=np.int32) % 6
  centres = np.random.default_rng(99).normal(size=(6, 8))
  x = centres[labels] + noise * rng.normal(size=(n, 8))
  labels[::7] = -1
  return x.astype(np.float32), labels


def write(path, x, labels, **more):
  columns = {"features": x, "labels": labels, "label_names": NAMES} | more
  np.savez(path, **columns)
  return str(path)


@pytest.fixture
def files(tmp_path):
  train = write(tmp_path / "train.npz", *blobs())
  return train, write(tmp_path / "test.npz", *blobs(61, seed=2))


def spy(monkeypatch, name="knn"):
  """Has a probe note what it is given: [(x, y, test x, test y), ..]."""
  real, protocol = evaluate.PROBES[name]
  calls = []

  def probe(*arrays, **options):
    calls.append(arrays)
    return real(*arrays, **options)

  monkeypatch.setitem(evaluate.PROBES, name, (probe, protocol))
  return calls


def keys(x):
  return {row.tobytes() for row in np.asarray(x)}


def test_all_labels_are_what_the_probes_say(files, capsys):
  train, test = files
  result = evaluate.evaluate(
    features=train, test_features=test, num_neighbors=7
  )
  arrays = (*blobs(), *blobs(61, seed=2))
  want = {
    "knn": probes.knn(*arrays, num_classes=6, k=7),
    "linear (L-BFGS)": probes.linear(*arrays, num_classes=6),
    "linear (closed form)": probes.ridge(*arrays, num_classes=6),
  }
  rows = {row["protocol"]: row for row in result["results"]}
  assert list(rows) == list(want)
  assert len({row["top1"] for row in rows.values()}) > 1
  for protocol, row in rows.items():
    assert {k: row[k] for k in ("top1", "top5")} == want[protocol]
    assert row["num_labels"] == sum(blobs()[1] >= 0)
    assert row["num_test"] == sum(blobs(61)[1] >= 0)
    assert row["top1_std"] is None
  table = capsys.readouterr().out.splitlines()
  assert len(table) == 4
  assert len({len(line) for line in table}) == 1
  assert f"{want['knn']['top1']:.1%}" in table[1]


def test_folds_test_every_labelled_image_once(files, monkeypatch):
  calls = spy(monkeypatch)
  result = evaluate.evaluate(features=files[0], probe_names=["knn"], folds=4)
  x, labels = blobs()
  labelled = keys(x[labels >= 0])
  assert len(calls) == 4
  tested = [keys(test) for _, _, test, _ in calls]
  assert set.union(*tested) == labelled
  assert sum(map(len, tested)) == len(labelled)
  for (train, _, _, test_labels), fold in zip(calls, tested, strict=True):
    assert keys(train) == labelled - fold
    assert np.ptp(np.bincount(test_labels, minlength=6)) <= 1  # stratified
  (row,) = result["results"]
  assert row["protocol"] == "knn 4 folds"
  top1 = [run["top1"] for run in row["runs"]]
  mean = sum(top1) / 4
  spread = (sum((x - mean) ** 2 for x in top1) / 3) ** 0.5
  assert row["top1"] == pytest.approx(mean)
  assert row["top1_std"] == pytest.approx(spread) and spread > 0


@pytest.mark.parametrize("has_test", [True, False])
def test_low_shot_draws(files, monkeypatch, has_test):
  """n of each class, other ones each draw; the rest or the test file tests."""
  calls = spy(monkeypatch, "ridge")
  options = {"test_features": files[1]} if has_test else {}
  result = evaluate.evaluate(
    features=files[0],
    probe_names=["ridge"],
    per_class=[2, 3],
    draws=4,
    **options,
  )
  protocols = [row["protocol"] for row in result["results"][1:]]
  assert protocols == [f"linear (closed form) {n} per class" for n in (2, 3)]
  calls = calls[-8:]  # after all labels, or the folds
  x, labels = blobs()
  labelled = keys(x[labels >= 0])
  for i, (train, y, test, _) in enumerate(calls):
    assert np.bincount(y).tolist() == [2 + i // 4] * 6
    assert keys(train) <= labelled
    if has_test:
      assert keys(test) == keys(blobs(61, seed=2)[0])
    else:
      assert keys(test) == labelled - keys(train)
  assert len({frozenset(keys(train)) for train, *_ in calls}) == 8
  for row in result["results"][1:]:
    assert row["top1_std"] > 0 and len(row["runs"]) == 4


def test_the_runs_own_predictions(files, tmp_path):
  x, labels = blobs(61, seed=2)
  predictions = np.where(np.arange(61) < 30, labels, (labels + 1) % 6)
  test = write(tmp_path / "p.npz", x, labels, predictions=predictions)
  row, _ = evaluate.evaluate(
    features=files[0], test_features=test, probe_names=["knn"]
  )["results"]
  assert row["protocol"] == "classifier of the run"
  assert row["top1"] == pytest.approx(
    np.mean((predictions == labels)[labels >= 0])
  )


def test_a_run_is_evaluated_on_its_own_splits(tmp_path):
  settings, variables = make_run(
    tmp_path / "run", stage="pretrain", channels=1, knn__num_neighbors=9
  )
  output = tmp_path / "result.json"
  result = evaluate.evaluate(
    checkpoint=str(tmp_path / "run"),
    probe_names=["knn"],
    batch_size=240,
    output=str(output),
  )
  arrays = []
  for split in ("train", "test"):
    source = sources.make_source("digits", split=split)
    images = np.stack([image for image, _ in source.fetch(range(len(source)))])
    views = augment.eval_view(images, size=8)
    arrays += [apply(settings, variables, views)["h"], source.labels]
  want = probes.knn(*arrays, num_classes=10, k=9)
  (row,) = result["results"]
  assert (row["num_labels"], row["num_test"]) == (1437, 360)
  assert row["top1"] == pytest.approx(want["top1"], abs=0.01)
  assert want["top1"] > 0.3
  stored = json.loads(output.read_text())
  assert stored == result
  assert stored["num_neighbors"] == 9
  assert stored["checkpoint"]["step"] == 7
  assert stored["versions"]["jax"] and stored["device"]


def test_mistakes_get_one_line(files, tmp_path):
  train, test = files
  x, labels = blobs()
  other = write(tmp_path / "other.npz", x[:, :5], labels)
  few = write(tmp_path / "few.npz", x[:9], labels[:9])
  empty = tmp_path / "empty.npz"
  np.savez(empty, labels=labels)
  pickled = tmp_path / "pickled.npz"
  np.savez(pickled, features=np.array([{}], object))
  no_labels = write(tmp_path / "none.npz", x, np.full_like(labels, -1))
  taken = tmp_path / "taken.json"
  taken.write_text("mine")
  for options, message in (
    ({}, "either --checkpoint=DIR or --features=FILE"),
    ({"features": str(empty)}, "empty.npz has no \"features\", only 'labels'"),
    ({"features": str(pickled)}, "is not a file of features"),
    ({"features": str(taken)}, "is not a file of features"),
    ({"features": str(tmp_path / "no.npz")}, "there is no file"),
    ({"features": no_labels}, "labels of 0 classes"),
    ({"features": train, "test_features": other}, "differ in features a row"),
    ({"features": train, "test_features": test, "folds": 3}, "without --folds"),
    ({"features": few}, '--folds: 5 asked for, but class "class 0" has'),
    ({"features": train, "per_class": [99]}, "--per_class: 99 asked for"),
    ({"features": train, "probe_names": ["knm"]}, 'did you mean "knn"'),
    ({"features": train, "output": str(taken)}, "exists already"),
    ({"checkpoint": str(tmp_path)}, "--checkpoint: .*no checkpoints"),
  ):
    with pytest.raises(UserError, match=message) as caught:
      evaluate.evaluate(**options)
    assert "\n" not in str(caught.value)
  assert taken.read_text() == "mine"


def test_the_command(files, capsys):
  evaluate.main(
    [f"--features={files[0]}", "--probes=ridge", "--per_class=1", "--draws=2"]
  )
  out = capsys.readouterr().out
  assert "linear (closed form) 5 folds" in out
  assert "linear (closed form) 1 per class" in out
  with pytest.raises(SystemExit) as end:
    evaluate.main(["--features=nowhere.npz"])
  assert end.value.code == 2
  assert capsys.readouterr().err == (
    "error: --features: there is no file nowhere.npz\n"
  )
