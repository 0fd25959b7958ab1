"""The report: what it says, what it survives, how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from simclr_jax import cli, report
from simclr_jax import config as config_lib
from simclr_jax.config import UserError
from simclr_jax.report import findings, page
from simclr_jax.report import run as run_lib
from simclr_jax.sweep import claims as claims_lib
from simclr_jax.sweep import findings as findings_lib
from simclr_jax.sweep import page as page_lib
from simclr_jax.sweep import results

SECTIONS = (
  "stages",
  "curves",
  "classifier",
  "embedding",
  "neighbours",
  "views",
  "similarity",
  "config",
)
NAMES = ("<script>alert(1)</script>", "a & b", "$x_1$", '"quoted"')


def make_run(
  workdir, *, stage="pretrain", count=40, side=12, names=NAMES, **fields
):
  """Files as a stage leaves them, with three blobs of features and noise."""
  workdir.mkdir(parents=True, exist_ok=True)
  config = cli.load_recipe("digits", stage=stage)
  for name, value in fields.items():
    config_lib.set_field(config, name.replace("__", "."), value)
  (workdir / "config.json").write_text(config_lib.to_json(config))
  rng = np.random.default_rng(0)
  lines = []
  for step in range(1, 8):
    line = {"step": step, "loss": 9 - step, "learning_rate": 0.1 * min(step, 3)}
    if stage == "pretrain":
      line |= {"contrastive_accuracy": step / 10, "effective_rank": 1.2}
    line |= {f"grad_norm/{part}": 1 / step for part in ("stem", "head")}
    lines.append(line | {"images_per_second": 100.0})
  lines.append({"step": 7, "eval_top1": 0.5, "eval_top5": 0.9})
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (workdir / "metrics.jsonl").write_text(text)
  result = {
    "stage": stage,
    "protocol": "knn" if stage == "pretrain" else f"{stage} 1%",
    "top1": 0.5,
    "top5": 0.9,
    "num_steps": 7,
    "images_per_second": 100.0,
    "seconds": 75.2,
    "metrics": {},
    "device": "1 x cpu",
    "versions": {"jax": "1.2.3"},
    "commit": "abc123",
  }
  (workdir / "result.json").write_text(json.dumps(result))
  labels = rng.integers(0, len(names), count).astype(np.int32)
  labels[:4] = -1, 0, 1, 2
  n = 12
  views = 2 * n if stage == "pretrain" else n

  def noise(*shape):
    return rng.integers(0, 256, shape, np.uint8)

  arrays = {
    "originals": noise(n, side, side, 3),
    "original_sizes": np.array([[side, side // 2]] * n, np.int32),
    "views": noise(views, side, side, 3),
    "boxes": rng.uniform(0, 0.5, (views, 4)).astype(np.float32),
    "features": rng.normal(4 * np.eye(9)[labels % 9], 1).astype(np.float32),
    "labels": labels,
    "thumbnails": noise(count, min(side, 32), min(side, 32), 3),
    "predictions": rng.integers(0, len(names), count).astype(np.int32),
    "confidence": rng.uniform(0.3, 1, count).astype(np.float32),
    "label_names": np.array(names, str),
    "split": "test",
  }
  if stage == "pretrain":
    arrays["z"] = rng.normal(size=(32, 5)).astype(np.float32)
    arrays["z_labels"] = labels[:16]
  np.savez_compressed(workdir / "report.npz", **arrays)
  return workdir


def edit(workdir, **arrays):
  """Changes arrays of report.npz; None takes one out."""
  with np.load(workdir / "report.npz") as old:
    new = dict(old) | arrays
  np.savez(
    workdir / "report.npz", **{k: v for k, v in new.items() if v is not None}
  )


def read_page(workdir, **options):
  return report.write(workdir, **options).read_text()


def section(text, name):
  return re.search(f'<section id="{name}">(.*?)</section>', text, re.S)[1]


def reasons(text):
  found = re.findall(r'<p class="missing">(.*?)</p>', text, re.S)
  return [html.unescape(reason) for reason in found]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A chain of three runs and the page of the last one."""
  root = tmp_path_factory.mktemp("chain")
  make_run(root / "first")
  make_run(root / "second", stage="finetune", pretrained=str(root / "first"))
  make_run(root / "third", stage="distill", teacher="gone/second")
  return root, {
    name: read_page(root / name) for name in ("first", "second", "third")
  }


@pytest.fixture
def workdir(made, tmp_path):
  shutil.copytree(made[0] / "first", tmp_path / "run")
  (tmp_path / "run" / "report.html").unlink()
  return tmp_path / "run"


def test_a_complete_run_lacks_nothing(made):
  for text in made[1].values():
    assert re.findall(r'<section id="(\w+)">', text) == list(SECTIONS)
    assert reasons(text) == []
    for part in SECTIONS[1:-1]:
      assert "<svg" in section(text, part) or "<img" in section(text, part)


def test_nothing_comes_from_outside(made):
  for text in made[1].values():
    inside = r'(?:xlink:)?(?:href|src)="(?!#|data:)'
    assert not re.search(inside, text)
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert text.count("<link") == 1  # an empty icon
    assert "default-src 'none'" in text


def test_text_of_the_user_is_escaped(made):
  text = made[1]["second"]
  assert "alert(1)" in text
  assert "<script" not in text
  assert ">$x_1$</text>" in section(text, "classifier")  # no mathematics


def test_ids_are_unique_and_found(made):
  for text in made[1].values():
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert used
    assert set(used) <= set(ids)


def test_the_header_names_what_made_it(made):
  text = made[1]["first"]
  for fact in ("50.0%", "1 min 15 s", "1 x cpu", "jax 1.2.3", "commit abc123"):
    assert fact in text


def test_curves_have_their_anchors_and_groups(made):
  curves = section(made[1]["first"], "curves")
  assert "uniform 12.47" in curves  # 2 ln(2 * 256 - 1)
  assert "chance 0.003906" in curves
  assert curves.count("aria-label") == 7
  assert re.search(r'label="grad norm.*stem 0\.14.*head', curves, re.S)
  assert "kNN top-1 0.5" in curves
  assert "uniform 1.386" in section(made[1]["second"], "curves")  # ln 4


def test_curves_repeat_the_advice_of_the_run(made):
  notes = re.findall(r'class="note">(.*?)</p>', made[1]["first"])
  assert len(notes) == 1
  assert notes[0].startswith("Step 1: the embeddings have collapsed")


def test_crop_boxes_are_drawn_where_they_were(made):
  run = run_lib.read(made[0] / "first")
  views = section(made[1]["first"], "views")
  found = re.findall(
    r'<rect class="v(\d)" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>',
    views,
  )
  assert len(found) == 24
  for i, (view, *numbers) in enumerate(found):
    assert int(view) == i % 2
    top, left, height, width = run.samples["boxes"][i // 2 + 12 * (i % 2)]
    assert np.allclose(np.array(numbers, float), (left, top, width, height))


def test_stages_follow_runs_that_were_moved(made):
  root, texts = made
  cards = re.findall(r"<h3>(\w+) <small>", section(texts["third"], "stages"))
  assert cards == ["first", "second", "third"]
  run = run_lib.read(root / "third")
  runs, note = run_lib.chain(run)
  assert [one.workdir.name for one in runs] == cards
  assert note == ""


def test_stages_say_what_is_gone_and_end_in_a_ring(workdir):
  run = run_lib.read(make_run(workdir, pretrained="nowhere/before"))
  assert run_lib.chain(run)[1] == (
    "run came from nowhere/before, which is not there any more."
  )
  run = run_lib.read(make_run(workdir, pretrained=str(workdir)))
  assert len(run_lib.chain(run)[0]) == 1


def test_other_runs_are_shown_beside(made):
  root, _ = made
  text = read_page(root / "first", beside=[root / "third", root / "first"])
  cards = re.findall(r"<h3>(\w+) <small>", section(text, "stages"))
  assert cards == ["first", "third"]


def test_the_config_that_differs(workdir):
  make_run(workdir, seed=5, optim__name="adam")
  assert run_lib.differences(run_lib.read(workdir)) == [
    ("optim.name", '"lars"', '"adam"'),
    ("seed", "0", "5"),
  ]
  said = section(read_page(workdir), "config")
  assert "What differs from the recipe digits: given, from the recipe's" in said


def test_neighbours_against_a_loop(made):
  run = run_lib.read(made[0] / "first")
  x = run.samples["features"].astype(np.float64)
  found = findings.neighbours(run)
  assert len(found) == 8
  labels = run.samples["labels"]
  assert len({int(labels[q]) for q, _ in found}) == 5  # all, -1 too
  for query, near in found:
    cosines = []
    for i in range(len(x)):
      norms = np.linalg.norm(x[i]) * np.linalg.norm(x[query])
      cosines.append((x[i] @ x[query] / norms, i))
    best = sorted((c for c in cosines if c[1] != query), reverse=True)[:6]
    assert [i for i, _ in near] == [i for _, i in best]
    assert np.allclose([c for _, c in near], [c for c, _ in best])


def test_confusion_and_mistakes_against_a_loop(made):
  run = run_lib.read(made[0] / "first")
  labels, predictions = run.samples["labels"], run.samples["predictions"]
  expected = np.zeros((4, 4), int)
  wrong = []
  for i, label in enumerate(labels):
    if label >= 0:
      expected[label, predictions[i]] += 1
      if label != predictions[i]:
        wrong.append((-run.samples["confidence"][i], i))
  assert np.array_equal(findings.confusion(run), expected)
  assert findings.mistakes(run) == [i for _, i in sorted(wrong)][:18]


def test_similarities_of_pairs_lie_on_the_diagonal(made, workdir):
  z = np.eye(4, dtype=np.float32)
  edit(workdir, z=np.concatenate([z, 3 * z]), z_labels=np.array([2, 1, 0, 1]))
  values, kind = findings.similarities(run_lib.read(workdir))
  assert kind == "views"
  assert np.allclose(values, np.eye(4))
  _, kind = findings.similarities(run_lib.read(made[0] / "second"))
  assert kind == "images"


def test_maps_are_the_same_at_each_call(made):
  run = run_lib.read(made[0] / "first")
  points, labels = findings.tsne(run), run.samples["labels"]
  assert np.array_equal(findings.tsne(run), points)
  # The blobs that were made are found: neighbours on the map share a label.
  distances = np.linalg.norm(points[:, None] - points, axis=2)
  np.fill_diagonal(distances, np.inf)
  assert np.mean(labels[distances.argmin(1)] == labels) > 0.7


GONE = "is written when a stage ends"


@pytest.mark.parametrize(
  "file, part, reason",
  [
    ("metrics.jsonl", "curves", GONE),
    ("report.npz", "views", f"{GONE} with config.report on"),
    ("report.npz", "classifier", GONE),
    ("report.npz", "neighbours", GONE),
    ("report.npz", "similarity", GONE),
    ("report.npz", "embedding", GONE),
  ],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_missing_or_damaged_file_is_named(
  workdir, file, part, reason, damaged
):
  if damaged:
    (workdir / file).write_bytes(b"\xff\x00PK")
    reason = "cannot be read"
  else:
    (workdir / file).unlink()
  found = reasons(section(read_page(workdir), part))
  assert found
  assert all(file in text and reason in text for text in found)


@pytest.mark.parametrize(
  "file, content",
  [
    ("report.npz", b""),
    ("report.npz", b"\x93NUMPY"),
    ("report.npz", "flipped"),
    ("result.json", b"5"),
    ("result.json", b"[" * 100_000),
    *(
      pytest.param("result.json", x, marks=pytest.mark.slow)  # a map each
      for x in (b"null", b"[]", b"{}", b'"a"', b"", b"[[1, 2]]", b"\xff")
    ),
    ("diverged.json", b"5"),
  ],
)
def test_damage_of_any_kind_leaves_the_other_parts(workdir, file, content):
  path = workdir / file
  if content == "flipped":  # within what is compressed
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
  path.write_bytes(content)
  assert f"{file} cannot be read: " in run_lib.read(workdir).missing[file]
  text = read_page(workdir)
  if file != "diverged.json":  # which most runs do not have
    assert any(f"{file} cannot be read" in text for text in reasons(text))
  assert "<svg" in section(text, "curves")


def test_a_line_of_metrics_whose_step_is_no_number(workdir):
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": "8", "loss": 1}\n{"step": null, "loss": 1}\n5\n')
  assert len(run_lib.read(workdir).lines) == 8
  assert "<svg" in section(read_page(workdir), "curves")


def test_a_run_without_result_and_with_a_torn_line(workdir):
  (workdir / "result.json").unlink()
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 8, "lo')
  (workdir / "diverged.json").write_text('{"step": 8, "problem": "it broke"}')
  text = read_page(workdir)
  assert "There is no result.json" in reasons(text)[0]
  assert "The run ended at step 8: it broke." in text
  assert "not complete" in section(text, "stages")
  assert "loss 2" in section(text, "curves")


@pytest.mark.parametrize(
  "arrays, part, reason",
  [
    (
      {"predictions": None, "confidence": None},
      "classifier",
      "This network has no classifier.",
    ),
    (
      {"labels": np.full(40, -1, np.int32)},
      "classifier",
      "No evaluation image has a label.",
    ),
    (
      {"features": np.ones((40, 9), np.float32)},
      "embedding",
      "All images have the same features: the network collapsed.",
    ),
    (
      {"features": np.full((40, 9), np.nan, np.float32)},
      "embedding",
      "The features are not finite.",
    ),
    ({"boxes": None}, "views", "report.npz has no boxes."),
  ],
)
def test_what_a_network_lacks_is_said(workdir, arrays, part, reason):
  edit(workdir, **arrays)
  assert set(reasons(section(read_page(workdir), part))) == {reason}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images(workdir, count):
  names = ("features", "labels", "thumbnails", "predictions", "confidence")
  with np.load(workdir / "report.npz") as arrays:
    edit(workdir, **{name: arrays[name][1 : count + 1] for name in names})
  text = read_page(workdir)
  plural = "images are" if count > 1 else "image is"
  expected = f"{count} {plural} too few for a map."
  assert set(reasons(section(text, "embedding"))) == {expected}
  alone = reasons(section(text, "neighbours"))
  assert alone == ["There is one image only."] * (count == 1)


def test_without_labels(workdir):
  edit(
    workdir,
    label_names=np.array([], str),
    labels=np.full(40, -1, np.int32),
    predictions=None,
    confidence=None,
  )
  text = read_page(workdir)
  assert reasons(text) == ["This network has no classifier."]
  assert "✓" not in section(text, "neighbours")


def test_a_recipe_of_ones_own(workdir):
  file = workdir / "config.json"
  config = json.loads(file.read_text()) | {"recipe": "mine"}
  file.write_text(json.dumps(config))
  (reason,) = reasons(read_page(workdir))
  assert reason.startswith("The recipe mine of pretrain is not here: unknown")
  assert "All fields" in section(read_page(workdir), "config")


def test_the_memory_counts_in_the_uniform_loss(workdir):
  """As in the line that the run prints: 2 ln(2 (64 + 256 / 2) - 1)."""
  file = workdir / "config.json"
  config = json.loads(file.read_text())
  config["batch_size"], config["memory"]["size"] = 64, 256
  file.write_text(json.dumps(config))
  anchors = page._anchors(run_lib.read(workdir))
  assert anchors["Loss"][0] == pytest.approx(2 * np.log(2 * 192 - 1))
  assert anchors["Contrastive accuracy"][0] == 1 / 64


def test_a_config_without_a_stage_is_damaged(workdir):
  (workdir / "config.json").write_text('{"seed": 0}')
  with pytest.raises(UserError, match=r"config.json is damaged: it names no"):
    run_lib.read(workdir)


def test_a_config_of_another_version(workdir):
  file = workdir / "config.json"
  (workdir / "result.json").write_text("{}")
  file.write_text('{"stage": "other"}')
  assert "config.json has no recipe" in reasons(read_page(workdir))[-1]
  file.write_text('{"stage": "other", "recipe": "digits"}')
  assert "The recipe digits of other" in reasons(read_page(workdir))[-1]


@pytest.mark.slow
def test_the_worst_case_fits_5_megabytes(tmp_path):
  """Noise in colour, which PNG cannot press, and the most of everything."""
  names = [f"class number {i}" for i in range(1000)]
  run = run_lib.read(make_run(tmp_path, count=1000, side=96, names=names))
  lines = [
    {"step": i, "loss": float(np.sin(i))} | {f"norm/{k}": 1.0 for k in range(9)}
    for i in range(1, 3000)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  run = run_lib.read(tmp_path)
  assert len(page.render(run).encode()) < 5e6
  assert reasons(page.render(run)) == []


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "simclr_jax.report", *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )


def test_mistakes_of_the_user_are_named(workdir, made, capsys):
  from simclr_jax.report.__main__ import main

  empty = workdir / "empty"
  empty.mkdir()
  damaged = shutil.copytree(workdir, workdir / "damaged")
  (damaged / "config.json").write_text("{")
  cases = {
    "nowhere": "there is no directory nowhere.",
    str(empty): "is not a run's directory: it has no config.json.",
    str(damaged): "config.json is damaged",
  }
  for given, message in cases.items():
    with pytest.raises(UserError, match="--workdir"):
      report.write(given)
    with pytest.raises(SystemExit) as caught:
      main([f"--workdir={workdir}", f"--workdir={given}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
  (workdir / "report.html").write_text("an older one")
  (workdir / "report.html.draft").mkdir()
  with pytest.raises(SystemExit):
    main([f"--workdir={workdir}"])
  assert "report.html cannot be written: Is a dir" in capsys.readouterr().err
  assert (workdir / "report.html").read_text() == "an older one"


@pytest.mark.slow
def test_the_command(workdir):
  done = command(f"--workdir={workdir}")
  assert done.stderr == ""
  assert done.stdout == f"{workdir}/report.html\n"
  assert (workdir / "report.html").stat().st_size > 10_000
  assert not (workdir / "report.html.draft").exists()
  assert command().returncode == 2


# -- in a browser -------------------------------------------------------------

CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  driver = shutil.which("chromedriver")
  if not (CHROMIUM and driver):
    pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
  webdriver = pytest.importorskip("selenium.webdriver")
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  profile = tmp_path_factory.mktemp("profile")
  for flag in (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    f"user-data-dir={profile}",
  ):
    options.add_argument(f"--{flag}")
  options.set_capability(
    "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
  )
  service = webdriver.ChromeService(driver)
  with webdriver.Chrome(options=options, service=service) as found:
    yield found


CONTRAST = """
const light = (c) => {
  const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (e) => {
  const c = getComputedStyle(e).backgroundColor;
  return c.endsWith(", 0)") ? ground(e.parentElement) : c;
};
let worst = [99, ""];
const texts = "p, h1, h2, h3, dt, dd, td, a, text";
for (const e of document.querySelectorAll(texts)) {
  const style = getComputedStyle(e);
  const a = light(e.tagName == "text" ? style.fill : style.color);
  const b = light(ground(e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < worst[0]) worst = [ratio, e.textContent];
}
return worst;
"""


def emulate(browser, width, scheme):
  """A window of this width; forgets what was logged."""
  browser.execute_cdp_cmd(
    "Emulation.setDeviceMetricsOverride",
    {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
  )
  browser.execute_cdp_cmd(
    "Emulation.setEmulatedMedia",
    {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
  )
  for log in ("browser", "performance"):
    browser.get_log(log)


def check_page(browser, file, width):
  """Opens it: nothing is empty, too wide, too pale or complained about.

  Returns the ids of its sections.
  """
  browser.get(file.as_uri())
  time.sleep(0.3)  # a late request would come now
  sizes = browser.execute_script(
    "return [...document.querySelectorAll('section')].map("
    "s => [s.id, s.offsetHeight, s.querySelector('h2').offsetHeight])"
  )
  assert all(min(heights) > 10 for _, *heights in sizes)
  empty = browser.execute_script(
    "return [...document.querySelectorAll('img, svg')].filter(e => "
    "e.getBoundingClientRect().width < 20 || e.naturalWidth === 0).length"
  )
  assert empty == 0
  page_width, shown = browser.execute_script(
    "const page = document.documentElement;"
    "return [page.scrollWidth, page.clientWidth]"
  )
  assert page_width == shown  # nothing to scroll to the side
  assert 0.9 * width < shown <= width  # less a scroll bar
  ratio, text = browser.execute_script(CONTRAST)
  assert ratio >= 4.5, text
  assert browser.get_log("browser") == []
  return [name for name, *_ in sizes]


def check_requests(browser, count):
  """No page asked for more than itself."""
  requests = []
  for entry in browser.get_log("performance"):
    message = json.loads(entry["message"])["message"]
    if message["method"] == "Network.requestWillBeSent":
      requests.append(message["params"]["request"]["url"])
  assert len(requests) >= count
  for url in requests:
    assert url.startswith(("data:", "file:///")), url
    if url.startswith("file:"):
      assert url.endswith("/report.html")


WINDOWS = [
  (width, scheme) for width in (400, 1400) for scheme in ("light", "dark")
]


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", WINDOWS)
def test_in_chromium(browser, made, width, scheme):
  emulate(browser, width, scheme)
  for name in made[1]:
    file = made[0] / name / "report.html"
    assert check_page(browser, file, width) == list(SECTIONS)
  check_requests(browser, len(made[1]))


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", WINDOWS)
def test_the_page_of_a_sweep_in_chromium(browser, tmp_path, width, scheme):
  rows = [
    {
      "method": method,
      "size": size,
      "label_percent": percent,
      "seed": seed,
      "top1": top1,
    }
    for method in ("scratch", "finetune", "finetune_head2")
    for size in ("18x0.5", "18x1")
    for percent, top1 in ((1.0, 0.5), (10.0, 0.75))
    for seed in (0, 1)
  ]
  (tmp_path / "label_efficiency.csv").write_text(results.to_csv(rows))
  claims = claims_lib.make_claims("cifar10", ["18x0.5", "18x1"], [1.0, 10.0])
  found = findings_lib.find(claims, rows)
  assert len(found) == 4
  (tmp_path / "claims.csv").write_text(findings_lib.to_csv(found))
  (tmp_path / "report.html").write_text(page_lib.render(tmp_path))
  emulate(browser, width, scheme)
  sections = check_page(browser, tmp_path / "report.html", width)
  assert sections == ["labels", "claims"]
  check_requests(browser, 1)
