"""What a checkpoint's name stands for."""

import tarfile

import lz4.frame
import pytest
import torch

from qat.export.to_gguf import export_to_gguf
from qat.pipelines.open_checkpoint import (
    checkpoint_path,
    load_model,
    open_checkpoint,
)
from tests.seeds import close, make_v2
from tests.tiny import save_tiny, tiny_qwen3


@pytest.mark.recipe
@pytest.mark.parametrize("suffix", [".tgz", ".tar.lz4"])
def test_found_in_an_archive(tmp_path, suffix):
    """An archive is unpacked next to itself, once, also with a folder nested in its like."""
    made = make_v2(tmp_path)
    made.write(tmp_path / "in" / "v2_best" / "v2_best", "anything.pt")
    archive = tmp_path / f"v2_best{suffix}"
    if suffix == ".tgz":
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "in" / "v2_best", arcname="v2_best")
    else:
        with lz4.frame.open(archive, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            tar.add(tmp_path / "in" / "v2_best", arcname="v2_best")
    for _ in range(2):
        student, _ = load_model(archive)
        assert close(student, made.expected)
    assert checkpoint_path(archive).name == "anything.pt"


def test_found_in_folders(tmp_path):
    """A run's folder, the folder above it, and the best file among several."""
    made = make_v2(tmp_path / "x")
    file = made.write(tmp_path / "x" / "run")
    assert checkpoint_path(tmp_path / "x" / "run") == file
    torch.save(made.state, tmp_path / "x" / "run" / "checkpoint_step100.pt")
    assert checkpoint_path(tmp_path / "x") == file
    file.rename(file.with_name("checkpoint_step200.pt"))
    with pytest.raises(ValueError, match=r"several checkpoints.*step100.*name one"):
        checkpoint_path(tmp_path / "x" / "run")


def test_the_base_model_is_found_and_may_be_given(tmp_path):
    """A folder that the config names is looked for next to the run; --model-id comes first."""
    made = make_v2(tmp_path)
    file = made.write(tmp_path / "run")
    assert open_checkpoint(file).text_folder.resolve() == (tmp_path / "base").resolve()
    other = save_tiny(tmp_path / "other", tiny_qwen3())
    assert open_checkpoint(file, model_id=str(other)).text_folder == other
    made.config["model_id"] = "./nowhere"
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--model-id"):
        open_checkpoint(made.write(tmp_path / "run"))
    del made.config["model_id"]
    with pytest.raises(FileNotFoundError, match="names no full-precision model"):
        open_checkpoint(made.write(tmp_path / "run"))


def test_another_models_base_is_refused(tmp_path):
    """A base model of other sizes does not fit, and the tensor is named."""
    made = make_v2(tmp_path)
    other = save_tiny(tmp_path / "other", tiny_qwen3(intermediate_size=192))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj"):
        load_model(made.write(tmp_path / "run"), model_id=str(other))


def test_any_gguf_file_opens_with_its_full_precision_model(tmp_path):
    """Its config and tokenizer come from there; without it the error names the flag."""
    model = tiny_qwen3()
    base = save_tiny(tmp_path / "base", model)
    file = tmp_path / "peer.gguf"
    export_to_gguf(model, file, text_source=base, dtype=torch.float32)
    opened = open_checkpoint(file, model_id=str(base))
    assert opened.text_folder == base
    expected = model.state_dict()
    assert all(
        torch.equal(value, expected[key]) for key, value in opened.load().state_dict().items()
    )
    with pytest.raises(ValueError, match="--model-id"):
        open_checkpoint(file)
