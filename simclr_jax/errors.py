"""What ends a command with one line, and the hint in it."""

import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence


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


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """Ends the process as a command does: one line on stderr, an exit code.

  2 is the user's mistake, 1 a run whose loss was not finite, 130 Ctrl-C. Other
  exceptions are faults and keep their traceback.

  >>> with ending():
  ...   raise UserError("config.batch_size must be above 0, got 0.")
  Traceback (most recent call last):
    ...
  SystemExit: 2
  """
  try:
    yield
  except (UserError, Diverged) as error:
    line = " ".join(str(error).splitlines())  # a value may have several
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, UserError) else 1)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr, flush=True)
    sys.exit(130)
