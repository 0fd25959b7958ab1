"""What a run has left in its directory, and the runs it came from."""

import contextlib
import dataclasses
import functools
import io
import json

import numpy as np
from etils import epath

from simclr_jax import cli, rundir
from simclr_jax import config as config_lib
from simclr_jax import metrics as metrics_lib
from simclr_jax.config import UserError

SAMPLES = "report.npz"


# stage -> the field that names the run it started from
_SOURCES = {
  "pretrain": "pretrained",
  "finetune": "pretrained",
  "distill": "teacher",
}


class Missing(Exception):
  """A section cannot be shown; the text says why."""


@dataclasses.dataclass(frozen=True)
class Run:
  """The files of a run; what could not be read is empty, `missing` says why.

  Attributes:
    workdir: its directory.
    config: flat, "optim.name" -> value.
    lines: of metrics.jsonl.
    result: of result.json.
    diverged: "step" and "problem" of a run that ended by itself.
    samples: of report.npz; see `snapshots.take`.
    missing: file name -> reason.
  """

  workdir: epath.Path
  config: dict
  lines: list[dict]
  result: dict
  diverged: dict
  samples: dict[str, np.ndarray]
  missing: dict[str, str]

  @property
  def name(self) -> str:
    """The last part of the directory."""
    return self.workdir.name

  @property
  def stage(self) -> str:
    """Which tells what fields `config` has."""
    return self.config["stage"]

  @property
  def num_pairs(self) -> int:
    """Of the contrastive loss; 0 in other stages."""
    if self.stage != "pretrain":
      return 0
    return metrics_lib.num_pairs(
      self.config["batch_size"], self.config["memory.size"]
    )

  @functools.cached_property
  def metrics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (steps, values) of every number in metrics.jsonl."""
    series: dict[str, list] = {}
    for line in self.lines:
      for name, value in line.items():
        if name != "step" and isinstance(value, int | float):
          series.setdefault(name, []).append((line["step"], value))
    return {
      name: tuple(np.array(points, float).T) for name, points in series.items()
    }

  @property
  def label_names(self) -> list[str]:
    """Class names; empty where they are not known."""
    return [str(name) for name in self.samples.get("label_names", ())]

  def need(self, *names: str) -> list[np.ndarray]:
    """Arrays of report.npz; raises Missing where one is not there."""
    for name in names:
      if name not in self.samples:
        why = self.missing.get(SAMPLES, f"{SAMPLES} has no {name}.")
        raise Missing(why)
    return [self.samples[name] for name in names]


def read(workdir) -> Run:
  """Reads a run's directory.

  Raises:
    UserError: there is no such directory, or no config.json in it.

  >>> read("runs/pretrained").config["model.depth"]
  18
  """
  workdir = epath.Path(workdir).expanduser()
  file = workdir / "config.json"
  if not workdir.is_dir():
    raise UserError(f"--workdir: there is no directory {workdir}.")
  if not file.exists():
    raise UserError(
      f"--workdir: {workdir} is not a run's directory: it has no config.json. "
      "Give the --workdir of a pretrain, finetune or distill command."
    )
  try:
    config = config_lib.flat(json.loads(file.read_text()))
  except (ValueError, AttributeError) as error:
    raise UserError(f"--workdir: {file} is damaged: {error}.") from None
  if "stage" not in config:
    raise UserError(f"--workdir: {file} is damaged: it names no stage.")
  missing: dict[str, str] = {}

  def content(name, parse, empty):
    file = workdir / name
    if not file.exists():
      missing[name] = (
        f"There is no {name}: it is written when a stage ends"
        f"{' with config.report on' if name == SAMPLES else ''}."
      )
      return empty
    try:
      return parse(file)
    except Exception as error:  # NumPy and zipfile raise many types
      missing[name] = f"{name} cannot be read: {error}."
      return empty

  return Run(
    workdir=workdir,
    config=config,
    lines=content("metrics.jsonl", _lines, []),
    result=content("result.json", _json, {}),
    diverged=content(rundir.DIVERGED, _json, {}),
    samples=content(SAMPLES, _arrays, {}),
    missing=missing,
  )


def _json(file) -> dict:
  content = json.loads(file.read_text())
  if not isinstance(content, dict) or not content:
    raise ValueError("it is no JSON object with content")
  return content


def _arrays(file) -> dict:
  with np.load(io.BytesIO(file.read_bytes())) as arrays:
    return dict(arrays)


def _lines(file) -> list[dict]:
  lines = []
  for text in file.read_text().splitlines():
    with contextlib.suppress(ValueError):  # torn by a kill
      line = json.loads(text)
      if isinstance(line, dict) and isinstance(line.get("step"), int | float):
        lines.append(line)
  return lines


def chain(run: Run) -> tuple[list[Run], str]:
  """The run and those it came from, the first one first.

  Returns:
    (runs, note): the note says which directory was not found, or is "".

  >>> runs, note = chain(read("runs/finetuned"))
  >>> [run.name for run in runs]
  ['pretrained', 'finetuned']
  """
  runs, note = [run], ""
  while run.stage in _SOURCES and (source := run.config[_SOURCES[run.stage]]):
    # Beside this one, where all of them were moved together.
    there = epath.Path(source).expanduser()
    places = (there, run.workdir.parent / there.name)
    found = [p for p in places if (p / "config.json").exists()]
    if not found:
      note = f"{run.name} came from {source}, which is not there any more."
      break
    try:
      run = read(found[0])
    except UserError as error:
      note = str(error)
      break
    if any(run.workdir == other.workdir for other in runs):
      break
    runs.insert(0, run)
  return runs, note


def differences(run: Run) -> list[tuple[str, str, str]]:
  """(field, value in the recipe, value in the run) where they differ."""
  for field in ("recipe", "stage"):
    if field not in run.config:
      raise Missing(f"The run's config.json has no {field}")
  name, stage = run.config["recipe"], run.config["stage"]
  try:
    recipe = cli.load_recipe(name, stage=stage)
  except (UserError, IndexError, OSError) as error:
    reason = error if isinstance(error, UserError) else "no such stage"
    raise Missing(
      f"The recipe {name} of {stage} is not here: {reason}"
    ) from None
  expected = config_lib.flat(json.loads(config_lib.to_json(recipe)))
  fields = sorted(expected.keys() | run.config.keys())
  # A field that one side lacks, as an older run may, is shown as such.
  ours, theirs = (
    dict.fromkeys(fields) | values for values in (expected, run.config)
  )
  return [
    (field, _text(ours[field]), _text(theirs[field]))
    for field in fields
    if ours[field] != theirs[field]
  ]


def _text(value) -> str:
  return "–" if value is None else json.dumps(value)
