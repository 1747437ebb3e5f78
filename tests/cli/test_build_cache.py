import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.cache.config import BuildCacheConfig
from qat.cli.commands import main
from qat.pipelines.open_cache import open_teacher_cache
from tests.tiny import save_tiny, tiny_llama, tiny_records, tiny_tokenizer, write_jsonl

KEYS = {
    "cache",
    "tokens",
    "bytes_per_token",
    "tokens_per_second",
    "bare_forward_tokens_per_second",
    "fingerprint",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A teacher's folder and a data file."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny(folder / "teacher", tiny_llama())
    write_jsonl(folder / "animals.jsonl", tiny_records(20))
    return folder


def arguments(sources, output, *more):
    flags = {"teacher": sources / "teacher", "data": sources / "animals.jsonl", "seq-len": 16}
    flags |= {"device": "cpu", "output-dir": output}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))] + [*more]


def closing(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.recipe
def test_the_closing_line_tells_of_the_cache(sources, tmp_path, capsys):
    """All keys, a folder named by its settings and fingerprint, found again at once."""
    flags = ("--thinking", "both", "--top-k", "8", "--num-negatives", "2")
    assert main("build-cache", arguments(sources, tmp_path, *flags)) == 0
    first = closing(capsys)
    assert first.keys() >= KEYS
    folder = Path(first["cache"])
    assert folder.parent == tmp_path
    name, _, named_fingerprint = folder.name.rpartition("-")
    assert name == "animals_chat_think_both_L16_K8_R2"
    assert named_fingerprint == first["fingerprint"] == open_teacher_cache(folder).fingerprint
    assert first["tokens"] == open_teacher_cache(folder).num_sequences * 16
    assert main("build-cache", arguments(sources, tmp_path, *flags)) == 0
    again = closing(capsys)
    assert again["fingerprint"] == first["fingerprint"]
    assert again["tokens_per_second"] is None


@pytest.mark.recipe
@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", "1"),
        ("--top-k", "9"),
        ("--loss-on", "assistant"),
        ("--content", "sampled"),
        ("--num-sequences", "9"),
        ("--heldout-ratio", "0.5"),
    ],
)
def test_whatever_decides_the_bytes_is_in_the_fingerprint(sources, tmp_path, flags, capsys):
    """Another setting, another folder."""
    main("build-cache", arguments(sources, tmp_path, "--top-k", "8"))
    first = closing(capsys)
    assert main("build-cache", arguments(sources, tmp_path, "--top-k", "8", *flags)) == 0
    assert closing(capsys)["cache"] != first["cache"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--top-k", "0"), "--top-k 0"),
        (("--top-k", "9999"), "9999"),
        (("--seq-len", "1"), "--seq-len 1"),
        (("--seq-len", "99999"), "less than one block"),
        (("--heldout-ratio", "1"), "--heldout-ratio 1"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--num-negatives", "-1"), "--num-negatives -1"),
        (("--content", "hidden", "--top-k", "8"), "--content hidden"),
        (("--data", "none.jsonl"), "none.jsonl does not exist"),
        (("--device", "moon"), "--device moon"),
        (("--dtype", "fp8"), "--dtype fp8"),
        (("--format", "dolly"), "sample 0 is not of --format dolly"),
        (("--teacher", "./none"), "./none"),
    ],
)
def test_a_wrong_flag_ends_with_one_line(sources, tmp_path, capsys, flags, said):
    """Exit code 2, the key, the value, and no folder."""
    given = arguments(sources, tmp_path)
    if flags[0] in given:
        place = given.index(flags[0])
        del given[place : place + 2]
    assert main("build-cache", [*given, *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert list(tmp_path.glob("*")) == []


@pytest.mark.recipe
def test_a_template_without_thinking_is_told_once(sources, tmp_path, capsys):
    """And the two equal renderings become one."""
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    save_tiny(tmp_path / "teacher", tiny_llama(), tiny_tokenizer(template))
    flags = ("--teacher", str(tmp_path / "teacher"), "--thinking", "both", "--top-k", "8")
    assert main("build-cache", arguments(sources, tmp_path, *flags)) == 0
    assert capsys.readouterr().err.count("ignores enable_thinking") == 1


def test_defaults_are_told_by_the_content():
    """K is 64 for top-k, few next to draws, none for hidden states."""
    kept = {
        content: BuildCacheConfig(teacher="t", data="d", content=content).kept_ids
        for content in ("top-k", "sampled", "hidden")
    }
    assert kept == {"top-k": 64, "sampled": 8, "hidden": 0}


@pytest.mark.recipe
def test_kill_9_at_any_moment_changes_no_byte(tmp_path):
    """Two kills, then the same command: byte for byte the cache of an undisturbed run."""
    save_tiny(tmp_path / "teacher", tiny_llama())
    write_jsonl(tmp_path / "animals.jsonl", tiny_records(2000))
    folders = {}
    for name in ("straight", "killed"):
        output = tmp_path / name
        command = [sys.executable, "-m", "qat", "build-cache"]
        command += arguments(tmp_path, output, "--top-k", "32", "--name", "c")
        for num_shards in (1, 3) if name == "killed" else ():
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            deadline = time.monotonic() + 60
            while len(list((output / "c").glob("shard*"))) < num_shards:
                assert time.monotonic() < deadline, "no shard appeared"
                assert process.poll() is None, "the build ended before the kill"
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not (output / "c" / "manifest.json").exists()
        subprocess.run(command, check=True, capture_output=True)
        folders[name] = {path.name: path.read_bytes() for path in (output / "c").iterdir()}
    assert folders["straight"] == folders["killed"]
