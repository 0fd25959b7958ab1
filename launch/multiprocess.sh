#!/usr/bin/env bash
# Starts a command as several processes on this machine that train together, to
# try what several hosts would do.
#
#   bash launch/multiprocess.sh [--processes=2] [--devices=2] COMMAND...
#
#   bash launch/multiprocess.sh .venv/bin/python -m simclr_jax.pretrain \
#       --config=pretrain.py:digits --workdir=runs/two
#
#   --processes=N   how many (default 2)
#   --devices=N     CPU devices that each pretends to have (default 2)
#
# With JAX_PLATFORMS=cuda in the environment process i gets GPU i instead.
# Process 0 prints as usual, the others with their number in front. SIGTERM and
# Ctrl-C go to all of them: they save and leave. The exit code is that of the
# first process that failed, 0 where none did; the others of a process that
# died follow it within 100 seconds. Plain bash 3.2, as macOS has it.
set -uo pipefail
processes=2
devices=2
while [ $# -gt 0 ]; do
  case "$1" in
  --processes=*) processes="${1#*=}" ;;
  --devices=*) devices="${1#*=}" ;;
  --help | -h)
    sed -n '/^#!/d; /^[^#]/q; s/^# \{0,1\}//p' "$0"
    exit ;;
  *) break ;;
  esac
  shift
done
if [ $# = 0 ] || ! [ "$processes" -ge 1 ] 2>/dev/null; then
  echo "usage: bash launch/multiprocess.sh [--processes=N] [--devices=N]" \
    "COMMAND..., for example python -m simclr_jax.selftest" >&2
  exit 2
fi

# A port that nobody listens on, below those that the system hands out.
while port=$((20000 + RANDOM % 12000)); (: </dev/tcp/127.0.0.1/$port) 2>/dev/null
do :; done
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
if [ "$JAX_PLATFORMS" = cpu ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi

signal=""
trap 'signal=yes' TERM INT HUP
pids=()
# Each in a process group of its own (-m): Ctrl-C and `timeout` signal all of
# this one's, and what is passed on below would be a second signal, at which a
# process leaves without saving.
set -m
for ((i = 0; i < processes; i++)); do
  export JAX_PROCESS_ID=$i
  [ "$JAX_PLATFORMS" = cpu ] || export JAX_LOCAL_DEVICE_IDS=$i
  if [ $i = 0 ]; then
    "$@" </dev/null &
  else
    "$@" </dev/null > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  fi
  pids+=($!)
done
set +m

code=0
while [ ${#pids[@]} -gt 0 ]; do
  sleep 0.1 # `wait -n`, which would end at the first of them, needs bash 5.1
  if [ -n "$signal" ]; then
    signal=""
    kill -TERM "${pids[@]}" 2>/dev/null
  fi
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    wait "$pid"
    status=$?
    [ $code = 0 ] && code=$status
  done
  pids=(${left[@]+"${left[@]}"}) # an empty one is unset to bash 4.3
done
exit "$code"
