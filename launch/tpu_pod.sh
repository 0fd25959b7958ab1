#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice, and makes the slice again where it
# is preempted. Run it where it can stay (a small VM, tmux), with gcloud set up.
#
#   bash launch/tpu_pod.sh [--dry-run] --name=NAME --zone=ZONE --type=TYPE
#       [OPTIONS] -- COMMAND...
#
#   bash launch/tpu_pod.sh --name=simclr --zone=us-central2-b --type=v4-32 \
#       --spot -- python -m simclr_jax.pretrain \
#       --config=pretrain.py:imagenet --config.data.data_dir=gs://BUCKET/data \
#       --workdir=gs://BUCKET/runs/imagenet
#
#   --dry-run       prints the gcloud commands of a run without a preemption
#   --version=NAME  the machines' software (default tpu-ubuntu2204-base)
#   --project=NAME  if not gcloud's own
#   --spot          a slice that is cheaper and may be taken away
#   --keep          does not delete the slice at the end
#
# The checkout is copied to each worker, installed in ~/.venv there with the
# extras `tpu` and `gcs`, and COMMAND runs in it on every worker. The machines'
# Python may be too old (3.10 in the default): uv is installed and brings one.
# JAX finds the workers by itself. The workdir must be in a bucket.
#
# After a preemption, a lost connection and any exit code but 0, 1, 2 and 130
# the command is started again, on a new slice if need be, and continues from
# its last checkpoint. Those four end this script and delete the slice; so does
# an installation that fails the first time. An interrupted script (Ctrl-C)
# leaves the slice, which costs money until you delete it.
set -uo pipefail
dry="" name="" zone="" type="" keep=""
version=tpu-ubuntu2204-base
options=() create=()
while [ $# -gt 0 ]; do
  case "$1" in
  --dry-run) dry=yes ;;
  --keep) keep=yes ;;
  --name=*) name="${1#*=}" ;;
  --zone=*) zone="${1#*=}" ;;
  --type=*) type="${1#*=}" ;;
  --version=*) version="${1#*=}" ;;
  --project=*) options+=("$1") ;;
  --spot) create+=(--spot) ;;
  --help | -h)
    sed -n '/^#!/d; /^[^#]/q; s/^# \{0,1\}//p' "$0"
    exit ;;
  --) shift && break ;;
  *)
    echo "unknown option $1; the command comes after --" >&2
    exit 2 ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ $# = 0 ]; then
  echo "usage: bash launch/tpu_pod.sh [--dry-run] --name=NAME --zone=ZONE" \
    "--type=TYPE -- COMMAND... (--help says more)" >&2
  exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
options+=("--zone=$zone")

tpu() { # a command of gcloud, or in a dry run its text
  if [ -n "$dry" ]; then
    printf 'gcloud compute tpus tpu-vm'
    printf ' %q' "$@"
    echo
  else
    gcloud compute tpus tpu-vm "$@"
  fi
}
state() { # READY, PREEMPTED, ...; nothing where there is no slice
  [ -n "$dry" ] || gcloud compute tpus tpu-vm describe "$name" \
    "${options[@]}" --format='value(state)' 2>/dev/null
}
on_all() {
  tpu ssh "$name" "${options[@]}" --worker=all --command="$1"
}
# What each worker runs. uv takes a Python that is there, else it fetches one.
# The variable is for systems whose pip refuses to add to their own packages.
install="PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv && \
python3 -m uv venv -q --clear --seed --python '>=3.11,<3.14' .venv && \
python3 -m uv pip install -q --python .venv/bin/python './simclr_jax[tpu,gcs]'"
ready() { # makes the slice and installs the package, unless that is done
  case "$(state)" in
  READY) [ -n "$prepared" ] && return ;;
  "") ;;
  *) tpu delete "$name" "${options[@]}" --quiet ;;
  esac
  if [ "$(state)" != READY ]; then
    tpu create "$name" "${options[@]}" --accelerator-type="$type" \
      --version="$version" ${create[@]+"${create[@]}"} || return
  fi
  tpu scp --recurse "$source" "$name:" "${options[@]}" \
    --worker=all || return
  on_all "$install"
  code=$?
  if [ $code = 0 ]; then
    prepared=yes installed=yes
    return
  fi
  # It will fail again, unless the connection broke (255) or the slice is gone;
  # where it worked before, the network may be at fault, for a while.
  [ -n "$installed" ] || [ $code = 255 ] || [ "$(state)" != READY ] ||
    hopeless=yes
  return 1
}

# Only what is needed: runs and environments of the checkout stay here.
folder="$(mktemp -d)" || exit 1
trap 'rm -rf "$folder"' EXIT
# gcloud may answer Ctrl-C with a code of its own, after which it would go on.
trap 'echo "interrupted: the slice $name is left as it is" >&2; exit 130' INT
source="$folder/simclr_jax"
mkdir "$source" || exit 1
for part in pyproject.toml README.md LICENSE simclr_jax configs; do
  [ ! -e "$root/$part" ] || cp -R "$root/$part" "$source/" || exit 1
done
command="$(printf '%q ' "$@")"
prepared="" installed="" hopeless=""
failures=0
while :; do
  if ready; then
    on_all "source .venv/bin/activate && $command"
    code=$?
    case $code in
    0 | 1 | 2 | 130)
      # gcloud itself exits with 1 where the connection broke.
      [ $code != 1 ] || [ "$(state)" = READY ] && break ;;
    esac
    echo "exit code $code: starting again" >&2
    if [ "$(state)" != READY ]; then
      prepared="" failures=0 # it was taken away, which says nothing of a start
    fi
    [ $code = 143 ] && failures=0
  elif [ -n "$hopeless" ]; then
    echo "error: the installation failed on $name, see above; it needs pip" \
      "there, and PyPI and GitHub to be reached" >&2
    code=1
    break
  else
    prepared=""
  fi
  failures=$((failures + 1))
  if [ $failures -gt 20 ]; then
    echo "20 starts in a row failed; the slice $name is left as it is" >&2
    exit 1
  fi
  sleep "${RETRY_SECONDS:-60}"
done
[ -n "$keep" ] || tpu delete "$name" "${options[@]}" --quiet
exit "$code"
