"""SIGTERM and SIGINT: save and leave, at once where there is nothing to save.

Python runs a signal handler only between two bytecodes of the main thread,
which may sit in a compilation for minutes. The C level writes the signal's
number to a file descriptor immediately; a small thread waits there.
"""

import contextlib
import os
import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
  """A signal came within `StopSignal.interruptible`."""


class StopSignal:
  """A context manager that turns signals into a flag.

  Attributes:
    requested: a signal came; the loop saves and leaves with `exit_code`.
    running: set by the loop once it trains; before that (start-up and
      compilation) the first signal ends the process at once.
    exit_code: 143 for SIGTERM, 130 for SIGINT.

  The second signal ends the process at once in any case.
  """

  def __init__(self):
    self.requested = False
    self.running = False
    self.exit_code = 0
    self._interruptible = False

  @contextlib.contextmanager
  def interruptible(self):
    """Inside it the first signal raises `Interrupted`, also one before it."""
    self._interruptible = True
    try:
      if self.requested:
        raise Interrupted
      yield
    finally:
      self._interruptible = False

  def _handle(self, number, frame):
    if self._interruptible:
      self._interruptible = False
      raise Interrupted

  def __enter__(self):
    self._active = threading.current_thread() is threading.main_thread()
    if not self._active:  # only the main thread may set handlers
      return self
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._old_fd = signal.set_wakeup_fd(self._write)
    self._old = {s: signal.signal(s, self._handle) for s in _SIGNALS}
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def _watch(self):
    while number := os.read(self._read, 1)[0]:
      if number not in _SIGNALS:
        continue
      if self.requested or not self.running:
        os.write(2, b"stopped by a signal, nothing saved now\n")
        os._exit(128 + number)
      self.exit_code = 128 + number
      self.requested = True
      os.write(2, b"signal received: saving, then leaving\n")

  def __exit__(self, *exc):
    if not self._active:
      return
    for number, handler in self._old.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    os.write(self._write, b"\0")  # ends the thread
    self._thread.join()
    os.close(self._read)
    os.close(self._write)
