"""report.html: what a run did and learned, on one page without a network.

  python -m simclr_jax.report --workdir=DIR [--workdir=OTHER ...]

Every stage writes it at its end; the command writes it again, or while a run
trains. It reads files alone: config.json, metrics.jsonl, result.json and
report.npz, and those of the runs that this one came from (config.pretrained,
config.teacher). What is not there is named on the page.
"""

from collections.abc import Sequence

from simclr_jax import storage
from simclr_jax.report.run import SAMPLES, Missing, Run, chain, read

__all__ = ["SAMPLES", "Missing", "Run", "chain", "read", "write"]


def write(workdir, *, beside: Sequence = ()):
  """Writes report.html into a run's directory.

  Args:
    workdir: the run's directory, complete or not.
    beside: directories of more runs to show beside this one.

  Returns:
    The path of the page.

  Raises:
    UserError: `workdir` or one of `beside` is not a run's directory.
    OSError: the page cannot be written.

  >>> write("runs/pretrained").name
  'report.html'
  """
  run = read(workdir)
  others = [read(other) for other in beside]
  # Here, because matplotlib takes a second to import.
  from simclr_jax.report import page

  file = run.workdir / "report.html"
  storage.write_whole(file, page.render(run, others))
  return file
