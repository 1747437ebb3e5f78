"""Processes that work together: forked ones, which start at once, and those of torchrun itself."""

import contextlib
import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
ADDRESS = "127.0.0.1"
PORT_BYTES = 2
SECONDS = 120  # after which forked processes end, where one waits for ever


def forked(count, work):
    """Return what `work()` gives in each of so many processes, by rank.

    They are copies of this one, in the environment of torchrun's; what fails in one fails here.
    """
    gate, opener = os.pipe()
    children = [fork_one(rank, count, gate, opener, work) for rank in range(count)]
    # Not before: its thread looks up who connects, and no process may be copied amidst that, as
    # the lock of glibc's resolver would be held in the copy for ever.
    store = dist.TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
    os.write(opener, count * store.port.to_bytes(PORT_BYTES, "big"))
    os.close(opener)
    os.close(gate)
    answers = []
    for _, reader in children:
        with os.fdopen(reader, "rb") as file:
            answers.append(file.read())
    for child, _ in children:
        os.waitpid(child, 0)
    values = [pickle.loads(answer) if answer else "ended without a word" for answer in answers]
    failed = [value for value in values if isinstance(value, str)]
    assert not failed, "\n".join(failed)  # one that fails leaves others waiting, without a word
    return [value for (value,) in values]


def fork_one(rank, count, gate, opener, work):
    """Start one process, which waits for a port; return its id and where what it gives is read."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)  # at once: a later process that had it would keep the pipe open
        return child, reader
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(SECONDS - 5, file=sys.__stderr__)  # says where one waits
    os.close(opener)
    port = int.from_bytes(os.read(gate, PORT_BYTES), "big")
    os.environ.update(environment_of(rank, count, port))
    torch.set_num_threads(torch.get_num_threads())  # the pool anew; threads at once would race to
    try:
        answer = (work(),)
    except BaseException:  # noqa: BLE001 a copy of the test run must not go on as one
        answer = traceback.format_exc()
    with contextlib.suppress(BaseException), os.fdopen(writer, "wb") as file:
        file.write(pickle.dumps(answer))
    os._exit(0)


def environment_of(rank, count, port):
    """Return what torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def torchrun(count, *words, **environment):
    """Start so many processes of `python -m qat` by torchrun; return it, its output as pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESS}:0"]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *rendezvous, "--local-addr", ADDRESS, "-m", "qat", *map(str, words)],
        env={**os.environ, **quiet, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
