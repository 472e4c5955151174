#!/usr/bin/env bash
# The gradient under each load estimate against the whole batch's, at three layouts, micro-batches mixed and of one
# domain each. About 45 minutes on one CPU core, half an hour on two.
#   bash benchmarks/load_estimates.sh CORPUS OUTPUT
set -euo pipefail
cd "$(dirname "$0")/.."
CORPUS=$1 OUTPUT=$2

for domains in mixed single; do
    python benchmarks/load_estimates.py --data "$CORPUS" --output "$OUTPUT/8_$domains.json" \
        --layouts 1x8 2x4 --micro_batch_domains $domains
    # Shorter blocks: four times the micro-batches at twice the tokens.
    python benchmarks/load_estimates.py --data "$CORPUS" --output "$OUTPUT/32_$domains.json" \
        --layouts 2x16 --micro_batch_domains $domains --block_size 128
done
python benchmarks/tabulate_estimates.py "$OUTPUT"/{8,32}_{mixed,single}.json "$OUTPUT/load_estimates.json"
