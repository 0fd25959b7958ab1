"""What made a result: versions, devices, commit."""

import functools
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import jax

import simclr_jax


def provenance() -> dict:
  """{"versions": {package: version}, "device": "8 x TPU v4", "commit"}.

  "commit" is that of the checkout or of the address that the package was
  installed from, with "-dirty" where the checkout has changes; "" if unknown.
  """
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    "versions": {"simclr_jax": simclr_jax.__version__, **versions},
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "commit": _commit(),
  }


_PACKAGES = ("jax", "flax")


@functools.cache
def _commit() -> str:
  checkout = Path(__file__).resolve().parents[1]
  if (checkout / ".git").exists():
    command = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
      return subprocess.run(
        ["git", "-C", str(checkout), *command],
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
      ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not its owner
      return ""
  try:
    package = importlib.metadata.distribution("simclr_jax")
  except importlib.metadata.PackageNotFoundError:
    return ""
  origin = json.loads(package.read_text("direct_url.json") or "{}")
  return origin.get("vcs_info", {}).get("commit_id", "")
