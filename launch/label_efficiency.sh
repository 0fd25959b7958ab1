#!/usr/bin/env bash
# What pretraining, size and distillation are worth when labels are few: a grid
# of networks x label fractions x seeds, its csv, table, figure and report.html.
#
#   bash launch/label_efficiency.sh [digits|cifar10] [OPTIONS]
#
#   bash launch/label_efficiency.sh digits --seeds=0 --sizes=18x0.125,18x0.25
#   bash launch/label_efficiency.sh digits --claims
#
# Runs are kept in runs/label_efficiency_RECIPE. The same command again, also
# while the first one runs, or as an array of Slurm, takes what is not done yet:
#
#   sbatch --array=0-7 --gres=gpu:1 launch/label_efficiency.sh cifar10
#
# OPTIONS are those of python -m simclr_jax.sweep:
#
#   --workdir=DIR            keeps the runs there
#   --sizes=18x0.25,50x1     depth x width, from small to big
#   --labels=1,10,100        percentages of the labels
#   --seeds=0,1,2
#   --claims                 the table of SimCLRv2's claims instead of the grid
#   --methods=scratch,linear,finetune,self_distill,distill
#   --task=I/N               part I of N, where DIR has no file locks
#   --pretrain.FIELD=VALUE   sets a field of a stage's runs (also --finetune.,
#                            --distill.; --config. for all of them)
set -euo pipefail
case " $* " in *" --help "* | *" -h "*)
  sed -n '/^#!/d; /^[^#]/q; s/^# \{0,1\}//p' "$0"
  exit ;;
esac
# Slurm runs a copy of this script, from where it was submitted.
here="$(dirname "${BASH_SOURCE[0]}")"
[ -z "${SLURM_JOB_ID:-}" ] || [ -e "$here/setup.sh" ] ||
  here="${SLURM_SUBMIT_DIR:-.}/launch"
if [ ! -e "$here/setup.sh" ]; then
  echo "error: $here/setup.sh is not there; call sbatch in the folder of the" \
    "checkout" >&2
  exit 2
fi
source "$here/setup.sh"

recipe=digits
case "${1:-}" in
--*) ;;
?*) recipe="$1" && shift ;;
esac
# Unquoted: one word or none.
# shellcheck disable=SC2046
setup $(accelerator_extra)
exec "$python" -m simclr_jax.sweep --recipe="$recipe" \
  --workdir="$root/runs/label_efficiency_$recipe" "$@"
