"""The files that a sweep leaves, report.html among them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from simclr_jax import overview, storage
from simclr_jax.provenance import provenance
from simclr_jax.sweep import figure, findings, results
from simclr_jax.sweep.claims import Claim
from simclr_jax.sweep.grid import Cell


def write(
  cells: Sequence[Cell],
  workdir: Path,
  claims: Sequence[Claim] = (),
) -> None:
  """Writes what is there so far into `workdir`, and prints its table.

  label_efficiency.{csv,png,svg}, or claims.{csv,md} where there are claims; and
  report.html, which shows both where both are there.

  Raises:
    UserError: `workdir` cannot be written.
  """
  rows = results.collect(cells, workdir)
  if not rows:
    return
  if claims:
    found = findings.find(claims, rows)
    table = findings.to_table(found)
    _write(workdir, {"claims.csv": findings.to_csv(found)})
    _write(workdir, {"claims.md": findings.to_markdown(table) + "\n"})
  else:
    table = results.to_table(rows)
    _write(workdir, {"label_efficiency.csv": results.to_csv(rows)})
    _write(workdir, figure.files(rows))
  _write(workdir, {"report.html": render(workdir)})
  print("", *overview.aligned(table), sep="\n")
  print(f"\n{len(rows)} of {len(cells)} cells; see {workdir}/report.html")


def _write(workdir: Path, files: Mapping[str, str | bytes]) -> None:
  for name, content in files.items():
    # Other processes write it too.
    draft = workdir / f".{name}.{os.getpid()}"
    data = content.encode() if isinstance(content, str) else content
    with storage.writable(workdir, "--workdir"):
      draft.write_bytes(data)
      draft.replace(workdir / name)


def render(workdir: Path) -> str:
  """HTML of what the csv files in `workdir` say.

  >>> "Label efficiency" in render(Path("runs"))
  True
  """
  # Here, because matplotlib takes a second to import.
  from simclr_jax.report import page, plots

  sections = []
  if rows := results.read_csv(workdir / "label_efficiency.csv"):
    size = figure.size_of(rows)
    svg = any(size) and plots.inline_svg(
      lambda canvas: figure.draw(canvas, rows),
      name="sweep",
      title="Top-1 against labels, a line for each size",
      size=size,
    )
    sections.append(
      {
        "id": "labels",
        "title": "Top-1 against labels",
        "text": "Means over seeds; bars and ± are one standard deviation.",
        "svg": svg,
        "rows": results.to_table(rows),
      }
    )
  if found := findings.read_csv(workdir / "claims.csv"):
    sections.append(
      {
        "id": "claims",
        "title": "Claims",
        "text": "What SimCLRv2 says, and what was found here. A claim holds "
        "where the gain is above 0 for each seed.",
        "rows": findings.to_table(found),
      }
    )
  about = provenance()
  versions = " · ".join(f"{k} {v}" for k, v in about["versions"].items())
  return page.template("sweep.html.j2").render(
    title="Label efficiency",
    about=f"Runs in {workdir}.",
    sections=sections,
    footer=f"{about['device']} · {versions} · commit {about['commit']}",
  )
