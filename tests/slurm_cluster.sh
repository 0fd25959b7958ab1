#!/usr/bin/env bash
# A Slurm cluster of one node with four slots on this machine, for the tests:
#
#   bash tests/slurm_cluster.sh start DIR    daemons with all their files in DIR
#   SLURM_CONF=DIR/slurm.conf sbatch ...
#   bash tests/slurm_cluster.sh stop DIR     ends the jobs and the daemons
#
# Needs root and Debian's slurm-wlm and munge; no systemd, no cgroups.
set -euo pipefail
action="$1"
dir="$(realpath "$2")"
export PATH="$PATH:/usr/sbin" SLURM_CONF="$dir/slurm.conf"

stop() {
  scancel --quiet --full --signal=KILL --user=root 2>/dev/null || true
  for name in slurmd slurmctld munged; do
    pid="$(cat "$dir/$name.pid" 2>/dev/null)" || continue
    kill "$pid" 2>/dev/null || continue
    for _ in {1..100}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
  done
}

if [ "$action" = stop ]; then
  stop
  exit
fi

free_port() { # that nobody listens on, below those that the system hands out
  local port
  while port=$((20000 + RANDOM % 12000)); (: </dev/tcp/127.0.0.1/$port) \
    2>/dev/null; do :; done
  echo $port
}
mkdir -p "$dir"/{state,spool}
host="$(hostname -s)"
# More slots than cores: JAX's processes on a small machine.
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
# A plugin must load, though nothing uses it; this one does so everywhere.
echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
(umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")

trap 'stop' ERR
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
  --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
  --seed-file="$dir/munged.seed"
slurmctld -c
slurmd -c
for _ in {1..300}; do
  [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && exit
  sleep 0.1
done
tail -n 20 "$dir"/*.log >&2
false
