# shellcheck shell=bash
# Sourced by local.sh, test.sh and label_efficiency.sh, never run: makes a
# virtual environment in the checkout and installs the package there, editable,
# at the versions of constraints.txt. Plain bash 3.2, so that it also works on
# macOS.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

# runs PYTHON FROM TO: whether it starts and is Python 3.FROM to 3.TO. Tried,
# not looked up: pyenv puts shims on the path for versions that do not start.
runs() {
  "$1" -c "import sys
sys.exit(not (3, $2) <= sys.version_info[:2] <= (3, $3))" >/dev/null 2>&1
}

# find_python FROM TO: sets $python to an interpreter of Python 3.FROM to 3.TO
# that can make an environment, or returns 1.
find_python() {
  local pyenv="${PYENV_ROOT:-${HOME:-}/.pyenv}/versions"
  for python in python3.13 python3.12 python3.11 python3 python python3.14 \
    python3.15 python3.16 "$pyenv"/3.13.*/bin/python3 \
    "$pyenv"/3.12.*/bin/python3 "$pyenv"/3.11.*/bin/python3; do
    if runs "$python" "$1" "$2" &&
      "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      return 0
    fi
  done
  return 1
}

# usable VENV FROM TO: whether it starts, is Python 3.FROM to 3.TO and complete.
# A start that was killed leaves one without pip: `venv` writes activate last.
usable() {
  runs "$1/bin/python" "$2" "$3" &&
    { [ ! -e "$1/pyvenv.cfg" ] || [ -e "$1/bin/activate" ]; }
}

# make_environment VENV FROM TO: an environment of Python 3.FROM to 3.TO. Where
# none can be had it returns 1, and $missing says in one line what to install.
make_environment() {
  local found
  rm -rf "$1"
  if uv --version >/dev/null 2>&1 &&
    uv venv --quiet --seed --python ">=3.$2,<3.$(($3 + 1))" "$1"; then
    return 0
  fi
  if find_python "$2" "$3"; then
    "$python" -m venv "$1" && return
    missing="$python -m venv $1 failed, see above; is there space on the disk?"
    return 1
  fi
  for python in python3.13 python3.12 python3.11 python3 python; do
    if runs "$python" "$2" "$3"; then
      missing="$python has no venv module; install it (Debian and Ubuntu:"
      missing="$missing apt-get install $(basename "$python")-venv), or uv"
      return 1
    fi
  done
  found="$(python3 --version 2>/dev/null || python --version 2>/dev/null ||
    echo none)"
  missing="needs Python 3.$2 or newer, found: $found; install it (Debian and"
  missing="$missing Ubuntu: apt-get install python3 python3-venv; macOS: brew"
  missing="$missing install python@3.13), or uv, which brings its own"
  return 1
}

# accelerator_extra [DEV]: prints the extra that this machine's accelerator
# needs, if it has one. DEV stands for /dev in the tests.
accelerator_extra() {
  local dev="${1:-/dev}" driver
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader \
    2>/dev/null)" || driver=""
  driver="${driver%%$'\n'*}" # a line a GPU
  if [ -n "$driver" ] && [ "${driver%%.*}" -lt 580 ] 2>/dev/null; then
    echo "note: the NVIDIA driver is $driver and CUDA 13 needs 580: JAX will" \
      "run on the CPU until the driver is updated" >&2
  elif [ -n "$driver" ] || [ -e /proc/driver/nvidia/version ]; then
    echo cuda13
  elif [ -e "$dev/accel0" ] || { [ -d "$dev/vfio" ] && [ -n "${TPU_NAME:-}" ]; }
  then
    echo tpu
  fi
}

# lock VENV: waits until no other start makes or fills VENV, here or on another
# machine, and keeps others waiting until unlock. The lock is a folder: mkdir is
# atomic on network file systems too, and macOS has no flock. Its holder writes
# a new line there every two seconds; who sees none for a minute takes it over.
lock() {
  local line seen="" told="" since=$SECONDS failed=0 why
  lock="$1.lock"
  until why="$(mkdir "$lock" 2>&1)"; do
    if [ -d "$lock" ]; then
      failed=0
    elif failed=$((failed + 1)) && [ $failed -gt 3 ]; then
      echo "error: $why" >&2 # else it was given back just now
      exit 2
    fi
    line="$(cat "$lock/holder" 2>/dev/null)" || line=""
    if [ "$line" != "$seen" ]; then
      seen="$line" since=$SECONDS
    fi
    if [ -z "$told" ] && [ -n "$line" ]; then
      told=yes
      echo "waiting for ${line%,*}, which installs into $1 (if that is gone:" \
        "rm -r $lock)"
    fi
    # One of those who wait can make this folder, and it alone goes on; the line
    # is read again, because the lock may be another one by now.
    if [ $((SECONDS - since)) -ge "${LOCK_SECONDS:-60}" ] &&
      mkdir "$lock/after $seen" 2>/dev/null &&
      [ "$(cat "$lock/holder" 2>/dev/null)" = "$seen" ]; then
      break
    fi
    sleep 1
  done
  (
    beat=0
    while kill -0 $$ && echo "process $$ on $HOSTNAME, $beat" >"$lock/holder"
    do
      beat=$((beat + 1))
      sleep 2
    done
  ) </dev/null >/dev/null 2>&1 &
  heart=$!
  trap unlock EXIT
  trap 'exit 143' TERM # after what runs now, which would go on without it
}

unlock() {
  trap - EXIT TERM
  kill -KILL "$heart" 2>/dev/null || : # it would write into the folder again
  wait "$heart" 2>/dev/null || :
  rm -rf "$lock"
}

# installed VENV EXTRA...: whether VENV has them. A stamp in it names what was
# installed and for which requirements ($sum): a second start needs no network.
installed() {
  local stamp="$1/simclr_jax.stamp" extra
  shift
  sum="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
  sum="$root ${sum// /-}"
  for extra in package "$@"; do
    grep -qxF "$sum $extra" "$stamp" 2>/dev/null || return 1
  done
}

# install VENV EXTRA...: installs what VENV lacks.
install() {
  local venv="$1" extra extras="" rc=0 begin=$SECONDS
  installed "$@" && return 0
  shift
  for extra in "$@"; do extras="$extras,$extra"; done
  echo "installing into $venv: a minute or two, 1 GB (a GPU's extra: 5 GB)"
  set -- --constraint "$root/constraints.txt" \
    --editable "$root${extras:+[${extras#,}]}"
  if uv --version >/dev/null 2>&1; then
    set -- uv pip install --python "$venv/bin/python" "$@"
  else
    set -- "$venv/bin/python" -m pip install "$@"
  fi
  "$@" >"$venv/install.log" 2>&1 </dev/null || rc=$?
  if [ "$rc" != 0 ]; then
    grep -v '^WARNING' "$venv/install.log" | tail -n 15 >&2
    echo "error: the installation failed, see above or $venv/install.log; is" \
      "the network there, and space on the disk?" >&2
    return 1
  fi
  for extra in package ${extras//,/ }; do
    echo "$sum $extra" >>"$venv/simclr_jax.stamp"
  done
  echo "installed in $((SECONDS - begin)) s"
}

# setup EXTRA...: the environment of this checkout; sets $python to its own.
setup() {
  local venv="$root/.venv"
  if ! usable "$venv" 11 99 || ! installed "$venv" "$@"; then
    lock "$venv"
    if ! usable "$venv" 11 99; then # again: another start may have made it
      # Versions that the tests ran on, else a newer one.
      make_environment "$venv" 11 13 ||
        make_environment "$venv" 11 99 ||
        { echo "error: $missing" >&2; exit 2; }
    fi
    install "$venv" "$@" || exit 1
    unlock
  fi
  python="$venv/bin/python"
}
