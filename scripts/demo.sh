#!/usr/bin/env bash
# From an empty folder to a trained, measured and pictured Mixture-of-Experts model. `make demo` calls it.
#   RUN=runs/other PROCESSES=2 STEPS=350 bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${RUN:-runs/demo}
PROCESSES=${PROCESSES:-2}
STEPS=${STEPS:-350}
if [ -e "$RUN" ]; then
    echo "error: $RUN already holds a run; remove it, or choose another folder: RUN=runs/other make demo" >&2
    exit 1
fi

echo "== 1/4 text of several domains, from what is installed here"
python scripts/prepare_data.py --output corpus/embedded

echo "== 2/4 training in $PROCESSES processes, the load counted over the global batch"
# On CPUs `accelerate launch --cpu` starts a single process without a word; this starts what was asked for.
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes "$PROCESSES" --num_machines 1 \
    --mixed_precision no --dynamo_backend no \
    scripts/train.py hub_configs/tiny/train.yaml --output_dir "$RUN" --max_steps "$STEPS"

echo "== 3/4 evaluation by domain"
python scripts/evaluate_model.py --model "$RUN"

echo "== 4/4 where the experts went"
python scripts/analyze.py --run "$RUN"

python scripts/summarize_run.py "$RUN"
