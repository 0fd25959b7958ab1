#!/usr/bin/env bash
# Runs one command in N processes on this machine that train together, as N
# hosts would: to try a run of several hosts without having them.
#
#   bash launch/multiprocess.sh N COMMAND...
#
#   bash launch/multiprocess.sh 2 python -m simclr_jax.pretrain \
#     --config=pretrain.py:digits --workdir=runs/two
#
# On the CPU every process sees DEVICES of them (default 1). GPUs are shared
# out, each process getting as many as divide evenly. The lines of process i
# begin with [i]. A signal goes to all; the exit code is the first that is not
# 0. PORT sets the port of process 0 (default: a free one).
set -euo pipefail
usage() { sed -n '/^#!/d; /^[^#]/q; s/^# \{0,1\}//p' "$0"; }
case "${1:-}" in --help | -h) usage; exit ;; esac
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "error: needs a number of processes and a command; see --help" >&2
  exit 2
fi
count=$1
shift

free_port() { # none listens there now
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

export JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-$(free_port)}"
export JAX_NUM_PROCESSES=$count
gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
fi
if [ "$gpus" = 0 ]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
elif [ $((gpus % count)) != 0 ]; then
  echo "error: $gpus GPUs cannot be shared out evenly to $count processes" >&2
  exit 2
fi

pids=()
for ((i = 0; i < count; i++)); do
  if [ "$gpus" != 0 ]; then
    each=$((gpus / count))
    CUDA_VISIBLE_DEVICES=$(seq -s, $((i * each)) $((i * each + each - 1)))
    export CUDA_VISIBLE_DEVICES
  fi
  JAX_PROCESS_ID=$i "$@" > >(exec sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done
pass() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
trap 'pass TERM' TERM
trap 'pass INT' INT
code=0
for pid in "${pids[@]}"; do
  while :; do # a trapped signal ends `wait` early
    one=0
    wait "$pid" || one=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  # Where a signal came in between, ask again: the code is kept.
  [ "$one" -le 128 ] || { wait "$pid" && one=0 || one=$?; }
  [ "$code" != 0 ] || code=$one
done
sleep 0.1 # for the last lines
exit "$code"
