"""What ends a command with one line, and the hint in it."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
  """A mistake of the user's: shown as one line, the process exits with 2."""


class Diverged(RuntimeError):
  """The loss is not finite: shown as one line, the process exits with 1."""


def nearest(name: str, allowed: Sequence[str]) -> str:
  """Ends a sentence: '; did you mean "x"?' for a close match of `name`, or ".".

  >>> nearest("digts", ["digits", "cifar10"])
  '; did you mean "digits"?'
  """
  close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
  return f'; did you mean "{close[0]}"?' if close else "."
