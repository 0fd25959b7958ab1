"""Decoding in processes beside this one.

Decoders let other threads run, but not for all of an image: some 0.5 of the 3
milliseconds of a photograph are spent under Python's lock. So a thread of
`make_threads` that has decoded for a while gets a process of its own, to which
it sends encoded images and from which it takes pixels, without that lock.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageFile

from simclr_jax.sources.decode import decode

# Fewer threads than this do not wait for one another.
_LEAST_CORES = 4
# More are no faster: this process must read the files and take the pixels.
_MOST_WORKERS = 64
# What a thread decodes itself, before it starts a process (0.3 seconds).
_PATIENCE_SECONDS = 0.5

# Images that are sent at a time, so that a worker holds no more.
_CHUNK = 32
_SIZE = struct.Struct("<Q")
_warned = threading.Event()


class _Own(threading.local):
  """What a thread has of its own."""

  seconds: float | None = None  # it has decoded; None: it may have no worker
  worker: "_Worker | None" = None


_own = _Own()


def num_cores() -> int:
  """Cores that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # Not on Linux.
    return os.cpu_count() or 1


def make_threads() -> concurrent.futures.ThreadPoolExecutor:
  """Decoding threads, one a core; what processes they start end with them."""
  cores, started = num_cores(), itertools.count()

  def begin():
    if cores >= _LEAST_CORES and next(started) < _MOST_WORKERS:
      _own.seconds = 0.0

  return concurrent.futures.ThreadPoolExecutor(
    cores, thread_name_prefix="decode", initializer=begin
  )


@functools.lru_cache(maxsize=1)
def threads() -> concurrent.futures.ThreadPoolExecutor:
  """Those that stay for this process's life."""
  return make_threads()


def decode_all(
  records: Sequence[bytes | np.ndarray], *, channels: int, max_size: int
) -> list[np.ndarray | ValueError]:
  """`decode` of each, with the error in the place of a damaged one.

  In the process of this thread, where it has one. One that was killed (or
  cannot be started) is done without: what it was to decode is decoded here.
  """
  options = {"channels": channels, "max_size": max_size}
  if _own.seconds is None or any(isinstance(r, np.ndarray) for r in records):
    return _decode_each(records, options)
  if _own.seconds < _PATIENCE_SECONDS:
    begin = time.perf_counter()
    found = _decode_each(records, options)
    _own.seconds += time.perf_counter() - begin
    return found
  # Put back only where all that it answers was taken: what an exception left
  # would be the next one's answer.
  worker, _own.worker = _own.worker, None
  try:
    worker = worker or _Worker()
    found = []
    for start in range(0, len(records), _CHUNK):
      found += worker.decode_all(records[start : start + _CHUNK], options)
  except (OSError, EOFError) as error:
    _own.seconds = None
    if not _warned.is_set():  # All may be gone at the same time.
      _warned.set()
      print(
        f"warning: a decoding process cannot be used ({error}); this one "
        "decodes in its place, which may be slower.",
        file=sys.stderr,
        flush=True,
      )
  else:
    _own.worker = worker
    return found
  return _decode_each(records, options)


def _decode_each(records, options):
  found: list[np.ndarray | ValueError] = []
  for record in records:
    try:
      found.append(decode(record, **options))
    except ValueError as error:
      found.append(error.with_traceback(None))  # it would keep the records
  return found


class _Worker:
  """A process that decodes what it is sent, until this one ends or drops it."""

  def __init__(self):
    ours, theirs = socket.socketpair()
    # Not multiprocessing, whose processes run the user's script once more.
    path = [folder for folder in sys.path if isinstance(folder, str)]
    code = (
      f"import sys; sys.path[:] = {path!r}; "
      "from simclr_jax.sources import workers; workers.serve()"
    )
    try:
      for end in ours, theirs:
        end.settimeout(None)  # whatever the default for sockets is
      process = subprocess.Popen(
        [sys.executable or "", "-c", code],
        stdin=theirs.fileno(),
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for this one.
      )
    except OSError:
      ours.close()
      raise
    finally:
      theirs.close()
    self.pid, self._channel = process.pid, ours
    # When its thread ends, or this process.
    weakref.finalize(self, self._end, ours, process)

  def decode_all(self, records, options):
    header = options, _pillow_settings(), [len(record) for record in records]
    _send(self._channel, header, records)
    return [
      ValueError(found)
      if isinstance(found, str)
      else _take(self._channel, math.prod(found)).reshape(found)
      for found in _receive(self._channel)
    ]

  @staticmethod
  def _end(channel, process):
    channel.close()
    process.kill()  # It may be stopped, or a fork may hold the channel open.
    process.wait()


def serve() -> None:
  """What a worker runs: decodes what comes, until its end of the socket closes.

  The socket is its standard input.
  """
  # They may go to all processes of a job: the parent, which saves first, says
  # when this one ends.
  for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, signal.SIG_IGN)
  with (
    contextlib.suppress(EOFError, ConnectionError),
    socket.socket(fileno=0) as channel,
  ):
    while True:
      options, settings, sizes = _receive(channel)
      _pillow_settings(settings)
      records = [_take(channel, size).tobytes() for size in sizes]
      found = _decode_each(records, options)
      images = [x for x in found if isinstance(x, np.ndarray)]
      shapes = [str(x) if isinstance(x, ValueError) else x.shape for x in found]
      _send(channel, shapes, images)


def _pillow_settings(new=None):
  """(pixels that Pillow takes for an attack, whether it accepts cut files)."""
  if new:
    PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES = new
  return PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES


def _send(channel, header, parts):
  """A small object, then bytes whose number it tells."""
  head = pickle.dumps(header)
  channel.sendall(_SIZE.pack(len(head)) + head)
  for part in parts:
    channel.sendall(part)


def _receive(channel):
  """The small object."""
  (size,) = _SIZE.unpack(_take(channel, _SIZE.size))
  return pickle.loads(_take(channel, size))


def _take(channel, size):
  """The next bytes, uint8 [size]."""
  taken = np.empty(size, np.uint8)
  rest = memoryview(taken)
  while rest:
    got = channel.recv_into(rest, flags=socket.MSG_WAITALL)
    if not got:
      raise EOFError("it ended")
    rest = rest[got:]
  return taken
