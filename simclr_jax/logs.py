"""What a run leaves behind and what a person sees while it trains."""

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator

from etils import epath

from simclr_jax import storage

# Fields of metrics.jsonl that differ from one run of a config to the next.
TIMING = (
  "images_per_second",
  "input_wait",
  "device_memory_gib",
  "tflops_per_device",
  "utilisation",
)


class MetricsWriter:
  """metrics.jsonl, one JSON object a line with "step", and TensorBoard events.

  A run that continues from step s keeps the lines up to s and cuts what comes
  after, and a line torn by the kill: the file ends up as if nothing had
  happened. TensorBoard events need the extra `tensorboard` and a local disk.
  """

  def __init__(self, workdir, start: int):
    """Opens the files of a run that (re)starts after `start` steps."""
    self._path = epath.Path(workdir) / "metrics.jsonl"
    self._remote = "://" in str(workdir)  # object stores cannot append
    self._lines = _lines_until(self._path, start)
    # In one piece: a kill leaves the old lines or the new ones.
    storage.write_whole(self._path, "".join(self._lines))
    self._file = None if self._remote else open(self._path, "a")  # noqa: SIM115
    self._events = None
    if importlib.util.find_spec("tensorboardX") and not self._remote:
      import tensorboardX

      self._events = tensorboardX.SummaryWriter(
        str(workdir), purge_step=start + 1 if start else None
      )

  def write(self, step: int, values: dict) -> None:
    """Adds one line; `values` are floats, None is left out."""
    values = {k: v for k, v in values.items() if v is not None}
    line = json.dumps({"step": step, **values}) + "\n"
    if self._remote:
      self._lines.append(line)
    else:
      self._file.write(line)
      self._file.flush()
    if self._events:
      for name, value in values.items():
        self._events.add_scalar(name, value, step)

  def flush(self) -> None:
    """Hands all that was written to the system; called before each save."""
    if self._remote:
      self._path.write_text("".join(self._lines))
    if self._events:
      self._events.flush()

  def close(self) -> None:
    try:
      self.flush()
    finally:  # also where the disk is full
      if self._file:
        self._file.close()
      if self._events:
        self._events.close()


def _lines_until(path, step: int) -> list[str]:
  if not step or not path.exists():
    return []
  kept = []
  for line in (
    path.read_bytes().decode(errors="replace").splitlines(keepends=True)
  ):
    try:
      if json.loads(line)["step"] > step or not line.endswith("\n"):
        break
    except (ValueError, TypeError, KeyError):  # torn, or damaged
      break
    kept.append(line)
  return kept


class Progress:
  """A bar in a terminal or notebook, plain lines elsewhere."""

  def __init__(
    self, start: int, num_steps: int, *, batch_size: int, quiet=False
  ):
    self._num_steps, self._batch_size = num_steps, batch_size
    self._bar = None
    if not quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules):
      from tqdm import auto

      self._bar = auto.tqdm(
        total=num_steps, initial=start, unit="step", dynamic_ncols=True
      )
    self._mark = None  # (time, step) after the step that compiled
    self._total = [0.0, 0]  # seconds and images of all timed steps
    self._paused = self._waited = 0.0

  def advance(self, step: int) -> None:
    """Counts one step whose metrics have been read."""
    if self._mark is None:  # what came before it is not timed
      self._mark = (time.perf_counter(), step)
      self._paused = self._waited = 0.0
    if self._bar is not None:
      self._bar.update(1)

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Its time does not count as training."""
    begin = time.perf_counter()
    try:
      yield
    finally:  # a signal may interrupt an evaluation
      self._paused += time.perf_counter() - begin

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Its time counts as waiting for data."""
    begin = time.perf_counter()
    yield
    self._waited += time.perf_counter() - begin

  def timing(self, step: int) -> dict[str, float]:
    """images_per_second and input_wait since the last call.

    input_wait is the share of the time in which the loop waited for a batch.
    The device may have been at work meanwhile, so it idles at most that much.
    Empty where no whole step was timed.
    """
    now = time.perf_counter()
    then, since = self._mark
    if step == since:
      return {}
    seconds = max(now - then - self._paused, 1e-9)
    images = (step - since) * self._batch_size
    waited = self._waited
    self._mark, self._paused, self._waited = (now, step), 0.0, 0.0
    self._total[0] += seconds
    self._total[1] += images
    return {
      "images_per_second": round(images / seconds, 1),
      "input_wait": round(waited / seconds, 4),
    }

  @property
  def mean_rate(self) -> float | None:
    seconds, images = self._total
    return round(images / seconds, 1) if images else None

  def show(self, step: int, values: dict, anchors: dict) -> None:
    """Prints the main numbers of a step beside what ignorance would give."""
    parts = [f"step {step}/{self._num_steps}"]
    for name in ("loss", "contrastive_accuracy", "accuracy"):
      if name in values:
        anchor = f" ({anchors[name]})" if name in anchors else ""
        parts.append(f"{name.replace('_', ' ')} {values[name]:.4g}{anchor}")
    if rate := values.get("images_per_second"):
      left = int((self._num_steps - step) * self._batch_size / rate)
      parts += [f"{rate:.0f} images/s", f"{left // 60}:{left % 60:02d} left"]
    self.say(", ".join(parts))

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._bar is not None:
      self._bar.write(text)
    else:
      print(text, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
