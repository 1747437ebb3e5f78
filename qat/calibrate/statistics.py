"""Activation statistics of each quantizable linear, from a few forward passes.

`collect_second_moments` watches a whole model at once. `walk_decoder_layers` goes one decoder layer
at a time and stops before each linear whose turn it is, so that its statistics come from the inputs
that the layers fitted before it really feed.

Shape legend: B batch, T tokens, I in, D hidden size.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.model.head import Tokens, hidden_states, separate_documents
from qat.runtime.device import run_recorded

GRAM_PANEL = 384  # columns of a product: spares most of the lower triangle, still wide
Batch = Tensor | Tokens


@torch.no_grad()
def collect_second_moments(
    model: nn.Module,
    linears: dict[str, nn.Module],
    batches: Iterable[Batch],
    *,
    head: str | None = None,
) -> dict[str, Tensor]:
    """Return the mean square of every input channel of each linear, (I,) float32.

    Args:
        model: Causal LM in eval mode.
        linears: Modules to watch, by name.
        batches: Token ids, (B, T) each, on the model's device; `Tokens` where documents are packed.
        head: Name under which the head's inputs are returned; None = not at all.

    Raises:
        ValueError: If there is no batch, or a statistic is not finite.
    """
    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []  # an input and its sum: q, k and v read one input, summed once
    num_tokens = 0

    def watch(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            add(name, inputs[0])

        return hook

    def add(name: str, x: Tensor) -> None:
        if not last or last[0] is not x:
            last[:] = [x, x.flatten(0, -2).float().square().sum(0)]
        sums[name] = sums[name] + last[1] if name in sums else last[1]

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    if head is not None:
        norm = model.get_decoder().norm
        handles.append(norm.register_forward_hook(lambda _norm, _inputs, out: add(head, out)))
    try:
        for batch in map(Tokens.of, tqdm(batches, desc="calibrate", unit="batch", leave=False)):
            last.clear()
            # Not the head: a few rows of it take 5 GB of scratch memory at 150,000 tokens (oneDNN).
            hidden_states(model, *batch)
            num_tokens += batch.token_ids.numel()
            run_recorded(batch.token_ids.device)
    finally:
        for handle in handles:
            handle.remove()
    if not num_tokens:
        raise ValueError("calibration has no tokens; give a cache with at least one sequence")
    return {name: finite_mean(name, total, num_tokens) for name, total in sums.items()}


def finite_mean(name: str, total: Tensor, count: int) -> Tensor:
    """Return total / count, refused if it is not finite."""
    if not torch.isfinite(total).all():
        raise ValueError(
            f"{name}: inputs hold NaN or infinity during calibration; try --dtype fp32"
        )
    return total / count


def collect_loss_weights(
    model: nn.Module, linears: Iterable[str], batches: Sequence[Batch], *, seed: int = 0
) -> dict[str, list[Tensor]]:
    """Return how strongly each token's output of each linear moves the end loss, (B, T) a batch.

    The mean over a linear's outputs of the squared gradient of the model's own cross-entropy, on
    tokens drawn from its own predictions: the diagonal of the Fisher information, which is the
    curvature of KL(teacher || student) where the student is the teacher.

    Args:
        model: Causal LM in eval mode.
        linears: Names of the modules to watch.
        batches: Token ids, (B, T) each, on the model's device; `Tokens` where documents are packed.
        seed: Of the drawn tokens.

    Source:
        GuidedQuant, Kim et al. 2025, arXiv:2505.07004, equation 7 with one group of outputs.
    """
    weights: dict[str, list[Tensor]] = {name: [] for name in linears}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            output.register_hook(lambda grad: weights[name].append(grad.float().square().mean(-1)))

        return hook

    handles = [model.get_submodule(x).register_forward_hook(watch(x)) for x in weights]
    generator = torch.Generator().manual_seed(seed)
    try:
        for batch in map(Tokens.of, tqdm(batches, desc="weigh tokens", unit="batch", leave=False)):
            embedded = model.get_input_embeddings()(batch.token_ids).detach().requires_grad_()
            apart = separate_documents(model.get_decoder().config, batch)
            logits = model(inputs_embeds=embedded, **apart, use_cache=False).logits.flatten(0, 1)
            drawn = draw(logits, generator)
            loss = nn.functional.cross_entropy(logits.float(), drawn, reduction="sum")
            torch.autograd.grad(loss, embedded)
    finally:
        for handle in handles:
            handle.remove()
    return weights


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a token id drawn from each row's distribution, (N,) from (N, V)."""
    probabilities = logits.detach().float().softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputStatistics:
    """What a linear's inputs are like: x_q those of the quantized model, x of the dense one."""

    hessian: Tensor
    """mean x_q x_q^T, (I, I) float32."""
    drift: Tensor
    """mean (x - x_q) x_q^T, (I, I) float32: what the layers before this one did to its inputs."""


@dataclass(slots=True)
class Stream:
    """Hidden states of every batch before a block, and what else each block is called with."""

    hidden: list[Tensor]  # (B, T, D) each
    arguments: list[dict[str, dict[str, Any]]]  # of each batch, by block name

    def run(self, name: str, block: nn.Module, batch: int) -> Tensor:
        """Return the hidden states after a block."""
        output = block(self.hidden[batch], **self.arguments[batch][name])
        return output[0] if isinstance(output, tuple) else output

    def advance(self, name: str, block: nn.Module) -> None:
        """Go past a block."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(name, block, batch)


class StopForward(Exception):  # noqa: N818 no error, a way out
    """Ends a forward pass where its result is known."""


@torch.no_grad()
def walk_decoder_layers(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    *,
    head: str | None = None,
    reference: nn.Module | None = None,
    token_weights: dict[str, list[Tensor]] | None = None,
) -> Iterator[tuple[list[str], InputStatistics]]:
    """Yield linears that share an input, with its statistics, in the order of the forward pass.

    The caller puts fitted layers in their place before it asks for more; what comes later is fed by
    them. Only one block's inputs are held at a time.

    Args:
        model: Causal LM in eval mode that turns into the quantized one.
        names: The linears to fit.
        batches: Token ids, (B, T) each, on the model's device; `Tokens` where documents are packed.
        head: Name under which the inputs of the head are yielded last; None = not at all.
        reference: The full-precision model; the model itself as it comes when not given.
        token_weights: How much each token counts for each linear, (B, T) a batch; linears that
            share an input share the mean. Alike when not given.

    Raises:
        ValueError: If there is no batch, a statistic is not finite, or the model's blocks do not
            simply follow each other.
    """
    if not batches:
        raise ValueError("calibration has no tokens; give a cache with at least one sequence")
    blocks = linears_by_block(names)
    last = list(blocks)[-1] if head is None else last_decoder_layer(model)
    stream = open_stream(model, batches, last)
    dense = stream if reference is None else open_stream(reference, batches, last)
    dense = Stream(list(dense.hidden), dense.arguments)
    for name in stream.arguments[0]:
        block = model.get_submodule(name)
        if reference is None:
            reference_block = copy.deepcopy(block)
        else:
            reference_block = reference.get_submodule(name)
        inside = blocks.get(name, [])
        dense_inputs = watch_inputs(dense, name, reference_block, inside)
        for group in groups_that_share(dense_inputs):
            shared = [f"{name}.{linear}" for linear in group]
            weights = token_weights and mean_weights([token_weights[x] for x in shared])
            statistics = input_statistics(
                stream, name, block, group[0], dense_inputs[group[0]], weights
            )
            yield shared, statistics
            for linear in group:
                del dense_inputs[linear]
        stream.advance(name, block)
    if head is not None:
        yield [head], head_statistics(model, reference or model, stream, dense)


def last_decoder_layer(model: nn.Module) -> str:
    """Return the name of a model's last decoder layer."""
    last = model.get_decoder().layers[-1]
    return next(name for name, module in model.named_modules() if module is last)


def head_statistics(
    model: nn.Module, reference: nn.Module, stream: Stream, dense: Stream
) -> InputStatistics:
    """Return the statistics of what the head reads: hidden states after the last norm.

    Args:
        model: As quantized so far.
        reference: The full-precision model.
        stream: After the quantized model's decoder layers.
        dense: After the full-precision model's.

    Raises:
        ValueError: If one is not finite.
    """
    norm, dense_norm = model.get_decoder().norm, reference.get_decoder().norm
    width = stream.hidden[0].shape[-1]
    hessian = torch.zeros(width, width, device=stream.hidden[0].device)
    drift = torch.zeros_like(hessian)
    total = 0
    for hidden, expected in zip(stream.hidden, dense.hidden, strict=True):
        x = norm(hidden).flatten(0, -2)
        change = dense_norm(expected).flatten(0, -2) - x
        add_gram(hessian, x.float())
        drift += change.to(expected.dtype).T @ x.to(expected.dtype)
        total += len(x)
    if not (torch.isfinite(hessian).all() and torch.isfinite(drift).all()):
        raise ValueError("the head's inputs hold NaN or infinity; try --dtype fp32")
    hessian = hessian.triu() + hessian.triu(1).T
    return InputStatistics(hessian=hessian / total, drift=drift / total)


def linears_by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the linears of each block, by their names inside it: a block's name ends in a number.

    Raises:
        ValueError: If a linear is in no numbered block.
    """
    blocks: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r"(.*?\.\d+)\.(.+)", name)
        if match is None:
            raise ValueError(f"{name} is in no numbered block; fit this model with --fit moments")
        blocks.setdefault(match[1], []).append(match[2])
    return blocks


def open_stream(model: nn.Module, batches: Sequence[Batch], last: str) -> Stream:
    """Return the hidden states before the first block, and each block's other arguments.

    Blocks up to `last` are seen. Where each sequence is one document, what blocks get in addition
    to hidden states (positions, masks) has no batch axis of its own: one sequence's serves all.
    """
    prefix = re.match(r"(.*\.)\d+$", last)[1]
    names = [f"{prefix}{index}" for index in range(int(last.removeprefix(prefix)) + 1)]
    first = model.get_submodule(names[0])
    hidden, arguments, shared = [], [], {}
    for batch in map(Tokens.of, batches):
        hidden.append(input_of(first, lambda batch=batch: hidden_states(model, *batch)))
        if batch.document_ids is not None:
            arguments.append(block_arguments(model, names, batch))
            continue
        length = batch.token_ids.shape[1]
        if length not in shared:
            shared[length] = block_arguments(model, names, Tokens(batch.token_ids[:1]))
        arguments.append(shared[length])
    return Stream(hidden, arguments)


def block_arguments(
    model: nn.Module, names: Sequence[str], batch: Tokens
) -> dict[str, dict[str, Any]]:
    """Return each block's arguments but the hidden states in a forward pass.

    Raises:
        ValueError: If the blocks do not simply follow each other.
    """
    seen: dict[str, dict[str, Any]] = {}
    ends: list[tuple[Tensor, Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            seen[name] = rest
            hidden = args[0] if args else kwargs["hidden_states"]
            ends.append((hidden, output[0] if isinstance(output, tuple) else output))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
        for name in names
    ]
    try:
        hidden_states(model, *batch)
    finally:
        for handle in handles:
            handle.remove()
    for (_, left), (right, _) in zip(ends, ends[1:], strict=False):
        if not torch.equal(left, right):
            raise ValueError(
                f"{type(model).__name__} does more between its blocks than pass hidden states on; "
                "fit it with --fit moments"
            )
    return seen


def input_of(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """Return the first input of a module in a call, which stops there."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise StopForward

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call()
    except StopForward:
        pass
    finally:
        handle.remove()
    return found[0]


def watch_inputs(
    stream: Stream, name: str, block: nn.Module, linears: Sequence[str]
) -> dict[str, list[Tensor]]:
    """Go past a block and return each linear's inputs of every batch, in the order of the calls."""
    inputs: dict[str, list[Tensor]] = {}

    def watch(linear: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple) -> None:
            inputs.setdefault(linear, []).append(args[0])

        return hook

    handles = [block.get_submodule(x).register_forward_pre_hook(watch(x)) for x in linears]
    try:
        stream.advance(name, block)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def groups_that_share(inputs: dict[str, list[Tensor]]) -> list[list[str]]:
    """Return the linears in groups that read one tensor, in the order of the calls."""
    groups: dict[int, list[str]] = {}
    for linear, tensors in inputs.items():
        groups.setdefault(id(tensors[0]), []).append(linear)
    return list(groups.values())


def mean_weights(weights: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return the mean over linears of each batch's token weights, each linear's summing to one."""
    totals = [sum(float(batch.sum()) for batch in batches) for batches in weights]
    return [
        sum(batch / max(total, 1e-30) for batch, total in zip(batches, totals, strict=True))
        for batches in zip(*weights, strict=True)
    ]


def input_statistics(
    stream: Stream,
    name: str,
    block: nn.Module,
    linear: str,
    dense_inputs: list[Tensor],
    weights: list[Tensor] | None = None,
) -> InputStatistics:
    """Return the statistics of a linear's inputs in the block as it is now.

    Raises:
        ValueError: If one is not finite.
    """
    module = block.get_submodule(linear)
    width = dense_inputs[0].shape[-1]
    hessian = torch.zeros(width, width, device=dense_inputs[0].device)
    drift = torch.zeros_like(hessian)
    total = 0.0
    for batch, dense in enumerate(dense_inputs):
        x = input_of(module, lambda batch=batch: stream.run(name, block, batch)).flatten(0, -2)
        change = dense.flatten(0, -2) - x
        if weights is not None:
            root = weights[batch].flatten().sqrt().unsqueeze(1)  # (B*T, 1)
            x, change = x * root, change * root
            total += float(root.square().sum())
        else:
            total += len(x)
        add_gram(hessian, x.float())
        # A difference bears the compute dtype: what its product rounds away is small beside H.
        drift += change.to(dense.dtype).T @ x.to(dense.dtype)
    if not (torch.isfinite(hessian).all() and torch.isfinite(drift).all()):
        raise ValueError(
            f"{name}.{linear}: inputs hold NaN or infinity during calibration; try --dtype fp32"
        )
    hessian = hessian.triu() + hessian.triu(1).T
    return InputStatistics(hessian=hessian / total, drift=drift / total)


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x, (I, I), to a total, of which only the upper triangle is kept up to date."""
    for first in range(0, x.shape[1], GRAM_PANEL):
        panel = slice(first, first + GRAM_PANEL)
        total[panel, first:].addmm_(x[:, panel].T, x[:, first:])
