"""glibc's malloc, set up for XLA's CPU backend, which takes its buffers there.

It keeps what a step frees for the next one, and the small free pieces that
compiling leaves are filled. Other C libraries are left alone.
"""

import contextlib
import ctypes
import functools
import os
import re

import jax


def keep_freed_memory() -> bool:
  """Makes malloc keep what is freed, until the process ends.

  By default glibc asks the system anew for every large buffer: a ResNet-18's
  step at batch 64 touched 370,000 new pages, an eighth of its time. All threads
  share the first arena, because others are limited to 64 MiB. A thread that has
  an arena already stays there, so call this before the backend starts its own.

  Returns:
    Whether malloc took it; False where it is not glibc's.

  >>> keep_freed_memory() in (True, False)
  True
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # not glibc
    return False
  # <malloc.h>: M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD, where -1 is never:
  # the largest threshold is 2 GiB, and a large step frees more.
  options = {-8: 1, -4: 0, -1: -1}
  taken = [mallopt(name, value) for name, value in options.items()]
  return all(taken)


# Free pieces of these sizes (bytes) are kept in sorted lists that malloc walks
# through.
_SHORTEST_HOLE, _LONGEST_HOLE = 2**10, 2**20
_LONG_SECONDS = 0.5  # shorter compilations leave few of them
# Each may cost 150 MiB; a command compiles its step and some more.
_MOST_FILLS = 8


@functools.cache
def fill_holes_after_compiling() -> None:
  """Calls `fill_holes` after long compilations of this process.

  After the first `_MOST_FILLS` of them only. Calling this twice registers one
  listener.

  >>> fill_holes_after_compiling()
  """
  left = iter(range(_MOST_FILLS))

  def listen(event, seconds, **_):
    is_compilation = event.endswith("/backend_compile_duration")
    is_long = is_compilation and seconds > _LONG_SECONDS
    if is_long and next(left, None) is not None:
      with contextlib.suppress(OSError):  # no descriptor left: a slower step
        fill_holes()

  jax.monitoring.register_event_duration_secs_listener(listen)


def fill_holes() -> int:
  """Takes the small pieces of memory that compiling has left free, for good.

  The compiler leaves tens of thousands of them, and malloc walks through lists
  of a thousand for every buffer of a convolution, while other threads wait: a
  step took a third longer in the process that had compiled it. malloc_trim
  first returns the inside of each piece to the system, so that taking it costs
  at most a page.

  Returns:
    How many pieces were taken; 0 where malloc is not glibc's.

  >>> fill_holes() >= 0
  True
  """
  libc = ctypes.CDLL(None)
  try:
    malloc, malloc_trim, malloc_info, fdopen, fclose = (
      getattr(libc, name)
      for name in ("malloc", "malloc_trim", "malloc_info", "fdopen", "fclose")
    )
  except AttributeError:
    return 0
  malloc.restype = fdopen.restype = ctypes.c_void_p
  malloc.argtypes = [ctypes.c_size_t]
  malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
  fclose.argtypes = [ctypes.c_void_p]

  def pieces():
    """(shortest, longest, number) of each list."""
    with open(os.memfd_create("malloc_info"), "w+b") as file:
      stream = fdopen(os.dup(file.fileno()), b"w")
      malloc_info(0, stream)
      fclose(stream)
      file.seek(0)
      arena = file.read().partition(b"</heap>")[0]  # the first, of all threads
    sizes = rb'<size from="(\d+)" to="(\d+)" total="\d+" count="(\d+)"/>'
    return [tuple(map(int, found)) for found in re.findall(sizes, arena)]

  malloc_trim(0)
  taken = 0
  for _ in range(2):  # the first time leaves the ends of longer pieces
    for shortest, longest, number in reversed(pieces()):
      if shortest >= _SHORTEST_HOLE and longest < _LONGEST_HOLE:
        for _ in range(number):
          malloc(shortest - 2 * ctypes.sizeof(ctypes.c_size_t))
        taken += number
  return taken
