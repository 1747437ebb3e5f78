"""What a model's logits make of an error in each layer's output, from one backward pass.

With labels drawn from the model's own distribution, the gradient d of their log-likelihood has the
Fisher matrix as its second moment, and an error e in an output costs 1/2 e^T E[d d^T] e nats. Of a
linear's output the diagonal is kept, of the embedding's all. Loud inputs (of attention sinks) often
meet gradients near zero, so the |d|^2 of each token is kept as well: E[|d|^2 x x^T] is far from
E[|d|^2] E[x x^T] there.

Processes that work together read a part of the text each; what they get is of all of it, but for
what is told of each token.

Shape legend: B batch, T tokens, V vocabulary, D hidden size, O out.

Source: Kunstner et al. 2019, arXiv:1905.12558, section 2 (the Fisher by drawn labels).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.statistics import Batch
from qat.model.head import Tokens, hidden_states, logits_of
from qat.quant.output_feedback import do_turns_pay
from qat.runtime.device import run_recorded
from qat.runtime.distributed import total_number, total_of
from qat.runtime.launch import rank

TOKENS_AT_ONCE = 256  # whose logits are held at a time
SEED_STEP = 1000  # between processes: more than there are seeds of passes
RUN_OUTPUTS = 1024  # of a linear that count together at most: G is quadratic in them


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFisher:
    """Second moments of gradients, per token of the text."""

    linears: dict[str, Tensor]
    """Of each linear's outputs, (O,), by name."""
    token_weights: dict[str, Tensor]
    """Sum over outputs at each token of this process's part of the text, (N,), by name."""
    embedding: Tensor
    """Of the row that the embedding reads, (D, D)."""
    token_shares: Tensor
    """Mean probability of each token, (V,)."""
    head: Tensor
    """Of the logits, (V,): mean p (1 - p)."""


class Watch:
    """Sums of squared gradients of modules' outputs, by hooks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, list[Tensor]] = {}

    def add(self, name: str, rows: Tensor) -> None:
        """Add gradients at tokens, (N, O)."""
        squares = rows.square()
        self.tokens.setdefault(name, []).append(squares.sum(1))
        self.sums[name] = self.sums.get(name, 0.0) + squares.sum(0)


class Grams:
    """Sums of products of gradients at pairs of a linear's outputs, run by run.

    Batches go to two halves by turns: what both tell is no noise.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Take the outputs R of each run, by the linear's name."""
        self.sizes = sizes
        self.halves: tuple[dict[str, list[Tensor]], ...] = ({}, {})
        self.num_batches: Counter[str] = Counter()
        self.num_tokens = 0
        self.embedding = torch.zeros(())  # of the rows that the embedding reads, (D, D)

    @classmethod
    def of(cls, model: nn.Module, linears: Iterable[str]) -> "Grams":
        """Return no sums yet, of all outputs of linears by name, in runs of nearly one length."""
        counts = {name: model.get_submodule(name).weight.shape[0] for name in linears}
        return cls({name: even_runs(count) for name, count in counts.items()})

    def add(self, name: str, rows: Tensor) -> None:
        """Add gradients at tokens, (N, O)."""
        runs = rows.split(list(self.sizes[name]), dim=1)
        if not self.num_batches[name]:
            for half in self.halves:
                half[name] = [run.new_zeros(run.shape[1], run.shape[1]) for run in runs]
        for total, run in zip(self.halves[self.num_batches[name] % 2][name], runs, strict=True):
            total.addmm_(run.T, run)
        self.num_batches[name] += 1

    def add_embedding(self, rows: Tensor) -> None:
        """Add gradients of the rows that the embedding reads, (N, D)."""
        self.embedding = self.embedding.to(rows) + rows.T @ rows

    def add_text(self, model: nn.Module, batches: Iterable[Batch], *, seed: int = 0) -> None:
        """Add gradients on a text; arguments as in `output_fisher`."""
        names = list(self.sizes)
        for batch in label_gradients(
            model, names, batches, self.add, self.add_embedding, seed=seed
        ):
            self.num_tokens += batch.num_tokens

    def embedding_mean(self) -> Tensor:
        """Return G of the rows that the embedding reads, (D, D).

        Raises:
            ValueError: If a gradient was not finite.
        """
        embedding = total_of(self.embedding)
        require_finite([embedding])
        return embedding / total_number(self.num_tokens)

    def means(self) -> dict[str, list[Tensor]]:
        """Return G = mean g g^T, (R, R) each, of the runs of each linear, by its name.

        Raises:
            ValueError: If a gradient was not finite.
        """
        return {name: self.mean(name) for name in self.num_batches}

    def mean(self, name: str) -> list[Tensor]:
        """Return G of the runs of one linear, as `means` does."""
        sums = [a + b for a, b in zip(*self.sums_of(name), strict=True)]
        require_finite(sums)
        count = total_number(self.num_tokens)
        return [total / count for total in sums]

    def sums_of(self, name: str) -> list[list[Tensor]]:
        """Return the sums of each half of the batches, run by run."""
        return [[total_of(run) for run in half[name]] for half in self.halves]

    def of_paying_turns(self) -> dict[str, list[Tensor]]:
        """Return `means` of the linears whose outputs are worth fitting in turns.

        Raises:
            ValueError: If a gradient was not finite.
        """
        paying = []
        for name in self.num_batches:
            first, second = self.sums_of(name)
            require_finite([*first, *second])
            if do_turns_pay(first, second):
                paying.append(name)
        return {name: self.mean(name) for name in paying}


def output_fisher(
    model: nn.Module,
    linears: Sequence[str],
    batches: Iterable[Batch],
    *,
    grams: Grams | None = None,
    seed: int = 0,
) -> OutputFisher:
    """Return the Fisher information of a model's outputs on a text.

    Args:
        model: Causal LM in eval mode; its parameters need no gradient.
        linears: Modules to watch, by name.
        batches: Token ids, (B, T) each, on the model's device; `Tokens` where documents are packed.
        grams: Of these linears, to be added to in the same passes.
        seed: Of the drawn labels.

    Raises:
        ValueError: If there is no batch, or a gradient is not finite.
    """
    watch = Watch()

    def add(name: str, rows: Tensor) -> None:
        watch.add(name, rows)
        if grams and name in grams.sizes:
            grams.add(name, rows)

    embedding = shares = head = torch.zeros(())

    def add_embedding(rows: Tensor) -> None:
        nonlocal embedding
        embedding = embedding.to(rows) + rows.T @ rows
        if grams:
            grams.add_embedding(rows)

    num_tokens = 0
    for batch in label_gradients(model, linears, batches, add, add_embedding, seed=seed):
        shares, head = batch.shares + shares.to(batch.shares), batch.head + head.to(batch.head)
        num_tokens += batch.num_tokens
    if grams:
        grams.num_tokens += num_tokens
    sums, count = {n: total_of(own) for n, own in watch.sums.items()}, total_number(num_tokens)
    embedding = total_of(embedding)
    require_finite([*sums.values(), embedding])
    return OutputFisher(
        embedding=embedding / count,
        linears={name: total / count for name, total in sums.items()},
        token_weights={name: torch.cat(parts) for name, parts in watch.tokens.items()},
        token_shares=total_of(shares) / count,
        head=total_of(head) / count,
    )


def even_runs(num_outputs: int) -> list[int]:
    """Return the lengths of as few runs of outputs as there may be."""
    count = -(-num_outputs // RUN_OUTPUTS)
    return [num_outputs * (k + 1) // count - num_outputs * k // count for k in range(count)]


def require_finite(sums: Iterable[Tensor]) -> None:
    """Refuse sums that are not finite."""
    if not all(torch.isfinite(total).all() for total in sums):
        raise ValueError("a gradient is NaN or infinite during calibration; try --dtype fp32")


@dataclass(frozen=True, slots=True)
class BatchSums:
    """What a batch says of the head."""

    shares: Tensor
    """Sum of probabilities, (V,)."""
    head: Tensor
    """Sum of p (1 - p), (V,)."""
    num_tokens: int


def label_gradients(
    model: nn.Module,
    linears: Sequence[str],
    batches: Iterable[Batch],
    add: Callable[[str, Tensor], None],
    add_embedding: Callable[[Tensor], None] = lambda _rows: None,
    *,
    seed: int,
) -> Iterator[BatchSums]:
    """Give the gradients of drawn labels' log-likelihood at outputs, batch by batch.

    `add` takes those of a linear, (N, O) float32, with its name, `add_embedding` those of the rows
    that the embedding reads, before it scales them.
    """
    generator: torch.Generator | None = None
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)  # of Gemma 3
    scale = 1.0 if scale is None else float(scale)
    with ExitStack() as hooks:
        for name in linears:

            def after(_module: nn.Module, _inputs: object, out: Tensor, name: str = name) -> None:
                out.register_hook(lambda gradient: add(name, rows_of(gradient)))

            hooks.enter_context(model.get_submodule(name).register_forward_hook(after))

        def start(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
            out = out.detach().requires_grad_()
            out.register_hook(lambda gradient: add_embedding(rows_of(gradient) * scale))
            return out

        hooks.enter_context(model.get_input_embeddings().register_forward_hook(start))
        for batch in map(Tokens.of, tqdm(batches, desc="fisher", unit="batch", leave=False)):
            if generator is None:
                # Each process draws labels of its own.
                generator = torch.Generator(batch.token_ids.device)
                generator.manual_seed(seed + SEED_STEP * rank())
            with torch.enable_grad():
                hidden = hidden_states(model, *batch)
            gradient, shares, head = label_gradient(model, hidden.detach(), generator)
            hidden.backward(gradient)
            run_recorded(batch.token_ids.device)
            yield BatchSums(shares, head, batch.token_ids.numel())
    if generator is None:
        raise ValueError("calibration has no tokens; give a cache with at least one sequence")


def rows_of(gradient: Tensor) -> Tensor:
    """Return a gradient, (B, T, O), as that of tokens, (N, O) float32."""
    return gradient.detach().flatten(0, -2).float()


def drawn_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Return a label drawn for each row of probabilities, (N, V) to (N,).

    By the running sum: `torch.multinomial` draws a number for each label, which takes a CPU as long
    as the head.
    """
    running = probabilities.cumsum(-1)
    shape = (len(probabilities), 1)
    draws = torch.rand(shape, generator=generator, device=running.device) * running[:, -1:]
    labels = torch.searchsorted(running, draws, right=True).squeeze(1)
    return labels.clamp_max(probabilities.shape[1] - 1)


def label_gradient(
    model: nn.Module, hidden: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of drawn labels' negative log-likelihood, summed over tokens.

    Returns:
        The gradient of hidden states, (B, T, D), the sum of probabilities, (V,), and that of
        p (1 - p), (V,).
    """
    gradients, shares, moments = [], 0.0, 0.0
    for part in hidden.flatten(0, 1).split(TOKENS_AT_ONCE):
        rows = part.requires_grad_()
        with torch.enable_grad():
            logits = logits_of(model, rows).float()
            chosen = logits.detach().softmax(-1)
            labels = drawn_labels(chosen, generator)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, rows)[0])
        shares = shares + chosen.sum(0)
        moments = moments + (chosen - chosen.square()).sum(0)
    return torch.cat(gradients).view_as(hidden), shares, moments
