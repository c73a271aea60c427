#!/usr/bin/env bash
# Install into .venv and train a tiny model; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/quickstart.sh [--section.key VALUE ...]

Makes .venv in the checkout where it is missing, installs DistMuon into it, and trains a tiny model on
the text of Python's own library: a few minutes on two CPU cores, no downloads but the packages.
The result is in runs/debug. A second start installs nothing and makes runs/debug-2.

  launch/quickstart.sh --optim.name adamw    the same with AdamW
  launch/quickstart.sh --resume auto         go on where Ctrl-C stopped it

environment:
  PYTHON   interpreter for .venv, 3.10 or later (default: python3)
  CONFIG   config file (default: configs/debug.yaml)
TEXT
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
esac

# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
CONFIG="${CONFIG:-$ROOT/configs/debug.yaml}"
# setup_venv changes to the checkout, and CONFIG is relative to where the caller is
[[ "$CONFIG" == /* ]] || CONFIG="$PWD/$CONFIG"
setup_venv pretrain
# idle threads sleep instead of spin: on busy cores spinning was seen to make steps 15 times longer
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec python -m distmuon.pretrain --config "$CONFIG" "$@"
