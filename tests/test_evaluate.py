"""Protocols on frozen features: what trains, what tests, mean and spread."""

import json

import numpy as np
import PIL.Image
import pytest
from made_run import apply, make_run

from simclr_jax import augment, embed, evaluate, probes, sources
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


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
  """A folder of images of three kinds, seven of them without a label."""
  folder = tmp_path_factory.mktemp("pets") / "images"
  rng = np.random.default_rng(0)
  for k, name in enumerate(("ant", "cat", "dog", "unlabelled")):
    (folder / name).mkdir(parents=True)
    for i in range(7 if k == 3 else 20):
      pixels = rng.integers(20 * k, 150 + 20 * k, (8, 8, 3)).astype(np.uint8)
      PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
  return folder


DIGITS = [str(k) for k in range(10)]


@pytest.mark.parametrize(
  "names, is_shown",
  [
    (DIGITS, False),
    (["dog", "cat"], False),  # no ant
    (["dog", "ox", "ant", "cat"], True),  # in another order, and one more
    (["ant", "cat", "dog"], True),
    (None, False),
  ],
)
def test_a_run_and_its_file_give_the_same(pets, tmp_path, names, is_shown):
  run, file = tmp_path / "run", tmp_path / "pets.npz"
  make_run(
    run,
    stage="finetune" if names else "pretrain",
    num_classes=names and len(names),
    names=names or (),
    data__name=f"folder:{pets}",
    data__eval_split="",
    **({} if names else {"knn__num_neighbors": 3}),
  )
  embed.embed(run, f"folder:{pets}", file, batch_size=16)
  options = {"per_class": [2], "draws": 2}
  of_run = evaluate.evaluate(checkpoint=str(run), batch_size=16, **options)
  of_file = evaluate.evaluate(features=str(file), **options)
  assert of_run["results"] == of_file["results"]
  assert of_run["num_neighbors"] == of_file["num_neighbors"]
  first, *rows = of_run["results"]
  assert (first["protocol"] == "classifier of the run") == is_shown
  assert {row["top5"] for row in rows} == {1.0}  # of three classes
  if is_shown:
    with np.load(file) as content:
      labels, predictions = content["labels"], content["predictions"]
    assert first["num_test"] == 60 == sum(labels >= 0)
    assert first["top1"] == np.mean((predictions == labels)[labels >= 0])


def test_two_files_of_other_classes_than_the_classifiers(tmp_path):
  """Only what both have in label_names counts the classifier's."""
  x, labels = blobs()
  own = np.where(labels < 0, -1, labels % 2 + 1)  # class 1 and class 2
  about = {"num_outputs": 6, "data_classes": [2, 1]}
  both = [
    write(tmp_path / f"{k}.npz", x, own, about=json.dumps(about), predictions=p)
    for k, p in enumerate((own, np.zeros_like(own)))
  ]
  options = {"probe_names": ["knn"]}
  row, knn = evaluate.evaluate(
    features=both[1], test_features=both[0], **options
  )["results"]
  assert (row["top1"], knn["top5"]) == (1.0, 1.0)
  result = evaluate.evaluate(features=both[0], test_features=both[1], **options)
  assert result["results"][0]["top1"] == 0.0
  assert not {"num_outputs", "data_classes"} & result.keys()


def test_labels_that_came_after_embedding(tmp_path):
  """Of an unlabelled folder, by hand: they count."""
  x, labels = blobs()
  about = json.dumps({"num_outputs": 6, "data_classes": []})
  file = write(tmp_path / "a.npz", x, labels, about=about)
  options = {"probe_names": ["knn"]}
  bare = evaluate.evaluate(features=write(tmp_path / "b.npz", *blobs()))
  result = evaluate.evaluate(features=file, **options)
  assert result["results"][0]["top1"] == bare["results"][0]["top1"]


def test_a_test_file_without_names_lacks_the_highest_class(tmp_path):
  x, labels = blobs()
  few = np.where(labels == 5, -1, labels)
  paths = [str(tmp_path / f"{k}.npz") for k in range(2)]
  for path, y in zip(paths, (labels, few), strict=True):
    np.savez(path, features=x, labels=y)
  named = write(tmp_path / "named.npz", x, few)
  want = probes.ridge(x, labels, x, few, num_classes=6)
  result = evaluate.evaluate(
    features=paths[0], test_features=paths[1], probe_names=["ridge"]
  )
  assert result["results"][0]["top1"] == want["top1"]
  evaluate.evaluate(
    features=paths[1], test_features=paths[0], probe_names=["ridge"]
  )
  with pytest.raises(UserError, match="differ in label_names"):
    evaluate.evaluate(features=named, test_features=paths[1])


@pytest.mark.parametrize("about", ["my features", "5", '{"checkpoint": "me"}'])
def test_what_others_call_about(tmp_path, about):
  train = write(tmp_path / "a.npz", *blobs(), about=about)
  test = write(tmp_path / "b.npz", *blobs(61, seed=2), about=about)
  result = evaluate.evaluate(
    features=train, test_features=test, probe_names=["ridge"]
  )
  assert len(result["results"]) == 1


def test_labels_of_a_type_without_sign(tmp_path):
  x, labels = blobs()
  x, labels = x[labels >= 0], labels[labels >= 0]
  np.savez(tmp_path / "a.npz", features=x, labels=labels.astype(np.uint8))
  result = evaluate.evaluate(
    features=str(tmp_path / "a.npz"), probe_names=["ridge"]
  )
  assert result["results"][0]["num_test"] == round(len(x) / 5)


def test_an_output_that_cannot_be_is_refused_first(
  files, tmp_path, monkeypatch
):
  def probe(*arrays, **options):
    pytest.fail("it has been computed")

  monkeypatch.setitem(evaluate.PROBES, "knn", (probe, "knn"))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "folder").mkdir()
  (tmp_path / "taken.json").write_text("mine")
  before = sorted(tmp_path.rglob("*"))
  for output, message in (
    ("taken.json/r.json", f"{tmp_path}/taken.json is no folder to write to"),
    ("taken.json/no/r.json", f"{tmp_path}/taken.json is no folder to write to"),
    ("folder", "folder exists already"),
    ("~/taken.json", "exists already"),
    ("gs://mine/r.json", "must be a local file"),
  ):
    with pytest.raises(UserError, match=f"--output={output}.*") as caught:
      evaluate.evaluate(features=files[0], output=output)
    assert message in str(caught.value) and "\n" not in str(caught.value)
  assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_of_the_output_is_made(files, tmp_path):
  """As `embed` does; and a probe, or a number, need be in no list."""
  output = tmp_path / "new" / "deep" / "r.json"
  result = evaluate.evaluate(
    features=files[0], probe_names="ridge", per_class=1, output=str(output)
  )
  assert json.loads(output.read_text()) == result
  assert [row["protocol"] for row in result["results"]] == [
    "linear (closed form) 5 folds",
    "linear (closed form) 1 per class",
  ]


def test_images_without_labels_are_told_how_to_get_some(tmp_path):
  images = tmp_path / "images"
  images.mkdir()
  for i in range(3):
    PIL.Image.new("L", (8, 8), i).save(images / f"{i}.png")
  make_run(
    tmp_path / "run",
    stage="pretrain",
    channels=1,
    data__name=f"folder:{images}",
  )
  with pytest.raises(UserError) as error:
    evaluate.evaluate(checkpoint=str(tmp_path / "run"))
  assert str(error.value) == (
    f'folder:{images} has no labelled image in split "train"; write a '
    "labels.csv (columns file,label) into it, or sort images into a folder for "
    "each class."
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
  flat = write(tmp_path / "flat.npz", x[:, :0], labels)
  unnamed = write(tmp_path / "unnamed.npz", x, labels, label_names=["a", "b"])
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
    ({"features": flat}, r"floats \[n, C\], C above 0; .* shape \(90, 0\)"),
    ({"features": unnamed}, r"unnamed\.npz has no name, .* shape \(2,\)"),
    ({"features": train, "seed": -1}, "--seed: got -1, must be from 0 to"),
    ({"features": train, "seed": 99999999999}, "--seed: got 99999999999, must"),
    ({"features": train, "test_features": other}, "differ in features a row"),
    ({"features": train, "test_features": test, "folds": 3}, "without --folds"),
    (
      {"features": few},
      '--folds: 5 asked for, but class "class 0" has 1 labelled image; label '
      "more of it$",
    ),
    (
      {"features": train, "per_class": [99]},
      '--per_class: 99 asked for, but class "class 0" has 12 labelled images; '
      "ask for at most 12: --per_class=12$",
    ),
    ({"features": train, "per_class": 0}, "--per_class: got 0, must be 1 or"),
    ({"features": train, "probe_names": "knm"}, 'there is no "knm"; did you'),
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
