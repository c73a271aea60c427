# Sourced by the scripts in this folder that start the trainer under torchrun or Slurm: what they share.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "error: $*" >&2
  exit 1
}

# Takes --help and --dry-run out of the arguments; the others are the trainer's, in ARGUMENTS.
read_arguments() {
  DRY_RUN="${DRY_RUN:-}"
  ARGUMENTS=()
  local argument
  for argument in "$@"; do
    case "$argument" in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      *) ARGUMENTS+=("$argument") ;;
    esac
  done
}

# PYTHON: as given, else that of the active environment, of the checkout's .venv, or of the system.
find_python() {
  local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    if [[ -n "$active" && -x "$active/bin/python" ]]; then
      PYTHON="$active/bin/python"
    elif [[ -x "$ROOT/.venv/bin/python" ]]; then
      PYTHON="$ROOT/.venv/bin/python"
    fi
  fi
  "$PYTHON" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("torch") and f("distmuon")))' ||
    fail "$PYTHON has no torch and distmuon: make $ROOT/.venv with launch/quickstart.sh, or set PYTHON to one that has."
}

# NGPU: as given, else the GPUs that torch sees here; 1 process on the CPU where there are none.
count_devices() {
  if [[ -z "${NGPU:-}" ]]; then
    NGPU="$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')" ||
      fail "$PYTHON could not count the GPUs (see above): set NGPU to the number of processes on a machine."
  fi
  [[ "$NGPU" =~ ^[1-9][0-9]*$ ]] || fail "NGPU is $NGPU, and it is a number of processes: give 1 or more."
}

# TRAINER: the module and its arguments; the same command goes on where a stopped run was.
trainer_command() {
  TRAINER=(-m distmuon.pretrain)
  local argument named="" resumed=""
  for argument in "$@"; do
    case "$argument" in
      --config | --config=*) named=1 ;;
      --resume | --resume=*) resumed=1 ;;
    esac
  done
  if [[ -n "$named" ]]; then
    [[ -z "${CONFIG:-}" ]] || fail "CONFIG is $CONFIG and --config is given too: give one of them."
  elif [[ -n "${CONFIG:-}" ]]; then
    TRAINER+=(--config "$CONFIG")
  else
    # a tiny run that fits any number of processes
    TRAINER+=(--config "$ROOT/configs/debug.yaml" --parallel.dp_shard=-1)
  fi
  [[ -n "$resumed" ]] || TRAINER+=(--resume auto)
  TRAINER+=("$@")
}

# OPTIONS: torchrun's, for logs, restarts and signals.
torchrun_options() {
  # each rank's file has what the rank logs, and a line on the terminal the rank of the job, not of the machine
  export DISTMUON_LOG_ALL="${DISTMUON_LOG_ALL-1}"
  # shellcheck disable=SC2016 # for torchrun
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-"[rank\${rank}]:"}"
  # shellcheck disable=SC2034,SC2054 # for the scripts that source this; the commas are torchrun's
  OPTIONS=(
    --nproc-per-node="$NGPU"
    --max-restarts="${MAX_RESTARTS:-0}"
    # all ranks to files, those of LOG_RANK to the terminal too
    --role=rank --log-dir="${LOG_DIR:-runs/torchrun}" --tee=3 --local-ranks-filter="${LOG_RANK:-0}"
    # SIGUSR1 is Slurm's warning; a step and a checkpoint have to fit into the time-out
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    --shutdown-timeout="${SHUTDOWN_TIMEOUT:-110}"
  )
}

# Becomes the command, so that signals reach it; or prints it for --dry-run.
start() {
  if [[ -n "$DRY_RUN" ]]; then
    show "$@"
    exit 0
  fi
  exec "$@"
}

# A line that a shell reads as the same command.
show() {
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || printf -v word '%q' "$word"
    line+=" $word"
  done
  echo "${line# }"
}
