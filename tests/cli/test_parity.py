"""`qat parity` from flags to closing line."""

import json
import sys

import pytest
import torch

from qat.cli.commands import main
from qat.export import runtimes
from qat.export.llama_cpp import open_library
from qat.export.parity_config import ParityConfig
from qat.export.to_gguf import export_to_gguf
from qat.export.to_hf import export_to_hf
from qat.model.checkpoint import read_checkpoint
from qat.pipelines.parity import read_prompts
from tests.tiny import save_student, save_tiny, tiny_llama, tiny_student


@pytest.mark.recipe
def test_an_export_against_its_student(tmp_path, capsys):
    """One line a prompt, and numbers that are zero where the arithmetic is the same."""
    text_source = save_tiny(tmp_path / "base", tiny_llama())
    student = save_student(tmp_path / "student", tiny_student(), text_source)
    export_to_hf(tiny_student(), tmp_path / "out", text_source=text_source, dtype=torch.float32)
    (tmp_path / "prompts.txt").write_text("the cat sees\n\ntwo small birds\n")
    flags = ["--checkpoint", student, "--export", tmp_path / "out", "--num-new-tokens", 3]
    flags += ["--prompts", tmp_path / "prompts.txt"]
    assert main("parity", [str(flag) for flag in flags]) == 0
    said = capsys.readouterr()
    closing = json.loads(said.out)
    assert closing["runtime"] == "transformers"
    assert closing["prompts"] == 2
    assert closing["max_logit_difference"] == closing["kl_nats"] == 0
    assert any(line.startswith("the cat sees ") for line in said.err.splitlines())


@pytest.mark.recipe
def test_a_cache_tells_the_distance_from_the_teacher(path, tmp_path, capsys):
    """What transformers makes of a plain folder is as far from the teacher as the student is."""
    export_to_hf(
        read_checkpoint(path.q2)[0], tmp_path / "out", text_source=path.q2, dtype=torch.float32
    )
    (tmp_path / "prompts.txt").write_text("the cat sees\n")
    flags = ["--checkpoint", path.q2, "--export", tmp_path / "out", "--num-new-tokens", 3]
    flags += ["--prompts", tmp_path / "prompts.txt", "--cache-dir", path.cache]
    assert main("parity", [str(flag) for flag in flags]) == 0
    closing = json.loads(capsys.readouterr().out)
    assert closing["heldout_runtime"]["kd_loss"] == pytest.approx(
        closing["heldout_student"]["kd_loss"], rel=1e-5
    )
    assert closing["heldout_student"]["tokens"] > 0


@pytest.mark.parametrize(
    ("plan", "library", "error"),
    [
        ("gguf:q2_0", "xllamacpp", "ImportError('not read: its library is what loads')"),
        ("mlx", "mlx_lm", "ImportError('GLIBC_2.35 not found')"),
        ("transformers", "compressed_tensors", "ImportError('undefined symbol')"),
    ],
)
def test_a_runtime_that_does_not_load_is_one_line_with_a_remedy(
    tmp_path, monkeypatch, refused, plan, library, error
):
    """A runtime built for another system raised OSError at import: a traceback of its loader."""
    exported = tmp_path / "out"
    if plan.startswith("gguf"):
        text_source = save_tiny(tmp_path / "base", tiny_llama())
        exported = tmp_path / "student.gguf"
        export_to_gguf(tiny_student("llama", plan), exported, text_source=text_source)
    else:
        exported.mkdir()
        configs = {
            "mlx": {"quantization": {"bits": 4}},
            "transformers": {"quantization_config": {"quant_method": "compressed-tensors"}},
        }
        (exported / "config.json").write_text(json.dumps(configs[plan]))
    broken = tmp_path / "site" / library
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)  # imported by an earlier test
    monkeypatch.setattr(runtimes, "open_library", open_library.__wrapped__)
    (tmp_path / "prompts.txt").write_text("the cat sees\n")
    said = refused(
        "parity",
        device=None,
        checkpoint="absent",
        prompts=tmp_path / "prompts.txt",
        export=exported,
    )
    assert "is installed but does not load" in said
    assert f"pip install --force-reinstall {library.replace('_', '-')}" in said


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
    with pytest.raises(ValueError, match="must be 1 or more"):
        ParityConfig(checkpoint="a", export=tmp_path, prompts=path, num_prompts=0)
