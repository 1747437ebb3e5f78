import json
import re

import pytest

from qat.benchmark.probes import Probes, run_fresh

pytestmark = pytest.mark.recipe

MEASURED = {
    "status": "OK",
    "warm_up_seconds": 2.5,
    "seconds": [0.5, 1.0],
    "step_seconds": 0.75,
    "step_bytes": 5,
    "peak_bytes": 6,
    "loss": None,
    "flops_per_token": 7,
}
OK = f"print('noise'); print({json.dumps(MEASURED)!r})"
FAILURES = {
    "OOM": [
        "import sys; sys.exit('RuntimeError: [enforce fail] not enough memory: you tried 9')",
        "import sys; sys.exit('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm')",
        "import sys; sys.exit('E1000: CompileTimeHbmOom: used 21.95G of 15.48G')",
        "raise MemoryError('out of memory')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import time; from qat.runtime.device import Device; "
        "Device.detect('cpu').limit_memory(1); time.sleep(60)",
    ],
    "error": [
        "import sys; sys.exit('error: --model-id x is no folder')",
        "import sys; sys.exit('RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem')",
        "raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')",
        "import os; os.abort()",
        "import sys; sys.exit(3)",
    ],
}


def ask(code, seconds=100, **more):
    return run_fresh(["-c", code], seconds, **more)


@pytest.mark.parametrize("code", FAILURES["OOM"])
def test_too_little_memory_is_no_error(code):
    """Whoever says so: the allocator, the compiler, the system by a kill, or our own watcher."""
    result = ask(code)
    assert result["status"] == "OOM"
    assert result["why"]


@pytest.mark.parametrize("code", FAILURES["error"])
def test_any_other_failure_is_an_error_with_its_text(code):
    """A shape that does not fit is not cured by a smaller batch; nor is a kernel's own memory."""
    message = code.split("'")[1].removeprefix("error: ") if "'" in code else "exit code"
    with pytest.raises(ValueError, match=re.escape(message)):
        ask(code)


def test_a_probe_that_does_not_end_is_an_error():
    """A compilation that hangs is told apart from memory."""
    with pytest.raises(ValueError, match="no end in 0.5 s; raise --probe-seconds"):
        ask("import time; time.sleep(60)", seconds=0.5)


def test_what_a_killed_process_wrote_is_removed(tmp_path):
    """A state of gigabytes does not stay behind."""
    code = (
        "import os, signal, tempfile; open(tempfile.mkdtemp() + '/state', 'w').write('x');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ask(code, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def probes(tmp_path):
    """Probes whose processes leave a mark each."""

    def arguments(batch, checkpointing):
        return ["-c", f"open({str(tmp_path / 'calls')!r}, 'a').write('{batch} '); {OK}"]

    def make(**identity):
        return Probes(
            folder=tmp_path / "out",
            identity={"dtype": "bf16"} | identity,
            arguments=arguments,
            max_seconds=60,
        )

    return make


def test_a_batch_is_measured_once(probes, tmp_path):
    """The same of another device, version or length is another."""
    first = probes().measure("baseline", 8)
    assert first == {"configuration": "baseline", "batch": 8, **MEASURED}
    assert probes().measure("baseline", 8) == first
    probes(seq_len=128).measure("baseline", 8)
    probes().measure("checkpointing", 8)
    assert (tmp_path / "calls").read_text() == "8 8 8 "
    record = json.loads(next((tmp_path / "out" / "probes").glob("checkpointing_8_*")).read_text())
    assert record["identity"]["dtype"] == "bf16"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["probes"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "OK?"}, "status: Invalid enum value 'OK?'"),
        ({"status": "OOM"}, "why is missing"),
        ({"step_seconds": 0}, "step_seconds: Expected"),
        ({"seconds": []}, "seconds: Expected"),
        ({"step_seconds": 2}, "step_seconds 2.0 is outside"),
        ({"peak_bytes": "6"}, "peak_bytes: Expected"),
        ({"why": "no room"}, "why is no field"),
        ({"batch": 16}, "is of another measurement"),
        ({"configuration": "other"}, "is of another measurement"),
    ],
)
def test_a_damaged_result_is_refused(probes, tmp_path, change, said):
    """Before any number of it is used."""
    probes().measure("baseline", 8)
    (path,) = (tmp_path / "out" / "probes").iterdir()
    record = json.loads(path.read_text())
    record["row"] |= change
    path.write_text(json.dumps(record))
    told = rf"{re.escape(path.name)}.*{re.escape(said)}.*; remove it"
    with pytest.raises(ValueError, match=told):
        probes().measure("baseline", 8)


def test_a_failure_is_not_kept(tmp_path):
    """What was fixed is measured again."""
    failing = Probes(
        folder=tmp_path, identity={}, arguments=lambda *_: ["-c", "1/0"], max_seconds=60
    )
    with pytest.raises(ValueError, match=r"batch 8 \(baseline\) failed: ZeroDivisionError"):
        failing.measure("baseline", 8)
    assert list(tmp_path.iterdir()) == []
