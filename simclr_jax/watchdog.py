"""Says where a run hangs: the phase it is in, and the stack of each thread."""

import faulthandler
import sys
import threading
import time


class Watchdog:
  """A context manager that prints when nothing has happened for long.

  A thread of its own, because the main one is what hangs. It prints once for
  each phase that lasts too long, and stops nothing: a collective that waits for
  a dead host is ended by JAX (see `hosts.HEARTBEAT_SECONDS`).

  Example:
    >>> with Watchdog(minutes=10) as watchdog:
    ...   watchdog.phase("data", step=1)
  """

  def __init__(self, *, minutes: float):
    """Prints after this many minutes; 0 is never."""
    self._seconds = 60 * minutes
    self._now = ("start", 0, time.monotonic())
    self._ended = threading.Event()

  def phase(self, name: str, *, step: int) -> None:
    """From now on the run is in this phase of this step."""
    self._now = (name, step, time.monotonic())

  def __enter__(self):
    if self._seconds:
      self._thread = threading.Thread(target=self._watch, daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *exc):
    self._ended.set()
    if self._seconds:
      self._thread.join()

  def _watch(self):
    printed = None
    while not self._ended.wait(min(self._seconds / 4, 5)):
      name, step, since = now = self._now
      seconds = time.monotonic() - since
      if seconds > self._seconds and now is not printed:
        printed = now
        print(
          f"warning: nothing has happened for {seconds / 60:.3g} minutes in "
          f"phase {name} of step {step}; the stacks of all threads follow",
          file=sys.__stderr__,
          flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
