#!/usr/bin/env bash
# Pretrains, evaluates, fine-tunes and distills a small network on real images
# (scikit-learn's handwritten digits), and prints what it gained. The first
# start also makes .venv in the checkout and installs the package there; a
# second one continues or reprints the table from runs/digits.
#
#   bash launch/local.sh [--fresh] [--workdir=DIR]
#
#   --fresh         trains anew
#   --workdir=DIR   keeps the runs there in place of runs/digits
set -euo pipefail
case " $* " in *" --help "* | *" -h "*)
  sed -n '/^#!/d; /^[^#]/q; s/^# \{0,1\}//p' "$0"
  exit ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Unquoted: one word or none.
# shellcheck disable=SC2046
setup tensorboard $(accelerator_extra)
exec "$python" "$root/launch/digits_chain.py" --workdir="$root/runs/digits" "$@"
