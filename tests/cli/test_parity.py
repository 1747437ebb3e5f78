"""`qat parity` from flags to closing line."""

import json

import pytest
import torch

from qat.cli.parity import main, read_prompts
from qat.export.parity_config import ParityConfig
from qat.export.to_hf import export_to_hf
from qat.model.checkpoint import read_checkpoint
from tests.tiny import save_student, save_tiny, tiny_llama, tiny_student


def test_an_export_against_its_student(tmp_path, capsys):
    """One line a prompt, and numbers that are zero where the arithmetic is the same."""
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    student = save_student(tmp_path / "student", tiny_student(), text_source)
    export_to_hf(tiny_student(), tmp_path / "out", text_source=text_source, dtype=torch.float32)
    (tmp_path / "prompts.txt").write_text("the cat sees\n\ntwo small birds\n")
    flags = ["--checkpoint", student, "--export", tmp_path / "out", "--num-new-tokens", 3]
    flags += ["--prompts", tmp_path / "prompts.txt"]
    assert main([str(flag) for flag in flags]) == 0
    said = capsys.readouterr()
    closing = json.loads(said.out)
    assert closing["runtime"] == "transformers"
    assert closing["prompts"] == 2
    assert closing["max_logit_difference"] == closing["kl_nats"] == 0
    assert any(line.startswith("the cat sees ") for line in said.err.splitlines())


def test_a_cache_tells_the_distance_from_the_teacher(path, tmp_path, capsys):
    """What transformers makes of a plain folder is as far from the teacher as the student is."""
    export_to_hf(
        read_checkpoint(path.q2)[0], tmp_path / "out", text_source=path.q2, dtype=torch.float32
    )
    (tmp_path / "prompts.txt").write_text("the cat sees\n")
    flags = ["--checkpoint", path.q2, "--export", tmp_path / "out", "--num-new-tokens", 3]
    flags += ["--prompts", tmp_path / "prompts.txt", "--cache-dir", path.cache]
    assert main([str(flag) for flag in flags]) == 0
    closing = json.loads(capsys.readouterr().out)
    assert closing["heldout_runtime"]["kl_nats"] == pytest.approx(
        closing["heldout_student"]["kl_nats"], rel=1e-5
    )
    assert closing["heldout_student"]["tokens"] > 0


def test_prompts_are_drawn_by_the_seed(tmp_path):
    """The same ones each time, in the file's order; an empty file is refused."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {number}" for number in range(40)))

    def drawn(seed, count=5):
        config = ParityConfig(
            checkpoint="a", export=tmp_path, prompts=path, seed=seed, num_prompts=count
        )
        return read_prompts(config)

    assert drawn(0) == drawn(0) != drawn(1)
    numbers = [int(prompt.split()[1]) for prompt in drawn(0)]
    assert numbers == sorted(numbers)
    assert len(drawn(0, count=99)) == 40
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt; write one a line"):
        drawn(0)
    with pytest.raises(ValueError, match="must be at least 1"):
        ParityConfig(checkpoint="a", export=tmp_path, prompts=path, num_prompts=0)
