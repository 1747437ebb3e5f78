"""Tokens that are likely after alike states, in groups: their rows of a head share one H.

An error d in the row of token v moves its logit after a final hidden state x by d x, which costs

    1/2 mean p_v (1 - p_v) (d x)^2    nats per token

with the probability p_v after x. So the H of a row counts states by p_v (1 - p_v); that of all
states alike is the one of no row. An H for each token would fit no memory and be told by few
states, so tokens come into groups by k-means of their mean states, and a group's H is half its own
and half that of all states.

Shape legend: N states, D hidden size, V tokens, G groups.

Source: one H for a group of outputs: GuidedQuant, Kim et al. 2025, arXiv:2505.07004.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.calibrate.statistics import Fed
from qat.runtime.distributed import from_first, total_number, total_of

# Of SmolLM2's 49,152 tokens, in a file whose other weights stay: with 8, 32, 64 and 128 groups the
# KL is 0.4, 3.3, 3.2 and 3.8% below that with one (3,717 tokens, one run each).
NUM_GROUPS = 32
STATES_A_GROUP, TOKENS_A_GROUP = 256, 256  # at least, on average
OWN_SHARE = 0.5  # of a group's H; 1 leaves 0.3% more KL
STATES_AT_ONCE = 256  # whose logits are held

Logits = Callable[[Tensor], Tensor]  # of states, (N, D) to (N, V)


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """Rows of a head in groups, and how much states count in each."""

    groups: list[Tensor]
    """The tokens of each, (v,) int64; together all, each once."""
    states: Tensor
    """That the quantized model feeds to the head, (N, D) float32."""
    weights: Tensor
    """Sum of p (1 - p) of a group's tokens after each state, (N, G)."""

    def hessian(self, group: int, whole: Tensor) -> Tensor:
        """Return a group's H, (D, D), where `whole` is that of all states."""
        weights = self.weights[:, group : group + 1]
        mass = total_of(weights.sum()).clamp_min(1e-30)
        own = total_of(self.states.T @ (weights * self.states)) / mass
        return torch.lerp(whole.float(), own, OWN_SHARE)


def group_tokens(logits: Logits, fed: Fed) -> TokenGroups | None:
    """Return the tokens of a head in groups; None where states or tokens are too few for that.

    Of several processes each has states of its own, and all get the same groups.

    Args:
        logits: Of the full-precision model.
        fed: States before the head, (N, D), of the quantized model and of the other.
    """
    dense, states = fed.dense, fed.quantized.float()
    vocab_size = logits(dense[:1]).shape[1]
    num_states = int(total_number(len(states)))
    count = min(NUM_GROUPS, num_states // STATES_A_GROUP, vocab_size // TOKENS_A_GROUP)
    if count < 2:
        return None
    means, masses = mean_states(logits, dense, vocab_size)
    labels = from_first(lambda: cluster(means, masses, count)).to(states.device)
    weights = torch.cat(
        [
            torch.zeros(len(part), count, device=part.device).index_add_(1, labels, part)
            for part in spreads(logits, dense)
        ]
    )
    groups = [(labels == group).nonzero().flatten() for group in range(count)]
    kept = [place for place, tokens in enumerate(groups) if len(tokens)]
    return TokenGroups([groups[place] for place in kept], states, weights[:, kept])


def mean_states(logits: Logits, states: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the mean state of each token, (V, D), and the sum of its p (1 - p), (V,)."""
    masses = torch.zeros(vocab_size, device=states.device)
    sums = torch.zeros(vocab_size, states.shape[1], device=states.device)
    for part, spread in zip(states.split(STATES_AT_ONCE), spreads(logits, states), strict=True):
        masses += spread.sum(0)
        sums.addmm_(spread.T, part.float())
    masses, sums = total_of(masses), total_of(sums)
    return sums.div_(masses.clamp_min(1e-30).unsqueeze(1)), masses  # a vocabulary's are gigabytes


def spreads(logits: Logits, states: Tensor) -> Iterator[Tensor]:
    """Yield p (1 - p) of every token after some states, (n, V)."""
    for part in states.split(STATES_AT_ONCE):
        chosen = logits(part).float().softmax(-1)
        yield chosen - chosen.square()


def cluster(means: Tensor, masses: Tensor, count: int) -> Tensor:
    """Return the group of each token, (V,) int64 on the CPU, by its mean state.

    Roots of masses weigh tokens: a few would fill all groups by their masses. `means` are used up.
    """
    from sklearn.cluster import MiniBatchKMeans

    points = means.sub_(means.mean(0)).cpu().numpy()
    means_of = MiniBatchKMeans(count, random_state=0, n_init=3, batch_size=4096)
    means_of.fit(points, sample_weight=masses.sqrt().cpu().numpy())
    return torch.from_numpy(means_of.labels_).long()
