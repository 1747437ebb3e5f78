#!/usr/bin/env bash
# Make the checkpoint q2_init from q4_fp32 on the CPU, measure it, put it into the store.
set -euo pipefail
cd "$(dirname "$0")/.."
source speedrun/setup.sh L64 q4_fp32

python scripts/convert_q4_to_q2.py --q4-checkpoint "$CHECKPOINT" \
    --output runs/speedrun/q2_init.pt --eval --cache-dir "$CACHE_DIR" --device cpu
python -m qat push runs/speedrun/q2_init.pt --name q2_init
