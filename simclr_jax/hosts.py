"""The processes of a run: how they find each other, agree and end together."""

import atexit
import contextlib
import glob
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from simclr_jax.config import Diverged, UserError

# How long to wait for all processes to start, and for a silent one.
INITIALIZATION_SECONDS = 300
HEARTBEAT_SECONDS = 100

_at_exit: list = []


def initialize(
  environ=os.environ, *, heartbeat_seconds=HEARTBEAT_SECONDS, start=None
) -> bool:
  """Joins the other processes of a cluster; does nothing where there is none.

  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID say it outright (JAX_NUM_PROCESSES=1: train alone). Otherwise
  JAX's own detection is asked where the environment shows more than one
  process of Slurm, MPI, an indexed Kubernetes Job or a TPU slice.

  A process that is not heard of for `heartbeat_seconds` is taken for dead and
  brings the others down; often a closed connection is noticed sooner. Signal
  handlers must be set after this call, which replaces them.

  Args:
    environ: where to look.
    heartbeat_seconds: at most so long do the others wait for a dead process.
    start: called with the arguments of `jax.distributed.initialize`; None is
      that function.

  Returns:
    Whether this is one process of several.

  Raises:
    UserError: the variables contradict each other, or a package is missing.
  """
  options = _cluster(environ)
  if options is None:
    return False
  # It would catch SIGTERM itself and save nothing here; signals.py does.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  _announce_death()
  try:
    (start or jax.distributed.initialize)(
      initialization_timeout=INITIALIZATION_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
      **options,
    )
  except ValueError:
    if options:
      raise
    return False  # one TPU machine, not a slice
  return True


def _cluster(environ) -> dict | None:
  """Arguments of jax.distributed.initialize, {} to detect, None for alone."""
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = [name for name in names if environ.get(name)]
  if environ.get("JAX_NUM_PROCESSES") == "1":
    return None
  if given:
    if len(given) < len(names):
      missing = ", ".join(name for name in names if name not in given)
      raise UserError(
        f"{given[0]} is set but not {missing}; set all three, or none for "
        "Slurm, MPI, Kubernetes and TPU slices, which are detected."
      )
    try:
      count, index = (int(environ[name]) for name in names[1:])
    except ValueError:
      count, index = 0, 0
    if not 0 <= index < count or ":" not in environ[names[0]]:
      raise UserError(
        "JAX_PROCESS_ID must be from 0 to JAX_NUM_PROCESSES - 1 and "
        "JAX_COORDINATOR_ADDRESS host:port; they are "
        f"{', '.join(repr(environ[name]) for name in reversed(names))}."
      )
    return dict(
      coordinator_address=environ[names[0]],
      num_processes=count,
      process_id=index,
      cluster_detection_method="deactivate",
    )

  def more_than_one(name):
    return environ.get(name, "").isdigit() and int(environ[name]) > 1

  # SLURM_STEP_NODELIST: started by srun, not a shell within an allocation.
  if "SLURM_STEP_NODELIST" in environ and more_than_one("SLURM_NTASKS"):
    return {}
  if more_than_one("OMPI_COMM_WORLD_SIZE") or more_than_one("PMI_SIZE"):
    if "OMPI_MCA_orte_hnp_uri" in environ:
      return {}
    _need("mpi4py", "an MPI launcher other than Open MPI before 5")
    return {"cluster_detection_method": "mpi4py"}
  if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
    return {}
  if environ.get("KUBERNETES_SERVICE_HOST") and "JOB_COMPLETION_INDEX" in (
    environ
  ):
    _need("kubernetes", "an indexed Kubernetes Job")
    return {}
  on_tpu = glob.glob("/dev/accel*") and importlib.util.find_spec("libtpu")
  wanted = environ.get("JAX_PLATFORMS", "tpu")
  return {} if on_tpu and "tpu" in wanted else None


def _need(package: str, launcher: str) -> None:
  if not importlib.util.find_spec(package):
    raise UserError(
      f"this process was started by {launcher}, and JAX needs the package "
      f"{package} to find the others: install it, or set "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
      "(JAX_NUM_PROCESSES=1: train alone)."
    )


def _announce_death() -> None:
  """Has a shell print one line should this process die without a word.

  Where another process dies, JAX ends this one from a thread of C++, with a
  stack trace that says little and runs no handler.
  """
  line = (
    f"error: process {os.getpid()} on {socket.gethostname()} was ended from "
    "outside: it was killed, or another process of the run died (see what the "
    "others printed). Start the same command everywhere to continue from the "
    "last checkpoint."
  )
  shell = subprocess.Popen(
    ["/bin/sh", "-c", 'read -r _ || echo "$0" >&2', line],
    stdin=subprocess.PIPE,
    start_new_session=True,  # a signal to the group is not for it
  )

  def done():
    with contextlib.suppress(OSError):
      shell.stdin.write(b"done\n")
      shell.stdin.close()
      shell.wait()

  # Registered before JAX's own handler, so called after it.
  atexit.register(done)
  _at_exit.append(done)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends the process after an error that would leave other hosts waiting.

  Leaving normally waits minutes for the others, which wait in a collective for
  this one. One line or a traceback is printed; the code is 2 for a UserError,
  else 1. In a run of one process this does nothing.
  """
  try:
    yield
  except Exception as error:
    if not jax.distributed.is_initialized():
      raise
    who = f"process {jax.process_index()} of {jax.process_count()}"
    expected = isinstance(error, UserError | Diverged)
    if expected:
      text = f"error: {error}"
    else:
      traceback.print_exc()
      text = f"error: {who} fails and ends the run on all hosts"
      if isinstance(error, jax.errors.JaxRuntimeError):
        text += (
          "; if it lost its connection, another process has died. Start the "
          "same command everywhere to continue from the last checkpoint"
        )
    print(text, file=sys.stderr, flush=True)
    if expected:  # most likely all have it: leave at the same time
      leave = threading.Thread(target=jax.distributed.shutdown, daemon=True)
      leave.start()
      leave.join(timeout=10)
    sys.stdout.flush()
    for done in _at_exit:
      done()
    os._exit(2 if isinstance(error, UserError) else 1)


def agree(problem: str = "") -> None:
  """Raises UserError on all hosts where one of them has a `problem`.

  Every host must call it, in the same order as other collectives.
  """
  if jax.process_count() == 1:
    found = problem
  else:
    flags = multihost_utils.process_allgather(np.asarray(bool(problem)))
    bad = np.flatnonzero(flags)
    found = problem or (f"see process {bad[0]}." if bad.size else "")
  if found:
    raise UserError(found)


def broadcast(value: int) -> int:
  """Returns the `value` of process 0 (below 2**31) on all hosts."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def unused_accelerator() -> str:
  """Says so where the machine has an accelerator that JAX does not use."""
  if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
    return ""
  if os.path.exists("/proc/driver/nvidia/version"):
    found, extra = "an NVIDIA GPU", "cuda13"
  elif glob.glob("/dev/accel*"):
    found, extra = "a TPU", "tpu"
  else:
    return ""
  return (
    f"this machine has {found}, but JAX runs on the CPU; install the extra, in "
    f"the checkout: pip install '.[{extra}]'"
  )
