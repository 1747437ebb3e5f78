#!/usr/bin/env bash
# A command of qat on all hosts of a TPU slice, one process a host, which drives that host's chips:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all --command "cd $PWD && speedrun/pod.sh train \
#       --checkpoint $CHECKPOINT --cache-dir $CACHE_DIR --output-dir runs/sr-002 --batch-size 256"
#
# Started at once on every host, in a folder that all see. Which host this is says the slice's metadata, or TPU_WORKER_ID and
# TPU_WORKER_HOSTNAMES with TPU_SKIP_MDS_QUERY=1. PORT: where the hosts meet, of the first one.
set -euo pipefail

# The Python that speedrun/setup.sh finds, where qat is no command of this shell.
PYTHON="${QAT_PYTHON:-$(command -v qat >/dev/null 2>&1 && command -v python || echo .venv/bin/python)}"
if ! PLACE=$("$PYTHON" -c '
from torch_xla._internal.tpu import get_worker_ips, worker_id
hosts = get_worker_ips()
print(worker_id() if len(hosts) > 1 else 0, len(hosts), hosts[0])
'); then
    echo "error: $PYTHON does not tell which host of a TPU slice this is (why is told above); use: pip install -e '.[tpu-xla]'" >&2
    exit 2
fi
read -r NODE NODES FIRST <<<"$PLACE"

# Each host's chips are a slice of their own, within which the compiler adds the communication; hosts add up gradients over
# the network.
export PJRT_DEVICE="${PJRT_DEVICE:-TPU}" TPU_PROCESS_BOUNDS=1,1,1 TPU_HOST_BOUNDS=1,1,1
export TPU_WORKER_ID=0 CLOUD_TPU_TASK_ID=0 TPU_WORKER_HOSTNAMES=localhost
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node 1 \
    --master-addr "$FIRST" --master-port "${PORT:-29500}" -m qat "$@"
