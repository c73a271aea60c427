# Sourced by the scripts for sbatch: where the processes meet, and when a job is put back into the queue.
# shellcheck shell=bash

# HEAD, PORT and JOB of this job; each may be given.
slurm_names() {
  if [[ -z "${HEAD:-}" ]]; then
    [[ -n "${SLURM_JOB_NODELIST:-}" ]] ||
      fail "this is no Slurm job: submit it with sbatch (a dry run outside of a job needs HEAD, NNODES, NTASKS and JOB)."
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    HEAD="${hosts%%$'\n'*}"
  fi
  JOB="${JOB:-${SLURM_JOB_ID:?}}"
  NNODES="${NNODES:-${SLURM_NNODES:?}}"
  # below the ports that Linux gives to clients, and another one for each job
  PORT="${PORT:-$((15000 + ${JOB//[^0-9]/} % 15000))}"
}

# Runs srun with its arguments, and puts the job back into the queue if the run asks for another start.
run_and_requeue() {
  if [[ -n "$DRY_RUN" ]]; then
    show "$@"
    exit 0
  fi
  local code=0 starts="${SLURM_RESTART_COUNT:-0}" note checkpoint note_before checkpoint_before began
  began="$(date +%s)"
  read -r note_before checkpoint_before <<<"$(run_state)"
  "$@" || code=$?
  ((code != 0)) || exit 0
  read -r note checkpoint <<<"$(run_state --tell "$began")"
  if [[ "$note" != "$note_before" && "$note" != - ]] || ((code == 75)); then
    requeue "a signal came, and the state is saved as $checkpoint"
  fi
  # another rank was lost, or one was killed: 128 + signal, but not Ctrl-C
  if ((code == 69 || (code > 128 && code != 130))); then
    if [[ "$checkpoint" != "$checkpoint_before" ]] || ((starts < ${MAX_REQUEUES:-3})); then
      requeue "exit code $code; the last checkpoint is $checkpoint"
    fi
    echo "exit code $code: this start has written no checkpoint, and MAX_REQUEUES allows no more than $starts" >&2
  fi
  exit "$code"
}

# --tell TIME says on stderr, too, what ended the start of that time.
run_state() {
  "$PYTHON" "$ROOT/launch/_state.py" "$@" "${TRAINER[@]:2}"
}

requeue() {
  echo "job $SLURM_JOB_ID goes back into the queue: $1"
  exec scontrol requeue "$SLURM_JOB_ID"
}
