import pytest
import torch

from qat.model.architectures import SHAPES, count_parameters, new_model, read_architecture
from tests.tiny import tiny_llama

# Worked out by hand: embedding + layers * (queries and output + keys and values + three matrices
# of the feed-forward part + two norms) + the last norm.
COUNTS = {
    "tiny-15m": 8192 * 512 + 4 * (2 * 512**2 + 2 * 512 * 256 + 3 * 512 * 1280 + 1024) + 512,
    "medium-200m": 32_000 * 1024
    + 16 * (2 * 1024**2 + 2 * 1024 * 256 + 3 * 1024 * 2560 + 2048)
    + 1024,
    "plan-1.5b": 32_000 * 2048
    + 24 * (2 * 2048**2 + 2 * 2048 * 1024 + 3 * 2048 * 7680 + 4096)
    + 2048,
    "kisoku-3.2b": 50_304 * 3072
    + 32 * (2 * 3072**2 + 2 * 3072 * 768 + 3 * 3072 * 8192 + 6144)
    + 3072,
    "yxanul-197m": 128 * (200_005 + 640)
    + 28 * (2 * 640**2 + 2 * 640 * 128 + 3 * 640 * 1712 + 1280)
    + 640
    + 200_005 * 640,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_its_matrices(name):
    """No bias; one matrix for embedding and head, or two factors and a head."""
    total, embedding = count_parameters(read_architecture(name))
    assert total == COUNTS[name]
    rows, width = SHAPES[name]["vocab_size"], SHAPES[name]["hidden_size"]
    rank = SHAPES[name].get("embedding_rank")
    assert embedding == (rank * (rows + width) if rank else rows * width)


def test_the_plan_is_within_half_a_percent_of_its_budget():
    """1,500,088,320 parameters; heads of 128, grouped keys and values, 24 to 28 layers."""
    config = read_architecture("plan-1.5b")
    total, _ = count_parameters(config)
    assert total == 1_500_088_320
    assert abs(total / 1.5e9 - 1) < 0.005
    assert config.hidden_size // config.num_attention_heads == 128
    assert 24 <= config.num_hidden_layers <= 28
    assert config.num_attention_heads > config.num_key_value_heads
    assert 3.5 < config.intermediate_size / config.hidden_size <= 4


def test_kisokus_own_count_does_not_follow_from_its_shape():
    """Whatever is tied: each of its tensors has a side of 3072, so any sum of them has."""
    assert 3_244_343_296 % 3072
    assert COUNTS["kisoku-3.2b"] % 3072 == 0


def test_a_config_file_is_a_shape(tmp_path):
    """By its folder or its path; another vocabulary changes the rows alone."""
    config = tiny_llama().config
    config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert count_parameters(read_architecture(str(name))) == count_parameters(config)
    rows = 300 - config.vocab_size
    wider = count_parameters(read_architecture(str(tmp_path), 300))
    assert wider[0] - count_parameters(config)[0] == rows * config.hidden_size
    with pytest.raises(ValueError, match="--arch nothing is not one of tiny-15m"):
        read_architecture("nothing")


def test_weights_follow_from_the_seed(tmp_path):
    """Two models of a seed are equal, of another are not; what trains is float32."""
    tiny_llama().config.save_pretrained(tmp_path)

    def weights(seed):
        torch.manual_seed(seed)
        return new_model(read_architecture(str(tmp_path))).get_input_embeddings().weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert weights(1).dtype == torch.float32
