#!/usr/bin/env bash
# Pretrain on several machines under torchrun; the same command on each of them; see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: HEAD=ADDRESS NNODES=N launch/torchrun_multi_node.sh [--dry-run] [--section.key VALUE ...]

Pretrains on N machines: start the same command on each of them, in any order, within RDZV_TIMEOUT seconds.
The arguments are those of `python -m distmuon.pretrain`; --resume auto is given unless you give --resume
yourself. log.dir has to be on a disk that all machines share.

  HEAD=10.0.0.1 NNODES=2 CONFIG=configs/llama_8b.yaml launch/torchrun_multi_node.sh --data.source DIR

--dry-run prints the command of this machine and starts nothing.

environment:
  HEAD, MASTER_ADDR  name or address of the machine where all meet
  PORT, MASTER_PORT  free port there (default: 29500)
  NNODES             number of machines; MIN:MAX lets the run go on with fewer
  NODE_RANK          number of this machine, from 0 (HEAD) on (default: Slurm's; else HEAD is found by its address)
  JOB                name of the job, the same on all machines (default: Slurm's job id, or distmuon)
  RDZV               c10d, or static, which needs NODE_RANK (default: c10d)
  RDZV_TIMEOUT       seconds in which all have to come (default: 600)
  RDZV_CONF          further settings of torchrun's --rdzv-conf, such as last_call_timeout=3
  LOCAL_ADDR         address of this machine (default: the one from which HEAD is reached)
  NGPU, CONFIG, LOG_RANK, LOG_DIR, MAX_RESTARTS, SHUTDOWN_TIMEOUT, PYTHON: as in torchrun_single_node.sh
TEXT
}

# shellcheck source=launch/_torchrun.sh
source "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
read_arguments "$@"

HEAD="${HEAD:-${MASTER_ADDR:-}}"
PORT="${PORT:-${MASTER_PORT:-29500}}"
JOB="${JOB:-${SLURM_JOB_ID:-distmuon}}"
NNODES="${NNODES:-${SLURM_NNODES:-}}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
RDZV="${RDZV:-c10d}"
[[ -n "$HEAD" ]] || fail "HEAD is not set: give the name or address of one of the machines, the same on all."
[[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
  fail "NNODES is '$NNODES', and it is the number of machines: give one such as 2, or a range such as 1:4."
[[ "$NODE_RANK" =~ ^[0-9]*$ ]] || fail "NODE_RANK is $NODE_RANK, and it is a number: give 0 on HEAD, then 1, 2, ..."

find_python
count_devices
trainer_command ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
torchrun_options

case "$RDZV" in
  c10d)
    network="$("$PYTHON" "$ROOT/launch/_network.py" "$HEAD" "$PORT")"
    read -r is_host address interface <<<"$network"
    # torchrun compares host names, and where none fits all machines wait for another
    [[ -z "$NODE_RANK" ]] || is_host=$((NODE_RANK == 0))
    conf="is_host=$is_host,join_timeout=${RDZV_TIMEOUT:-600},read_timeout=${RDZV_TIMEOUT:-600}"
    MEET=(--rdzv-backend=c10d --rdzv-id="$JOB" --rdzv-endpoint="$HEAD:$PORT" --rdzv-conf="$conf${RDZV_CONF:+,$RDZV_CONF}")
    LOCAL_ADDR="${LOCAL_ADDR:-${address#-}}"
    [[ -z "$LOCAL_ADDR" ]] || MEET+=(--local-addr="$LOCAL_ADDR")
    ;;
  static)
    [[ -n "$NODE_RANK" ]] || fail "NODE_RANK is not set, and RDZV=static needs it: give 0 on HEAD, then 1, 2, ..."
    [[ "$NNODES" != *:* ]] || fail "NNODES is $NNODES, and RDZV=static takes one number: give it, or RDZV=c10d."
    interface="$("$PYTHON" "$ROOT/launch/_network.py" "$HEAD" "$PORT")"
    interface="${interface##* }"
    MEET=(--rdzv-backend=static --node-rank="$NODE_RANK" --master-addr="$HEAD" --master-port="$PORT" --rdzv-id="$JOB")
    ;;
  *) fail "RDZV is $RDZV, and there is c10d and static: give one of them." ;;
esac

# gloo takes the address of the host name, which on many machines is 127.0.0.1
if [[ -z "${GLOO_SOCKET_IFNAME:-}" && "$interface" != - ]]; then
  WITH=(env GLOO_SOCKET_IFNAME="$interface")
fi
start ${WITH[@]+"${WITH[@]}"} "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" "${MEET[@]}" "${OPTIONS[@]}" "${TRAINER[@]}"
