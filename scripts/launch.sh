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
# Else a restarted process may read the addresses of those that died (seen with torch 2.13 and gloo).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun hands a signal on to the processes and waits for them to save: pass on what a scheduler sends to this script.
python -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "${PROCESSES:-auto}" \
    --max-restarts "${MAX_RESTARTS:-3}" "${MEETING[@]}" \
    "$ROOT/scripts/train.py" "$@" --output_dir "$RUN" --resume &
LAUNCHER=$!
trap 'kill -TERM "$LAUNCHER" 2>/dev/null' TERM USR1
trap 'kill -INT "$LAUNCHER" 2>/dev/null' INT
while kill -0 "$LAUNCHER" 2>/dev/null; do
    wait "$LAUNCHER"
    STATUS=$?
done

# A signal makes torchrun itself end with an error, also when the run was saved: what the run says counts.
case $(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$RUN/status.json" 2>/dev/null) in
    finished) exit 0 ;;
    stopped) exit 75 ;;
esac
[ "$STATUS" -ne 0 ] || STATUS=1
exit "$STATUS"
