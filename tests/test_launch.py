"""launch/setup.sh, local.sh and test.sh, with programs that only pretend."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = "basename bash cat cksum cp cut dirname grep mkdir rm sed sleep tail tr"

# Says that it is Python 3.$minor. `-m venv DIR` puts a copy of it in DIR and
# takes $VENV_SECONDS until it is complete, `-m pip` writes down what it was
# asked, a script prints its arguments and exits 7.
PYTHON = """#!{bash}
minor={minor}
case "$1 $2" in
"-c import sys"*)
  set -- $(echo "$2" | grep -o '(3, [0-9]*)' | tr -dc '0-9\\n' | cut -c 2-)
  [ "$1" -le $minor ] && [ $minor -le "$2" ] ;;
"-c import ensurepip, venv") {has_venv} ;;
"--version "*) echo "Python 3.$minor.0" ;;
"-m venv")
  mkdir -p "$3/bin" && : >"$3/pyvenv.cfg" && cp "$0" "$3/bin/python"
  : >"$3/half made" && sleep "${{VENV_SECONDS:-0}}"
  : >"$3/bin/activate"
  exit {venv_exit} ;;
"-m pip")
  [ -e "${{0%/*}}/activate" ] || {{ echo "No module named pip"; exit 1; }}
  echo "$*" >>"{log}"
  echo "from the installer"
  exit {pip_exit} ;;
*) printf 'ran'; printf ' %q' "$@"; echo; exit 7 ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
  """A checkout and a path that holds nothing but what a test puts there."""
  root, bin_ = tmp_path / "check out", tmp_path / "bin"
  shutil.copytree(ROOT / "launch", root / "launch")
  for name in ("pyproject.toml", "constraints.txt"):
    shutil.copy(ROOT / name, root)
  bin_.mkdir()
  for tool in TOOLS.split():
    (bin_ / tool).symlink_to(shutil.which(tool))
  machine = Machine(root, bin_, tmp_path / "log")
  yield machine
  for process in machine.started:
    if process.poll() is None:  # the test has failed
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()


class Machine:
  """Runs bash in an environment with only `bin` on the path."""

  def __init__(self, root, bin_, log):
    self.root, self.bin, self.log = root, bin_, log
    self.started = []
    self.env = {"PATH": str(bin_), "HOME": str(root.parent)}

  def program(self, name, text):
    path = self.bin / name
    path.write_text(text)
    path.chmod(0o755)

  def python(self, name, minor, *, has_venv=True, venv_exit=0, pip_exit=0):
    self.program(
      name,
      PYTHON.format(
        bash=shutil.which("bash"),
        minor=minor,
        has_venv=str(has_venv).lower(),
        venv_exit=venv_exit,
        log=self.log,
        pip_exit=pip_exit,
      ),
    )

  def bash(self, *args, cwd=None):
    return subprocess.run(
      [shutil.which("bash"), *args],
      env=self.env,
      cwd=cwd or self.root.parent,
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )

  def local(self, *args):
    return self.bash(str(self.root / "launch" / "local.sh"), *args)

  def start(self, script, *args):
    """Starts it as the shell of a terminal does: in a group of its own."""
    # A shell that was itself started with SIGINT ignored could not trap it.
    command = [shutil.which("env"), "--default-signal=INT"]
    command += [shutil.which("bash"), self.root / "launch" / script, *args]
    process = subprocess.Popen(
      command,
      env=self.env,
      cwd=self.root.parent,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.started.append(process)
    return process

  def source(self, code):
    return self.bash("-euo", "pipefail", "-c", f'. "$0"\n{code}', self.setup)

  @property
  def setup(self):
    return str(self.root / "launch" / "setup.sh")

  def installs(self):
    return self.log.read_text().splitlines() if self.log.exists() else []


def ran(done):
  """The arguments of every program that a script started."""
  lines = done.stdout.splitlines()
  return [shlex.split(line)[1:] for line in lines if line.startswith("ran ")]


def test_local_installs_once_and_passes_arguments_and_exit_code(machine):
  machine.python("python3", 11)
  first = machine.local("--fresh", "a b")
  assert first.returncode == 7, first.stderr
  chain = str(machine.root / "launch" / "digits_chain.py")
  workdir = f"--workdir={machine.root}/runs/digits"
  assert ran(first) == [[chain, workdir, "--fresh", "a b"]]
  assert len(machine.installs()) == 1
  assert machine.installs()[0].endswith(
    f"--editable {machine.root}[tensorboard]"
  )
  assert f"--constraint {machine.root}/constraints.txt" in machine.installs()[0]

  again = machine.local()
  assert again.returncode == 7
  assert ran(again) == [[chain, workdir]]
  assert again.stdout.count("\n") == 1
  assert len(machine.installs()) == 1


def test_changed_requirements_install_again(machine):
  machine.python("python3", 12)
  machine.local()
  with (machine.root / "constraints.txt").open("a") as file:
    file.write("six==1.17.0\n")
  machine.local()
  machine.local()
  assert len(machine.installs()) == 2


def test_another_extra_is_added_and_both_stay(machine):
  machine.python("python3", 13)
  machine.local()
  machine.source("setup test")
  assert machine.installs()[1].endswith(f"{machine.root}[test]")
  machine.local()
  machine.source("setup test")
  assert len(machine.installs()) == 2


def test_a_failed_installation_is_told_and_tried_again(machine):
  machine.python("python3", 11, pip_exit=3)
  for attempt in (1, 2):
    done = machine.local()
    assert done.returncode == 1
    assert "from the installer\nerror: the installation failed" in done.stderr
    assert len(machine.installs()) == attempt
    assert ran(done) == []


def test_an_environment_that_no_longer_starts_is_made_anew(machine):
  machine.python("python3", 11)
  machine.local()
  (machine.root / ".venv" / "bin" / "python").unlink()
  assert machine.local().returncode == 7
  assert len(machine.installs()) == 2


def wait_for(path):
  end = time.monotonic() + 30
  while not path.exists():
    assert time.monotonic() < end, f"no {path}"
    time.sleep(0.02)


def test_starts_at_the_same_time_make_one_environment(machine):
  machine.python("python3", 11)
  machine.env["VENV_SECONDS"] = "1.5"
  starts = [machine.start("local.sh") for _ in range(4)]
  said = [start.communicate(timeout=60) for start in starts]
  assert [start.returncode for start in starts] == [7] * 4, said
  assert len(machine.installs()) == 1
  waited = [out for out, _ in said if "waiting for process " in out]
  assert len(waited) == 3
  assert f"installs into {machine.root}/.venv" in waited[0]
  assert [p.name for p in machine.root.glob(".venv*")] == [".venv"]


def test_an_environment_left_half_made_is_made_anew(machine):
  machine.python("python3", 11)
  machine.env["VENV_SECONDS"] = "100"
  killed = machine.start("local.sh")
  wait_for(machine.root / ".venv" / "half made")
  os.killpg(killed.pid, signal.SIGINT)  # Ctrl-C
  killed.communicate(timeout=30)
  assert killed.returncode not in (0, 7)
  assert [p.name for p in machine.root.glob(".venv*")] == [".venv"]
  machine.env["VENV_SECONDS"] = "0"
  done = machine.local()
  assert done.returncode == 7, done.stderr
  assert "waiting" not in done.stdout


def test_a_signal_to_the_script_alone_leaves_nothing_running(machine):
  """The lock is given back after the program that would otherwise go on."""
  machine.python("python3", 11)
  machine.env["VENV_SECONDS"] = "1"
  stopped = machine.start("local.sh")
  wait_for(machine.root / ".venv" / "half made")
  stopped.terminate()
  stopped.communicate(timeout=30)
  assert stopped.returncode == 143
  assert (machine.root / ".venv" / "bin" / "activate").exists()
  assert [p.name for p in machine.root.glob(".venv*")] == [".venv"]


@pytest.mark.slow
def test_the_lock_of_a_start_that_was_killed_is_taken_over(machine):
  machine.python("python3", 11)
  machine.env |= {"VENV_SECONDS": "100", "LOCK_SECONDS": "6"}
  killed = machine.start("local.sh")
  wait_for(machine.root / ".venv.lock" / "holder")
  wait_for(machine.root / ".venv" / "half made")
  os.killpg(killed.pid, signal.SIGKILL)
  killed.communicate(timeout=30)
  machine.env["VENV_SECONDS"] = "8"  # longer than the lock of a dead one holds
  starts = [machine.start("local.sh") for _ in range(3)]
  said = [start.communicate(timeout=60) for start in starts]
  assert [start.returncode for start in starts] == [7] * 3, said
  assert len(machine.installs()) == 1
  assert all(f"process {killed.pid} on " in out for out, _ in said)
  assert [p.name for p in machine.root.glob(".venv*")] == [".venv"]


def test_a_lock_that_cannot_be_made_is_told(machine):
  machine.python("python3", 11)
  (machine.root / ".venv.lock").touch()
  done = machine.local()
  assert done.returncode == 2
  assert done.stderr.startswith("error: mkdir: ")
  assert done.stderr.count("\n") == 1


def test_what_is_installed_needs_no_lock(machine):
  """Nor a file system that can be written."""
  machine.python("python3", 11)
  machine.local()
  (machine.root / ".venv.lock").touch()
  assert machine.local().returncode == 7


def test_an_environment_that_cannot_be_made_is_told(machine):
  machine.python("python3", 11, venv_exit=1)
  done = machine.local()
  assert done.returncode == 2
  assert done.stderr.startswith("error: python3 -m venv ")
  assert done.stderr.count("\n") == 1


def test_no_python_says_what_to_install(machine):
  done = machine.local()
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1
  assert done.stderr.startswith(
    "error: needs Python 3.11 or newer, found: none"
  )


def test_an_old_python_is_named(machine):
  machine.python("python3", 9)
  done = machine.local()
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1
  assert "found: Python 3.9.0; install it" in done.stderr


def test_a_python_without_venv_names_the_package(machine):
  machine.python("python3", 11, has_venv=False)
  done = machine.local()
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1
  assert "python3 has no venv module" in done.stderr
  assert "apt-get install python3-venv)" in done.stderr


def test_programs_that_do_not_start_are_passed_over(machine):
  """pyenv puts a python3.13 on the path that only says "command not found"."""
  broken = f"#!{shutil.which('bash')}\nexit 127\n"
  machine.program("python3.13", broken)
  machine.program("uv", broken)
  machine.python("python3.12", 12, has_venv=False)
  machine.python("python3", 11)
  done = machine.source("find_python 11 13; echo $python")
  assert done.stdout == "python3\n"


def test_a_tested_version_is_preferred_to_a_newer_one(machine):
  machine.python("python3", 14)
  assert machine.source('setup; "$python" --version').stdout.endswith(
    "3.14.0\n"
  )
  shutil.rmtree(machine.root / ".venv")
  machine.python("python3.12", 12)
  assert machine.source('setup; "$python" --version').stdout.endswith(
    "3.12.0\n"
  )


def test_uv_is_used_where_it_is(machine):
  machine.python("python3", 11)
  machine.python("other", 13)
  machine.program(
    "uv",
    f"#!{shutil.which('bash')}\n"
    f'[ "$1" = --version ] || echo "uv $*" >>"{machine.log}"\n'
    '[ "$1" != venv ] || { shift $(($# - 1)); other -m venv "$1"; }\n',
  )
  assert machine.local().returncode == 7
  made, installed = machine.installs()
  assert made.startswith("uv venv")
  assert "--python >=3.11,<3.14" in made
  python = machine.root / ".venv" / "bin" / "python"
  assert installed.startswith(f"uv pip install --python {python} --constraint")


@pytest.mark.parametrize(
  ("driver", "extra"),
  [("580.65.06", "cuda13"), ("610.1", "cuda13"), ("570.1", "")],
)
def test_an_nvidia_driver_gets_its_extra(machine, driver, extra):
  machine.program(
    "nvidia-smi", f"#!{shutil.which('bash')}\necho {driver}\necho {driver}\n"
  )
  done = machine.source("accelerator_extra")
  assert done.returncode == 0
  assert done.stdout.strip() == extra
  assert ("driver is 570.1 and CUDA 13 needs 580" in done.stderr) != bool(extra)


def test_the_fitting_extra_is_installed(machine):
  machine.python("python3", 11)
  machine.program("nvidia-smi", f"#!{shutil.which('bash')}\necho 590.1\n")
  machine.local()
  assert machine.installs()[0].endswith("[tensorboard,cuda13]")


@pytest.mark.skipif(
  pathlib.Path("/proc/driver/nvidia/version").exists(),
  reason="an NVIDIA driver is there",
)
def test_a_tpu_gets_its_extra(machine, tmp_path):
  device = tmp_path / "dev"
  device.mkdir()
  code = f'accelerator_extra "{device}"'
  assert machine.source(code).stdout == ""
  (device / "vfio").mkdir()  # virtual machines have it for other reasons too
  assert machine.source(code).stdout == ""
  machine.env["TPU_NAME"] = "pod"
  assert machine.source(code).stdout == "tpu\n"
  del machine.env["TPU_NAME"]
  (device / "accel0").touch()
  assert machine.source(code).stdout == "tpu\n"


PARALLEL = ["--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile"]


def test_test_passes_arguments_to_pytest_alone(machine):
  machine.python("python3", 11)
  script = str(machine.root / "launch" / "test.sh")
  done = machine.bash(script, "tests/test_losses.py", "-k", "a b", cwd="/")
  assert done.returncode == 1
  assert ran(done) == [["-m", "pytest", "tests/test_losses.py", "-k", "a b"]]
  assert done.stderr == "failed: pytest\n"


def test_test_runs_every_check_and_names_those_that_failed(machine):
  machine.python("python3", 11)
  done = machine.bash(str(machine.root / "launch" / "test.sh"), "--all")
  assert done.returncode == 1
  assert ran(done) == [
    ["-m", "ruff", "check", "."],
    ["-m", "ruff", "format", "--check", "."],
    ["-m", "mypy"],
    ["-m", "pytest", *PARALLEL],
    ["-m", "pytest", "-m", "slow"],
  ]
  assert (
    "SKIPPED the tests on a second Python: needs Python 3.12" in done.stdout
  )
  assert done.stderr == "failed: ruff, ruff, mypy, pytest, pytest\n"


def test_all_runs_a_second_python(machine):
  machine.python("python3", 11)
  pyenv = machine.root.parent / ".pyenv" / "versions" / "3.13.0" / "bin"
  pyenv.mkdir(parents=True)
  machine.python("python3.13", 13)
  (machine.bin / "python3.13").rename(pyenv / "python3")
  script = str(machine.root / "launch" / "test.sh")
  machine.source("find_python() { python=python3; }; setup test")
  done = machine.bash(script, "--all")
  assert "SKIPPED" not in done.stdout
  assert ran(done)[-3:] == [
    ["-m", "pytest", *PARALLEL],
    ["-m", "pytest", "-m", "slow"],
    ["-m", "pytest", *PARALLEL],
  ]
  assert done.stderr == "failed: ruff, ruff, mypy, pytest, pytest, pytest\n"
  assert (machine.root / ".venv-second" / "bin" / "python").exists()


def test_ctrl_c_ends_all_checks(machine):
  """pytest catches it and exits by itself: bash alone would then go on."""
  machine.python("python3", 11)
  machine.source("setup test")
  python = machine.root / ".venv" / "bin" / "python"
  slow = "sleep 100 & trap 'kill $!; exit 2' INT; wait; exit 7"
  python.write_text(python.read_text().replace("exit 7", slow))
  start = machine.start("test.sh", "--all")
  assert start.stdout.readline() == "== ruff check .\n"
  assert start.stdout.readline().startswith("ran ")
  os.killpg(start.pid, signal.SIGINT)
  out, _ = start.communicate(timeout=30)
  assert out == ""
  assert start.returncode == 130


def test_a_job_of_slurm_finds_the_checkout(machine):
  machine.python("python3", 11)
  spool = machine.root.parent / "spool"
  spool.mkdir()
  script = machine.root / "launch" / "label_efficiency.sh"
  copy = shutil.copy(script, spool / "slurm_script")
  machine.env |= {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(machine.root)}
  done = machine.bash(str(copy), "cifar10", "--seeds=0")
  assert ran(done)[0][:3] == ["-m", "simclr_jax.sweep", "--recipe=cifar10"]
  machine.env["SLURM_SUBMIT_DIR"] = str(machine.root.parent)
  done = machine.bash(str(copy))
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "script", ["local.sh", "test.sh", "label_efficiency.sh"]
)
def test_help_installs_nothing(machine, script):
  done = machine.bash(str(machine.root / "launch" / script), "--help")
  assert done.returncode == 0
  assert f"bash launch/{script}" in done.stdout
  assert not (machine.root / ".venv").exists()


def test_this_interpreter_is_found_fit(machine):
  """`runs` against a real Python, at and beside its version."""
  minor = sys.version_info[1]
  for low, high, fits in (
    (minor, minor, 0),
    (11, 99, 0),
    (minor + 1, 99, 1),
    (3, minor - 1, 1),
  ):
    code = f'runs "{sys.executable}" {low} {high} || exit 1'
    machine.env["PATH"] = os.environ["PATH"]
    assert machine.source(code).returncode == fits
