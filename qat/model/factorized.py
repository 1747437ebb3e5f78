"""An embedding that is a product of two matrices while it trains, and one matrix in a file.

    W = A P.T    A (V, R) a row a token, P (H, R) from rank to width

A large vocabulary then has V R weights in place of V H, each of which gets more gradient. What is
saved holds W, so that a model is one of its family to whoever reads it: as a teacher, in GGUF.

Source: Lan et al. 2019, arXiv:1909.11942, section 3.1.

Shape legend: V vocabulary, H hidden, R rank.
"""

import torch
from torch import Tensor, nn

EMBEDDING_RANK = "embedding_rank"  # field of a model's config: R; absent or None = a whole matrix


class FactorizedEmbedding(nn.Embedding):
    """Looks up rows of A, its weight, and projects them."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        device: torch.device | None = None,
    ):
        super().__init__(num_embeddings, rank, device=device)
        self.projection = nn.Linear(rank, embedding_dim, bias=False, device=device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the rows of W of token ids (B, T), (B, T, H)."""
        return self.projection(super().forward(token_ids))

    def product(self) -> Tensor:
        """Return W, (V, H)."""
        return self.weight @ self.projection.weight.T


def factorize_embedding(model: nn.Module, rank: int) -> None:
    """Give a new model of random weights an embedding of a rank, drawn as large as its own.

    Raises:
        ValueError: If the head is the embedding: it would need the same factors; or the rank is no
            saving.
    """
    config, whole = model.config.get_text_config(), model.get_input_embeddings()
    num_rows, width = whole.weight.shape
    if config.tie_word_embeddings:
        raise ValueError(
            f"{EMBEDDING_RANK} {rank} with tie_word_embeddings: a factorized embedding is no head; "
            "set tie_word_embeddings to false in config.json"
        )
    if not 1 <= rank < width:
        raise ValueError(f"{EMBEDDING_RANK} {rank} must be within 1 and {width - 1}, below width")
    if type(whole) is not nn.Embedding:
        raise ValueError(f"{EMBEDDING_RANK}: the embedding of {config.model_type} scales its rows")
    made = FactorizedEmbedding(num_rows, width, rank, device=whole.weight.device)
    nn.init.normal_(made.weight, std=config.initializer_range)
    # A sum of R products: W's weights have the spread of A's.
    nn.init.normal_(made.projection.weight, std=rank**-0.5)
    model.set_input_embeddings(made)


@torch.no_grad()
def whole_tensors(model: nn.Module) -> dict[str, Tensor] | None:
    """Return a model's tensors with W in place of its factors; None where it has none."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, FactorizedEmbedding):
        return None
    prefix = next(name for name, module in model.named_modules() if module is embedding)
    tensors = model.state_dict()
    del tensors[f"{prefix}.projection.weight"]
    return {**tensors, f"{prefix}.weight": embedding.product()}
