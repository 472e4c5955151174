#!/usr/bin/env bash
# Trains under torchrun, restarted from its newest checkpoint when a process dies, with a status a scheduler can read.
#
#   scripts/launch.sh RUN [settings.yaml] [--flags of train.py]
#
# Exit status: 0 the run is finished; 75 it was stopped (SIGTERM, Ctrl-C, --max_hours) and the same command goes on with
# it; 1 an error, which RUN/status.json names. Several machines run the same command, with the first one's address:
#   NNODES=4 RENDEZVOUS=first-machine:29400 scripts/launch.sh RUN settings.yaml
# From the environment: NNODES (1; 2:4 lets machines come and go, as long as the global batch can be dealt out),
# PROCESSES (of one machine: auto), RENDEZVOUS, RENDEZVOUS_ID, MAX_RESTARTS (3).
set -uo pipefail
if [ $# -lt 1 ] || [[ "$1" == -* ]]; then
    echo "usage: $(basename "$0") RUN [settings.yaml] [--flags of train.py]" >&2
    exit 2
fi
RUN=$1
shift
ROOT=$(cd "$(dirname "$0")/.." && pwd)

if [ -n "${RENDEZVOUS:-}" ]; then
    MEETING=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RENDEZVOUS_ID:-equipoise}")
else
    MEETING=(--standalone)
fi
# How long they have for it, in seconds, before they are killed (torch 2.11 knows 30 only).
PATIENCE=()
if python -c 'import sys, torch.distributed.run as run; sys.exit("shutdown-timeout" not in run.get_args_parser().format_help())' \
    2>/dev/null; then
    PATIENCE=(--shutdown-timeout "${SHUTDOWN_TIMEOUT:-540}")
fi
# Else a restarted process may read the addresses of those that died (seen with torch 2.13 and gloo).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
state() {
    python -c 'import json, sys; print(*map(json.load(open(sys.argv[1])).get, ("state", "time", "step")))' \
        "$RUN/status.json" 2>/dev/null
}
BEFORE=$(state)
# A signal is handed on to the processes, which save: SIGUSR1 too, which Slurm sends to all of them.
python -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "${PROCESSES:-auto}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --max-restarts "${MAX_RESTARTS:-3}" "${MEETING[@]}" ${PATIENCE[@]+"${PATIENCE[@]}"} \
    "$ROOT/scripts/train.py" "$@" --output_dir "$RUN" --resume &
LAUNCHER=$!
trap 'kill -TERM "$LAUNCHER" 2>/dev/null' TERM USR1
trap 'kill -INT "$LAUNCHER" 2>/dev/null' INT
while kill -0 "$LAUNCHER" 2>/dev/null; do
    wait "$LAUNCHER"
    STATUS=$?
done

# A signal makes torchrun itself end with an error, also when the run was saved: what the run says counts, if it has
# said it since the beginning.
AFTER=$(state)
if [ "$AFTER" != "$BEFORE" ]; then
    case $AFTER in
        finished*) exit 0 ;;
        stopped*) exit 75 ;;
    esac
fi
[ "$STATUS" -ne 0 ] || STATUS=1
exit "$STATUS"
