"""Whether JAX will run on the CPU, and XLA's flag for faster convolutions."""

import importlib.metadata
import importlib.util
import os

import jax

# YNNPACK's float32 convolutions, which XLA prefers by default, take up to four
# times as long as Eigen's, most of all for filter gradients.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
# XLA aborts at a flag it does not know, so it is set only below the first
# release that was not tried.
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
