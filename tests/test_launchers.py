"""Scripts for clusters, with programs that only pretend to be one."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import kubernetes_validate
import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"

# Writes down what it is asked; answers `describe` with the next line of the
# file "states" and `ssh` with the next exit code of "codes", or of "installs";
# 0 where there is no more.
GCLOUD = """#!/bin/bash
echo "$*" >>"$LOG/calls"
next() { [ ! -e "$LOG/$1" ] || { head -1 "$LOG/$1"; sed -i 1d "$LOG/$1"; }; }
case "$*" in
*describe*) next states ;;
*"pip install"*) code="$(next installs)" && exit "${code:-0}" ;;
*ssh*) exit "$(next codes)" ;;
esac
"""


@pytest.fixture
def start(tmp_path):
  (tmp_path / "bin").mkdir()
  started = []

  def run(script, *args, wait=True, env=None, **programs):
    for name, text in programs.items():
      (tmp_path / "bin" / name).write_text(text)
      (tmp_path / "bin" / name).chmod(0o755)
    # A shell that was itself started with SIGINT ignored could not trap it.
    process = subprocess.Popen(
      ["env", "--default-signal=INT", "bash", LAUNCH / script, *args],
      env={
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "RETRY_SECONDS": "0",
        "SLURM_JOB_ID": "77",
      }
      | (env or {}),
      cwd=tmp_path,
      start_new_session=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    if not wait:
      return process
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error

  yield run
  for process in started:
    if process.poll() is None:  # the test has failed
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()


def wait_for(path):
  end = time.monotonic() + 30
  while not path.exists():
    assert time.monotonic() < end, f"no {path}"
    time.sleep(0.05)


def calls(tmp_path):
  lines = (tmp_path / "calls").read_text().splitlines()
  return [
    "install"
    if "pip install" in line
    else "train"
    if " ssh " in line
    else line.split()[3]
    for line in lines
  ]


POD = ("--name=pod", "--zone=here", "--type=v4-32")


def test_tpu_pod_prints_its_commands(start, tmp_path):
  code, out, _ = start(
    "tpu_pod.sh", "--dry-run", *POD, "--spot", "--", "run", "a b", gcloud=GCLOUD
  )
  assert code == 0
  assert not (tmp_path / "calls").exists()
  create, scp, install, train, delete = out.splitlines()
  prefix = "gcloud compute tpus tpu-vm "
  assert create == (
    f"{prefix}create pod --zone=here --accelerator-type=v4-32 "
    "--version=tpu-ubuntu2204-base --spot"
  )
  assert scp.startswith(f"{prefix}scp --recurse")
  assert scp.endswith(" pod: --zone=here --worker=all")
  assert "pip" in install
  ssh = f"{prefix}ssh pod --zone=here --worker=all --command="
  assert train.startswith(ssh)
  assert delete == f"{prefix}delete pod --zone=here --quiet"


@pytest.mark.parametrize(
  "codes, states, code, expected",
  [
    # states: two looks before a start, one after a failure, one to see whether
    # the slice is still prepared.
    ("0", "\n\n", 0, "create scp install train delete"),
    ("2", "\n\n", 2, "create scp install train delete"),
    ("1", "\n\nREADY", 1, "create scp install train delete"),
    (
      "143\n0",
      "\n\nREADY\nREADY",
      0,
      "create scp install train train delete",
    ),
    (
      "1\n0",
      "\n\nPREEMPTED\nPREEMPTED\nPREEMPTED\n\n",
      0,
      "create scp install train delete create scp install train delete",
    ),
  ],
  ids=["done", "mistake", "fault", "stopped", "preempted"],
)
def test_tpu_pod_starts_again(start, tmp_path, codes, states, code, expected):
  (tmp_path / "codes").write_text(f"{codes}\n")
  (tmp_path / "states").write_text(f"{states}\n")
  got, _, error = start("tpu_pod.sh", *POD, "--", "train", gcloud=GCLOUD)
  assert got == code, error
  assert [c for c in calls(tmp_path) if c != "describe"] == expected.split()


def test_tpu_pod_brings_a_python_that_the_package_runs_on(start):
  """tpu-ubuntu2204-base has 3.10."""
  _, out, _ = start("tpu_pod.sh", "--dry-run", *POD, "--", "run")
  install = shlex.split(out.splitlines()[2])[-1]
  made = re.search(r"uv venv .*--python '(.*),<3.14' .venv &&", install)
  project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())
  assert made
  assert made[1] == project["project"]["requires-python"]


@pytest.mark.parametrize(
  "installs, codes, states, code, expected",
  [
    # states: two looks before a start, one after an installation that failed.
    ("1\n" * 30, "", "\n\nREADY", 1, "create scp install delete"),
    # The connection broke; the slice was taken away.
    (
      "255\n0",
      "0",
      "\n\nREADY\nREADY",
      0,
      "create scp install scp install train delete",
    ),
    (
      "1\n0",
      "0",
      "\n\n\n\n",
      0,
      "create scp install create scp install train delete",
    ),
    # PyPI was away when the slice had to be made again.
    (
      "0\n1\n0",
      "255\n0",
      "\n\nGONE\nGONE\n\nREADY\nREADY",
      0,
      "create scp install train delete "
      "create scp install scp install train delete",
    ),
  ],
  ids=["broken", "connection", "preempted", "worked"],
)
def test_tpu_pod_ends_where_the_installation_fails(
  start, tmp_path, installs, codes, states, code, expected
):
  (tmp_path / "installs").write_text(f"{installs}\n")
  (tmp_path / "codes").write_text(f"{codes}\n")
  (tmp_path / "states").write_text(f"{states}\n")
  got, _, error = start("tpu_pod.sh", *POD, "--", "train", gcloud=GCLOUD)
  assert got == code, error
  assert [c for c in calls(tmp_path) if c != "describe"] == expected.split()
  if code:
    assert error.startswith("error: the installation failed on pod")
    assert error.count("\n") == 1


def test_tpu_pod_counts_no_preemptions(start, tmp_path):
  (tmp_path / "codes").write_text("255\n" * 25 + "0\n")
  gone = "\n\nPREEMPTED\n"  # two looks before a start, one after it
  (tmp_path / "states").write_text(gone * 25 + "\n\n")
  got, _, error = start("tpu_pod.sh", *POD, "--", "train", gcloud=GCLOUD)
  assert got == 0, error
  assert calls(tmp_path).count("train") == 26


def test_tpu_pod_leaves_the_slice_where_it_is_interrupted(start, tmp_path):
  """gcloud answers Ctrl-C with the code of its ssh."""
  waits = "trap 'exit 130' INT; touch \"$LOG/up\"; while :; do sleep 0.1; done"
  process = start(
    "tpu_pod.sh",
    *POD,
    "--",
    "train",
    wait=False,
    gcloud=GCLOUD.replace('*ssh*) exit "$(next codes)"', f"*ssh*) {waits}"),
  )
  wait_for(tmp_path / "up")
  os.killpg(process.pid, signal.SIGINT)
  _, error = process.communicate(timeout=30)
  assert process.returncode == 130
  assert error == "interrupted: the slice pod is left as it is\n"
  assert "delete" not in calls(tmp_path)


SRUN = """#!/bin/bash
trap 'sleep 0.3; exit 143' TERM
echo "srun $*"
echo "flags:$XLA_FLAGS cache:$JAX_COMPILATION_CACHE_DIR"
touch "$LOG/started"
[ -z "$(cat "$LOG/code")" ] && while :; do sleep 0.1; done
exit "$(cat "$LOG/code")"
"""
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_slurm_requeues_what_was_stopped(start, tmp_path, code):
  (tmp_path / "code").write_text(str(code))
  got, out, error = start(
    "slurm.sbatch", "train", "--x", srun=SRUN, scontrol=SCONTROL
  )
  assert got == code, error
  assert "srun --kill-on-bad-exit=0 --label train --x" in out
  assert ("scontrol requeue 77" in out) is (code == 143)


@pytest.mark.parametrize("on", [False, True])
def test_slurm_keeps_the_bits_where_asked(start, tmp_path, on):
  (tmp_path / "code").write_text("0")
  env = {"SIMCLR_DETERMINISTIC": "1", "XLA_FLAGS": "--mine"} if on else {}
  _, out, _ = start("slurm.sbatch", "train", env=env, srun=SRUN)
  flags = "--xla_gpu_enable_latency_hiding_scheduler=true"
  if on:
    flags += " --mine --xla_gpu_exclude_nondeterministic_ops=true"
  cache = tmp_path / "xla_cache" if on else ""
  assert f"flags:{flags} cache:{cache}\n" in out


def test_slurm_waits_for_the_save_after_a_signal(start, tmp_path):
  (tmp_path / "code").write_text("")
  process = start(
    "slurm.sbatch", "train", wait=False, srun=SRUN, scontrol=SCONTROL
  )
  wait_for(tmp_path / "started")
  # To the shell first, as with scancel --batch, then to the task.
  process.send_signal(signal.SIGTERM)
  time.sleep(0.5)
  assert process.poll() is None
  children = f"/proc/{process.pid}/task/{process.pid}/children"
  child = int(pathlib.Path(children).read_text().split()[0])
  os.kill(child, signal.SIGTERM)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 143
  assert "scontrol requeue 77" in out


def test_slurm_takes_the_code_of_tasks_that_end_with_the_signal(
  start, tmp_path
):
  """The signal ends the wait, and the tasks end before the next look."""
  (tmp_path / "code").write_text("0")
  (tmp_path / "old").write_text(
    'kill() { touch "$LOG/looks"; sleep 1; builtin kill "$@"; }\n'
  )
  process = start(
    "slurm.sbatch",
    "train",
    wait=False,
    env={"BASH_ENV": str(tmp_path / "old")},
    srun='#!/bin/sh\ntouch "$LOG/started"\n'
    'while ! [ -e "$LOG/looks" ]; do sleep 0.1; done\n',
    scontrol=SCONTROL,
  )
  wait_for(tmp_path / "started")
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 0
  assert "requeue" not in out


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_without_a_command(start, script):
  code, _, error = start(script)
  assert code == 2
  assert error.startswith("usage: ")


def kubernetes():
  return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_job_of_kubernetes_fits_the_published_schema(version):
  service, job = kubernetes()
  for resource in (service, job):
    kubernetes_validate.validate(resource, version, strict=True)
  job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = "2"
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(job, version, strict=True)


def test_what_kubernetes_does_after_an_exit_code():
  rules = kubernetes()[1]["spec"]["podFailurePolicy"]["rules"]
  actions = {
    value: rule["action"]
    for rule in rules
    if "onExitCodes" in rule
    for value in rule["onExitCodes"]["values"]
  }
  # Ignore: started again, and not counted. 1 and others: counted.
  assert actions == {2: "FailJob", 143: "Ignore"}


def test_the_job_of_kubernetes_is_consistent():
  service, job = kubernetes()
  name, spec = job["metadata"]["name"], job["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  env = {e["name"]: e for e in container["env"]}
  host, port = env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
  assert host == f"{name}-0.{pod['subdomain']}"
  assert int(port) == container["ports"][0]["containerPort"]
  assert pod["subdomain"] == service["metadata"]["name"]
  assert service["spec"]["selector"] == {"job-name": name}
  count = int(env["JAX_NUM_PROCESSES"]["value"])
  assert spec["parallelism"] == spec["completions"] == count
  assert spec["completionMode"] == "Indexed"
  for rule in spec["podFailurePolicy"]["rules"]:
    if "onExitCodes" in rule:
      assert rule["onExitCodes"]["containerName"] == container["name"]
  mounts = {m["name"] for m in container["volumeMounts"]}
  assert mounts == {v["name"] for v in pod["volumes"]}


def test_no_variable_of_the_pods_is_there_twice():
  """Not in comments that may be taken in either: the last one alone counts."""
  env = (LAUNCH / "kubernetes.yaml").read_text().split(" env:\n")[1]
  names = re.findall(r"- name: (\w+)", env.split(" ports:\n")[0])
  assert "XLA_FLAGS" in names
  assert len(names) == len(set(names))


def test_multiprocess_numbers_its_processes(start):
  code, out, _ = start(
    "multiprocess.sh",
    "--processes=3",
    "--devices=4",
    "bash",
    "-c",
    "echo $JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_PLATFORMS $XLA_FLAGS; "
    "exit $((5 * JAX_PROCESS_ID))",
  )
  flags = "cpu --xla_force_host_platform_device_count=4"
  assert sorted(out.splitlines()) == [
    f"0/3 {flags}",
    f"[1] 1/3 {flags}",
    f"[2] 2/3 {flags}",
  ]
  assert code in (5, 10)


def test_multiprocess_passes_the_signal_on(start):
  process = start(
    "multiprocess.sh",
    "bash",
    "-c",
    "trap 'exit 143' TERM; echo up; while :; do sleep 0.1; done",
    wait=False,
  )
  for _ in range(2):
    assert process.stdout.readline().endswith("up\n")
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 143


COUNTS = """
import signal, sys, time
came = []
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, lambda *_: came.append(1))
print("up", flush=True)
while not came:
  time.sleep(0.05)
time.sleep(1)
print("signals:", len(came))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_multiprocess_passes_one_signal_on(start, number):
  """Ctrl-C and `timeout` reach a group; at a second one nothing is saved."""
  process = start("multiprocess.sh", sys.executable, "-c", COUNTS, wait=False)
  for _ in range(2):
    assert process.stdout.readline().endswith("up\n")
  os.killpg(process.pid, number)
  out, _ = process.communicate(timeout=30)
  assert sorted(out.splitlines()) == ["[1] signals: 1", "signals: 1"]


def test_multiprocess_ends_on_an_old_bash(start, tmp_path):
  """`wait -n` came with bash 4.3, its -p with 5.1; macOS has 3.2."""
  (tmp_path / "old").write_text(
    'wait() { case "$1" in -*) return 2 ;; *) builtin wait "$@" ;; esac; }\n'
  )
  code, out, _ = start(
    "multiprocess.sh",
    "bash",
    "-c",
    "sleep 0.$JAX_PROCESS_ID; echo up; exit $((5 * JAX_PROCESS_ID))",
    env={"BASH_ENV": str(tmp_path / "old")},
  )
  assert code == 5
  assert sorted(out.splitlines()) == ["[1] up", "up"]
