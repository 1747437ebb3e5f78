#!/usr/bin/env bash
# A new model from text to files, one command a stage:  speedrun/new_model.sh medium|full
#
#   medium  200 M weights, 4 B tokens: 4 hours on one H100
#   full    1.5 B weights, 30 B tokens: 25 hours on eight
#
# Hours are predicted, of 40% of the peak (qat plan --model plan-1.5b --tokens 3e10), none measured.
# The recipe of `make milestone` with other numbers, training and its cache by torchrun. A stage is
# found again when it is made, and training goes on from its last state: cut short, it is run again.
# A variable set before the call takes the place of a size's own:
#
#   DATA=corpus PROCESSES=8 speedrun/new_model.sh medium
#
# On several hosts, the same call on each with TORCHRUN="--nnodes 4 --rdzv-backend c10d
# --rdzv-endpoint HOST:29500" and RUNS in a folder that all of them see. Hours and memory before any
# of it: qat plan --model medium-200m --plan q4a4 --tokens 4e9 --batch-size 512 --seq-len 1024
set -euo pipefail
cd "$(dirname "$0")/.."

SIZE="${1:-}"
case "$SIZE" in
medium) # 8,000 steps of 524,288 tokens: 20 for each weight
    : "${ARCH:=medium-200m}" "${SEQ_LEN:=1024}" "${BATCH:=64}" "${ACCUMULATION:=8}"
    : "${STEPS:=8000}" "${LR:=6e-4}"
    ;;
full) # 28,600 steps of 1,048,576 tokens: 20 for each weight
    : "${ARCH:=plan-1.5b}" "${SEQ_LEN:=2048}" "${BATCH:=64}" "${ACCUMULATION:=8}"
    : "${STEPS:=28600}" "${LR:=3e-4}"
    ;;
*)
    echo "error: size '$SIZE' is none of medium, full; use: DATA=FOLDER speedrun/new_model.sh medium" >&2
    exit 2
    ;;
esac
if [ -z "${DATA:-}" ]; then
    echo "error: DATA is not set; give text: json, jsonl or parquet files, a folder of them, or a hub name" >&2
    exit 2
fi
: "${VOCABULARY:=32000}" "${HELDOUT_RATIO:=0.005}" "${PROCESSES:=1}" "${TORCHRUN:=}" "${DEVICE:=auto}" "${RUNS:=runs/$SIZE}"
: "${WARMUP_RATIO:=0.015}" "${SAVE_STEPS:=500}" "${KEEP_STATES:=20}"
: "${CACHE_SEQUENCES:=65536}" "${CACHE_SEQ_LEN:=256}" "${STUDENT_STEPS:=2000}" "${STUDENT_BATCH:=64}"
: "${FORMATS:=q4_0 iq3_s tq2_0}"

# The Python that speedrun/setup.sh finds, where qat is no command of this shell.
PYTHON="${QAT_PYTHON:-$(command -v qat >/dev/null 2>&1 && command -v python || echo .venv/bin/python)}"
qat() { "$PYTHON" -m qat "$@"; }
# shellcheck disable=SC2086  # flags of torchrun, as they were typed
together() { "$PYTHON" -m torch.distributed.run --nproc-per-node "$PROCESSES" $TORCHRUN -m qat "$@"; }

# 1. A tokenizer, which is frozen from here on: shards hold its hash.
qat train-tokenizer --data "$DATA" --kind sentencepiece-bpe --vocab-size "$VOCABULARY" \
    --output "$RUNS/tokenizer"

# 2. Shards with a manifest, and documents held out.
qat tokenize --data "$DATA" --tokenizer "$RUNS/tokenizer" --heldout-ratio "$HELDOUT_RATIO" \
    --output-dir "$RUNS/shards"

# 3. The model: the only stage that takes days.
together pretrain --arch "$ARCH" --vocab-size "$VOCABULARY" --data-dir "$RUNS/shards" \
    --seq-len "$SEQ_LEN" --batch-size "$BATCH" --accumulation-steps "$ACCUMULATION" \
    --max-steps "$STEPS" --optim.lr "$LR" --optim.warmup-ratio "$WARMUP_RATIO" \
    --gradient-checkpointing --intervals.save-steps "$SAVE_STEPS" \
    --intervals.keep-states "$KEEP_STATES" --output-dir "$RUNS/pretrain" --device "$DEVICE"
MODEL="$RUNS/pretrain/final"

# 4. Its hidden states on the text, from which its logits are formed again.
together build-cache --teacher "$MODEL" --data "$DATA" --content hidden --seq-len "$CACHE_SEQ_LEN" \
    --num-sequences "$CACHE_SEQUENCES" --output-dir "$RUNS/caches" --name text --device "$DEVICE"

# 5. Students, distilled; a GGUF of each, and of the model.
for FORMAT in $FORMATS; do
    together init-student --model "$MODEL" --plan "gguf:$FORMAT" --cache-dir "$RUNS/caches/text" \
        --output "$RUNS/students/$FORMAT" --device "$DEVICE"
    together train --checkpoint "$RUNS/students/$FORMAT" --cache-dir "$RUNS/caches/text" \
        --max-steps "$STUDENT_STEPS" --batch-size "$STUDENT_BATCH" \
        --output-dir "$RUNS/trained/$FORMAT" --device "$DEVICE"
    qat evaluate --checkpoint "$RUNS/trained/$FORMAT" --cache-dir "$RUNS/caches/text" \
        --device "$DEVICE"
    [ -e "$RUNS/$FORMAT.gguf" ] ||
        qat export --checkpoint "$RUNS/trained/$FORMAT" --to gguf --output "$RUNS/$FORMAT.gguf"
done
[ -e "$RUNS/f16.gguf" ] ||
    qat export --checkpoint "$MODEL" --to gguf --dtype fp16 --output "$RUNS/f16.gguf"
