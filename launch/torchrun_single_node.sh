#!/usr/bin/env bash
# Pretrain on all GPUs of this machine under torchrun; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/torchrun_single_node.sh [--dry-run] [--section.key VALUE ...]

Pretrains on all GPUs of this machine, or in one process on the CPU where there are none. The arguments are
those of `python -m distmuon.pretrain`. The same command goes on where a stopped run was: --resume auto is
given unless you give --resume yourself (--resume null: a new run).

  CONFIG=configs/llama_1b.yaml launch/torchrun_single_node.sh --data.source DIR
  NGPU=2 launch/torchrun_single_node.sh      two processes, on two CPU cores too (gloo)

--dry-run prints the command and starts nothing.

environment:
  NGPU              processes on this machine (default: the number of GPUs, or 1)
  CONFIG            config file (default: configs/debug.yaml, sharded over all processes)
  LOG_RANK          local ranks that print to the terminal, such as 0,1 (default: 0)
  LOG_DIR           folder of files with the output of each rank (default: runs/torchrun)
  MAX_RESTARTS      how often ranks that fail are started again (default: 0)
  SHUTDOWN_TIMEOUT  seconds for a step and a checkpoint after a signal (default: 110)
  PYTHON            interpreter (default: the active environment's, .venv of the checkout, or python3)
TEXT
}

# shellcheck source=launch/_torchrun.sh
source "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
read_arguments "$@"
find_python
count_devices
trainer_command ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
torchrun_options
start "$PYTHON" -m torch.distributed.run --standalone "${OPTIONS[@]}" "${TRAINER[@]}"
