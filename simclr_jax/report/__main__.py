"""The command line; see `simclr_jax.report`."""

import argparse

from simclr_jax import errors, report
from simclr_jax.config import UserError


def main(argv=None) -> None:
  """Runs the command line; a UserError is one line and exit code 2."""
  parser = argparse.ArgumentParser(
    prog="python -m simclr_jax.report",
    description=report.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--workdir",
    action="append",
    required=True,
    help="a run's directory, which gets the page; more of them are shown "
    "beside the first one",
  )
  first, *others = parser.parse_args(argv).workdir
  with errors.ending():
    try:
      print(report.write(first, beside=others))
    except OSError as error:
      raise UserError(
        f"--workdir: {first}/report.html cannot be written: "
        f"{error.strerror or error}."
      ) from None


if __name__ == "__main__":
  main()
