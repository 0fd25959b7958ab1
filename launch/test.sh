#!/usr/bin/env bash
# Sets up .venv in the checkout and runs the checks and the quick tests there,
# on the CPU. Needs no root, and no network once installed.
#
#   bash launch/test.sh [--all] [PYTEST ARGUMENTS]
#
#   --all    also the slow tests, and the quick ones on a second Python
#   others   go to pytest, which then runs alone: test.sh tests/test_losses.py
set -euo pipefail
all=""
for arg; do
  shift
  case "$arg" in
  --all) all=yes ;;
  --help | -h)
    sed -n '/^#!/d; /^[^#]/q; s/^# \{0,1\}//p' "$0"
    exit ;;
  *) set -- "$@" "$arg" ;;
  esac
done
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$root"
setup test
export JAX_PLATFORMS=cpu
failed=""
trap 'exit 130' INT # pytest catches Ctrl-C, and the next check would start
check() { # runs a command of the environment; all of them run, to the end
  echo "== $*"
  "$python" -m "$@" || failed="$failed, $1"
}

if [ $# = 0 ]; then
  check ruff check .
  check ruff format --check .
  check mypy
fi
# Side by side, a file at a time; slow tests alone, because some of them measure.
parallel=""
[ $# != 0 ] || parallel="--numprocesses=auto --maxprocesses=8 --dist=loadfile"
# Unquoted: several words or none.
# shellcheck disable=SC2086
if [ -z "$all" ]; then
  check pytest $parallel "$@"
elif [ $# = 0 ]; then
  check pytest $parallel
  check pytest -m slow
else
  check pytest -m "" "$@"
fi

if [ -n "$all" ]; then
  # JAX's oldest supported release comes with Python 3.11, its newest with 3.12
  # and up: the tests hold on both.
  if runs "$python" 11 11; then from=12 to=13; else from=11 to=11; fi
  other="$root/.venv-second"
  lock "$other"
  if usable "$other" $from $to || make_environment "$other" $from $to; then
    install "$other" test || exit 1
    unlock
    python="$other/bin/python"
    # shellcheck disable=SC2086
    check pytest $parallel "$@"
  else
    unlock
    echo "SKIPPED the tests on a second Python: $missing"
  fi
fi
if [ -n "$failed" ]; then
  echo "failed: ${failed#, }" >&2
  exit 1
fi
