"""How XLA's CPU backend is set up: the faster convolutions, and its memory."""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re

import jax

# YNNPACK's float32 convolutions, which XLA prefers by default, take up to four
# times as long as Eigen's, most of all for filter gradients.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
# XLA ends the process at a flag that it does not know: not in unseen releases.
_BEFORE = (0, 13)


def is_expected(environ=os.environ) -> bool:
  """Whether JAX will run on the CPU, as far as can be told before it starts.

  It will where JAX_PLATFORMS says so, or where no plugin for an accelerator is
  installed.

  >>> (
  ...   is_expected({"JAX_PLATFORMS": "cpu"}),
  ...   is_expected({"JAX_PLATFORMS": "tpu"}),
  ... )
  (True, False)
  """
  if platforms := environ.get("JAX_PLATFORMS"):
    return platforms == "cpu"
  names = ("libtpu", "jax_plugins")
  return not (
    any(importlib.util.find_spec(name) for name in names)
    or importlib.metadata.entry_points(group="jax_plugins")
  )


def set_flags(environ=os.environ, *, version=jax.__version_info__) -> None:
  """Adds the flag of the faster convolutions to XLA_FLAGS.

  For this process, where nothing has run on a device yet, and its children. A
  flag that is there already wins.

  >>> environ = {"XLA_FLAGS": "--xla_dump_to=hlo"}
  >>> set_flags(environ, version=(0, 12, 0))
  >>> environ["XLA_FLAGS"].split()[1].partition("=")[0]
  '--xla_cpu_experimental_ynn_fusion_type'
  """
  flags = environ.get("XLA_FLAGS", "")
  if _FLAG not in flags and version < _BEFORE:
    environ["XLA_FLAGS"] = f"{flags} {_FLAG}={_VALUE}".strip()


def keep_freed_memory() -> bool:
  """Makes malloc keep what is freed, until the process ends.

  XLA's CPU backend allocates a step's buffers with malloc, and glibc asks the
  system for large ones each time anew: a ResNet-18's step at batch 64 touched
  370,000 new pages, an eighth of its time. All threads share one arena, because
  others than the first are limited to 64 MiB; those that have an arena already
  stay there, so this comes before the backend starts its threads.

  Returns:
    Whether malloc took it; False where it is not glibc's.

  >>> keep_freed_memory() in (True, False)
  True
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # not glibc
    return False
  # <malloc.h>: M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD, -1 for never: its
  # largest number, 2 GiB, is less than a larger step frees.
  options = {-8: 1, -4: 0, -1: -1}
  taken = [mallopt(name, value) for name, value in options.items()]
  return all(taken)


# Free pieces of these sizes are kept sorted in lists that malloc walks through.
_SHORTEST_HOLE, _LONGEST_HOLE = 2**10, 2**20
# Shorter compilations leave few.
_LONG_SECONDS = 0.5
# Each may cost 150 MiB; a command compiles its step and some more.
_MOST_FILLS = 8


@functools.cache
def fill_holes_after_compiling() -> None:
  """Calls `fill_holes` after compilations of this process that took long.

  After the first few of them; said twice, this is done once.

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
  step took a third longer in the process that had compiled it. What is filled
  in is given back to the system first, but for a page each.

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
      arena = file.read().partition(b"</heap>")[0]  # all threads have the first
    sizes = rb'<size from="(\d+)" to="(\d+)" total="\d+" count="(\d+)"/>'
    return [tuple(map(int, found)) for found in re.findall(sizes, arena)]

  malloc_trim(0)
  taken = 0
  for _ in range(2):  # the first time leaves ends of the longer ones
    for shortest, longest, number in reversed(pieces()):
      if shortest >= _SHORTEST_HOLE and longest < _LONGEST_HOLE:
        for _ in range(number):
          malloc(shortest - 2 * ctypes.sizeof(ctypes.c_size_t))
        taken += number
  return taken
