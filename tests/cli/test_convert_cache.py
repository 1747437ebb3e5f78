import json

import torch

from qat.cli.commands import main
from qat.pipelines.open_cache import open_teacher_cache


def test_a_cache_of_the_seeds_form_becomes_ours(tmp_path, capsys):
    """Same fingerprint, said to be conditional, found again by the second call."""
    source, target = tmp_path / "old", tmp_path / "new"
    source.mkdir()
    shard = {
        "input_ids": torch.randint(30, (9, 8), dtype=torch.int32),
        "topk_idx": torch.randint(30, (9, 7, 4), dtype=torch.int32),
        "topk_logits": torch.randn(9, 7, 4).half(),
    }
    torch.save(shard, source / "shard_00000.pt")
    (source / "meta.json").write_text('{"vocab_size": 30}')
    for _ in range(2):
        assert main("convert-cache", [str(source), str(target)]) == 0
        said = capsys.readouterr()
        values = json.loads(said.out)
        assert values["content"] == "conditional"
        assert "conditional" in said.err
        assert values["bytes_per_token"] < values["bytes_per_token_before"]
        assert values["fingerprint"] == open_teacher_cache(target).fingerprint
    (source / "meta.json").write_text('{"vocab_size": 31}')
    assert main("convert-cache", [str(source), str(target)]) == 2
    assert "data_revision" in capsys.readouterr().err
