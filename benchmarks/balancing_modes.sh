#!/usr/bin/env bash
# One run of each balancing mode, same data and seed: what each does to balance, specialisation and bits per byte.
# Two processes, micro-batches of one domain each. About 7 minutes a run on 2 CPU cores.
#   bash benchmarks/balancing_modes.sh CORPUS OUTPUT
set -euo pipefail
cd "$(dirname "$0")/.."
CORPUS=$1 OUTPUT=$2

run() {
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 \
        --mixed_precision no --dynamo_backend no \
        scripts/train.py hub_configs/tiny/train.yaml --data "$CORPUS" --output_dir "$OUTPUT/$1" \
        --max_train_bytes_per_domain 4000000 --max_validation_bytes_per_domain 150000 \
        --micro_batch_size 4 --global_batch_size 32 --max_steps 400 \
        --config_overrides "$2"
    python scripts/evaluate_model.py --model "$OUTPUT/$1"
    python scripts/analyze.py --run "$OUTPUT/$1"
    python scripts/summarize_run.py "$OUTPUT/$1"
}

run none "{balancing_mode: none}"
run micro_batch "{balancing_mode: micro_batch, router_aux_loss_coef: 0.01}"
run global_batch "{balancing_mode: global_batch, router_aux_loss_coef: 0.01}"
# The rate of the paper, 0.001, needs thousands of steps to move a bias across the scores.
run loss_free "{balancing_mode: loss_free, scoring_func: sigmoid, bias_update_rate: 0.01}"
python benchmarks/tabulate_modes.py "$OUTPUT" "$OUTPUT/balancing_modes.json"
