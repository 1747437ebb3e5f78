"""Token shards larger than the memory that reading them may take, DATA_MB megabytes of them.

`DATA_MB=10000 pytest -m recipe -s tests/recipes/test_large_data.py` prints what it measures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qat.data.token_shards import TokenIdentity, TokenManifest, write_manifest, write_shard

pytestmark = pytest.mark.recipe
ROOT = Path(__file__).parent.parent.parent
DATA_MB = int(os.environ.get("DATA_MB", "64"))
SHARD_MB, DOCUMENT_TOKENS, VOCAB_SIZE = 8, 1 << 12, 1 << 15
MAPPED_MB = 16
MOST_SECONDS = 5  # to the first batch
READ = """
import json, sys, time
from itertools import islice
from qat.data import token_dataset
from qat.data.token_dataset import TokenBlocks, TokenDataset, shuffled_indices

NUM_BATCHES = 1000

def peak_mb():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

def seconds_to_first():
    start = time.perf_counter()
    blocks = TokenBlocks(TokenDataset.open(sys.argv[1]), "train", 1024)
    blocks.batch(next(shuffled_indices(len(blocks), 8, [0])))
    return time.perf_counter() - start

token_dataset.MAPPED_BYTES = int(sys.argv[2]) << 20
before = peak_mb()
first, again = seconds_to_first(), seconds_to_first()
blocks = TokenBlocks(TokenDataset.open(sys.argv[1]), "train", 1024)
start = time.perf_counter()
for indices in islice(shuffled_indices(len(blocks), 8, [0]), NUM_BATCHES):
    blocks.batch(indices)
print(json.dumps({
    "first_seconds": first, "again_seconds": again, "grown_mb": peak_mb() - before,
    "batches_per_second": NUM_BATCHES / (time.perf_counter() - start),
}))
"""


def test_memory_is_bounded_and_a_second_start_is_quick(tmp_path):
    """Blocks in random order take what is mapped at once; verified shards are not hashed."""
    generator, shards = np.random.default_rng(0), []
    for place in range(DATA_MB // SHARD_MB):
        size = ((SHARD_MB << 19) // DOCUMENT_TOKENS, DOCUMENT_TOKENS)  # of two bytes a token
        documents = list(generator.integers(VOCAB_SIZE, size=size))
        path = tmp_path / "tokens" / f"tokens_{place:05d}"
        path.parent.mkdir(exist_ok=True)
        shards.append(
            write_shard(
                path, documents[:-1], documents[-1:], vocab_size=VOCAB_SIZE, source=0, num_records=1
            )
        )
    identity = TokenIdentity(
        tokenizer_sha256="t",
        data=("a",),
        text_column="text",
        heldout_ratio=0.5,
        shard_tokens=1,
        bos_id=None,
        separator_id=2,
    )
    manifest = TokenManifest(
        identity=identity, data_name="x", vocab_size=VOCAB_SIZE, shards=tuple(shards)
    )
    write_manifest(tmp_path / "tokens", manifest)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "tokens"), str(MAPPED_MB)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    sys.stderr.write(f"{DATA_MB} MB: {found}\n")
    assert found["grown_mb"] < MAPPED_MB + SHARD_MB + 24
    assert found["again_seconds"] < found["first_seconds"] < MOST_SECONDS
