#!/usr/bin/env bash
# A command of qat on all nodes of a SLURM job, one torchrun a node, a process a GPU:
#
#   sbatch --nodes 4 --gpus-per-node 8 speedrun/slurm.sh train --checkpoint runs/q2_init --cache-dir caches/NAME \
#       --output-dir runs/q2 --batch-size 256
#
# Submitted in a checkout whose folders all nodes see. A job that is preempted or fails with a node goes on from its last
# state when it is queued again. PROCESSES: of a node, where not one a GPU. PORT: where the nodes meet, of the first one.
#SBATCH --job-name=qat
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo "error: no SLURM job; use: sbatch --nodes 4 --gpus-per-node 8 speedrun/slurm.sh train ..." >&2
    exit 2
fi
# The Python that speedrun/setup.sh finds, where qat is no command of this shell.
PYTHON="${QAT_PYTHON:-$(command -v qat >/dev/null 2>&1 && command -v python || echo .venv/bin/python)}"
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --ntasks-per-node=1 "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST:${PORT:-29500}" -m qat "$@"
