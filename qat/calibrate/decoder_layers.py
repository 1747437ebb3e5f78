"""One walk through a model, decoder layer by decoder layer, in the order of its forward pass.

It stops before each linear whose turn it is, so that its statistics come from the inputs that the
layers fitted before it really feed.

Shape legend: B batch, T tokens, D hidden size.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat.calibrate.residual import ResidualWrite, first_input, residual_writes
from qat.calibrate.statistics import (
    Batch,
    Fed,
    InputStatistics,
    input_statistics,
    second_moment,
)
from qat.model.head import Tokens, hidden_states
from qat.model.layered import NeedsWhole

SAMPLED_TOKENS = 2**14  # of a head's inputs
NORM_EPS = 1e-6  # as norms have it: a token whose stream is next to nothing rules no fit
LayerArguments = dict[str, dict[str, Any]]  # of a forward pass: by layer name, then by keyword


@dataclass(slots=True)
class Stream:
    """Hidden states of every batch before a decoder layer, and what else layers are called with."""

    hidden: list[Tensor]  # (B, T, D) each
    arguments: list[LayerArguments]  # of each batch

    def run(self, name: str, layer: nn.Module, batch: int) -> Tensor:
        """Return the hidden states after a layer."""
        return hidden_of(layer(self.hidden[batch], **self.arguments[batch][name]))

    def advance(self, name: str, layer: nn.Module) -> None:
        """Go past a layer."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run(name, layer, batch)


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
    stream: Stream | None = None,
    opened: Callable[[str], AbstractContextManager[None]] = lambda _name: nullcontext(),
) -> Iterator[tuple[list[str], InputStatistics]]:
    """Yield linears that share an input, with its statistics, in the order of the forward pass.

    The caller puts fitted layers in their place before it asks for more; what comes later is fed by
    them. Only one decoder layer's inputs are held at a time.

    Args:
        model: Causal LM in eval mode that turns into the quantized one.
        names: The linears to fit.
        batches: Token ids, (B, T) each, on the model's device; `Tokens` where documents are packed.
        head: Name under which the inputs of the head are yielded last; None = not at all.
        reference: The full-precision model; the model itself as it comes when not given.
        stream: What `open_stream` returns, of a model whose values are not all in memory.
        opened: Gives a decoder layer, or the norm after them, its values inside a block.

    Raises:
        ValueError: If there is no batch, a statistic is not finite, or the model's decoder layers
            do not simply follow each other.
    """
    if not batches:
        raise ValueError("calibration has no tokens; give a cache with at least one sequence")
    linears = linears_by_layer(names)
    last = list(linears)[-1] if head is None else last_decoder_layer(model)
    stream = stream or open_stream(model, batches, last)
    dense = stream if reference is None else open_stream(reference, batches, last)
    dense = Stream(list(dense.hidden), dense.arguments)
    for name in stream.arguments[0]:
        with opened(name):
            layer = model.get_submodule(name)
            own = copy.deepcopy(layer) if reference is None else reference.get_submodule(name)
            yield from walk_one(name, (layer, own), linears.get(name, []), stream, dense)
            del own  # not held while the next layer's is made, or the head is fitted
    if head is not None:
        norm, dense_norm = (one.get_decoder().norm for one in (model, reference or model))
        with opened(next(name for name, module in model.named_modules() if module is norm)):
            pairs = list(zip(stream.hidden, dense.hidden, strict=True))
            statistics = input_statistics(head, (Fed(norm(x), dense_norm(y)) for x, y in pairs))
            some = [
                (norm(x).flatten(0, -2), dense_norm(y).flatten(0, -2)) for x, y in sampled(pairs)
            ]
            sample = Fed(*map(torch.cat, zip(*some, strict=True)))
            yield [head], replace(statistics, sample=sample)


def sampled(pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
    """Return batches, spread over all, of not many more than `SAMPLED_TOKENS`."""
    count = sum(own.shape[:-1].numel() for own, _ in pairs)
    return pairs[:: max(1, count // SAMPLED_TOKENS)]


def walk_one(
    name: str,
    layers: tuple[nn.Module, nn.Module],
    wanted: Sequence[str],
    stream: Stream,
    dense: Stream,
) -> Iterator[tuple[list[str], InputStatistics]]:
    """Yield what `walk_decoder_layers` does of one layer, given with its full-precision form.

    Both streams go past it.
    """
    layer, dense_layer = layers
    writes = residual_writes(*in_float32(dense_layer, wanted, dense, name))
    points = {write.after for write in writes.values()} - {""}
    watched = watch_inputs(dense, name, dense_layer, [*wanted, *points])
    inputs = inputs_in_order(name, wanted, watched)
    with ExitStack() as replays:
        done: list[Replay] = []
        for group in groups_that_share(inputs):
            shared = [f"{name}.{linear}" for linear in group]
            write = writes.get(group[0]) if len(group) == 1 else None
            turn = Turn(stream, name, layer, group[0], write)
            ends = watched[write.after] if write and write.after else dense.hidden
            fed = turn.feed(inputs[group[0]], ends, done)
            yield shared, input_statistics(shared[0], fed)
            for linear in group:
                del inputs[linear], watched[linear]
            for module in finished_modules(group, inputs):
                done.append(replays.enter_context(Replay(layer.get_submodule(module))))
        rewind(done)
        stream.advance(name, layer)


@torch.no_grad()
def walk_dense_layers(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    *,
    head: str | None = None,
    token_weights: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield linears that share an input, with its second moment, (I, I); the model stays as it is.

    Args:
        model: Causal LM in eval mode.
        names: The linears, all of numbered decoder layers.
        batches: As in `walk_decoder_layers`, like head.
        head: Name under which the inputs of the head are yielded last.
        token_weights: How much each token of all batches counts, (N,), by linear; those that share
            an input count together. All alike when not given.
    """
    linears = linears_by_layer(names)
    last = list(linears)[-1] if head is None else last_decoder_layer(model)
    stream = open_stream(model, batches, last)
    for name in stream.arguments[0]:
        inputs = watch_inputs(stream, name, model.get_submodule(name), linears.get(name, []))
        for group in groups_that_share(inputs):
            shared = [f"{name}.{linear}" for linear in group]
            weights = None if token_weights is None else sum(token_weights[n] for n in shared)
            yield shared, second_moment(shared[0], inputs[group[0]], weights)
            for linear in group:
                del inputs[linear]
    if head is not None:
        yield [head], second_moment(head, map(model.get_decoder().norm, stream.hidden))


def inputs_in_order(
    name: str, linears: Sequence[str], watched: Mapping[str, list[Tensor]]
) -> dict[str, list[Tensor]]:
    """Return what the linears of a decoder layer were fed, in the order of their calls."""
    inputs = {linear: fed for linear, fed in watched.items() if linear in linears}
    if missing := [linear for linear in linears if linear not in inputs]:
        raise ValueError(
            f"{name}.{missing[0]} takes no part in the forward pass; keep it as it is with "
            f"--plan '..., {name}.{missing[0]}=f16'"
        )
    return inputs


def in_float32(
    layer: nn.Module, linears: Sequence[str], stream: Stream, name: str
) -> tuple[nn.Module, Sequence[str], Callable[[], Tensor]]:
    """Return what `residual_writes` takes: a layer that computes in float32 on the first batch."""
    copied = copy.deepcopy(layer).float()
    hidden = stream.hidden[0].float()
    arguments = {
        key: tree_map(lambda x: x.float() if is_float(x) else x, value)
        for key, value in stream.arguments[0][name].items()
    }
    return copied, linears, lambda: hidden_of(copied(hidden, **arguments))


def is_float(value: object) -> bool:
    """Return whether a value is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()


class Replay(AbstractContextManager):
    """Inside the block, a module computes in its first pass over the batches only.

    Each group of a decoder layer takes a pass of its own, all that precede it over again: what
    their linears give is kept, so that each is computed once.
    """

    def __init__(self, module: nn.Module):
        """Take over the calls of a module."""
        self.module = module
        self.compute = module.forward
        self.outputs: list[object] = []
        self.num_calls = 0  # of this pass
        self.own = module.__dict__.get("forward")  # set on the module itself, by a hook library
        module.forward = self.forward

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return what the same call of the first pass gave."""
        if self.num_calls == len(self.outputs):
            output = self.compute(*args, **kwargs)
            if isinstance(output, tuple):  # attention's probabilities are not looked at
                output = (output[0], *[None] * (len(output) - 1))
            self.outputs.append(output)
        self.num_calls += 1
        return self.outputs[self.num_calls - 1]

    def __exit__(self, *error: object) -> None:
        """Give the module its own forward back, and drop what was kept."""
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own
        self.outputs.clear()


def finished_modules(group: Sequence[str], coming: Iterable[str]) -> list[str]:
    """Return what of a decoder layer computes the same from now on, by name.

    The linears fitted last, or the module that they are in (attention) where none of its linears is
    to come.
    """
    parents = {linear.rpartition(".")[0] for linear in group} - {""}
    whole = [one for one in parents if not any(name.startswith(f"{one}.") for name in coming)]
    return whole or list(group)


def rewind(replays: Iterable[Replay]) -> None:
    """Begin a pass."""
    for replay in replays:
        replay.num_calls = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A linear whose inputs are looked at."""

    stream: Stream
    name: str  # of its decoder layer
    layer: nn.Module
    linear: str  # in the layer
    write: ResidualWrite | None

    def feed(
        self, dense: Sequence[Tensor], ends: Sequence[Tensor], replays: Iterable[Replay]
    ) -> Iterator[Fed]:
        """Yield what it is fed in each batch.

        Where it writes into the residual stream, it is asked for all that takes the stream of the
        quantized model to that of the dense one. What it does not reach counts relative to the
        stream's size at that token, as the norms that follow make it.

        Args:
            dense: What the dense layer's linear is fed, (B, T, I) each.
            ends: The dense stream after it, (B, T, D) each; looked at if it writes there.
            replays: Of what comes before it.
        """
        rewind(replays)
        module, write = self.layer.get_submodule(self.linear), self.write
        for batch, (expected, end) in enumerate(zip(dense, ends, strict=True)):
            with inputs_kept(self.layer, write and write.before) as kept:
                x = input_of(module, self.stream.run, self.name, self.layer, batch)
            if write is None:
                yield Fed(x, dense=expected)
                continue
            wanted = (end - kept[0]) / write.multiplier
            if module.bias is not None:
                wanted = wanted - module.bias
            size = end.float().square().mean(-1, keepdim=True)
            yield Fed(x, wanted=wanted, weights=(size + NORM_EPS).reciprocal())


@contextmanager
def inputs_kept(layer: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """Inside the block, keep the inputs of a layer's module in a list; of none without a name."""
    kept: list[Tensor] = []
    if name is None:
        yield kept
        return
    hook = layer.get_submodule(name).register_forward_pre_hook(
        lambda _module, args, kwargs: kept.append(first_input(args, kwargs)), with_kwargs=True
    )
    try:
        yield kept
    finally:
        hook.remove()


def hidden_of(output: Tensor | tuple) -> Tensor:
    """Return the hidden states in a decoder layer's output."""
    return output[0] if isinstance(output, tuple) else output


def last_decoder_layer(model: nn.Module) -> str:
    """Return the name of a model's last decoder layer."""
    last = model.get_decoder().layers[-1]
    return next(name for name, module in model.named_modules() if module is last)


def linears_by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the linears of each decoder layer (`layers.3`, say) by their names in it."""
    layers: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r"(.*?\.\d+)\.(.+)", name)
        if match is None:
            raise ValueError(
                f"{name} is in no numbered decoder layer; fit this model with --fit moments"
            )
        layers.setdefault(match[1], []).append(match[2])
    return layers


def open_stream(model: nn.Module, batches: Sequence[Batch], last: str) -> Stream:
    """Return the hidden states before the first decoder layer, and each layer's other arguments.

    Layers up to `last` are seen. Where each sequence is one document, what layers get in addition
    to hidden states (positions, masks) has no batch axis of its own: one sequence's serves all.

    Raises:
        ValueError: If the model does more between decoder layers than pass hidden states on.
    """
    prefix = re.match(r"(.*\.)\d+$", last)[1]
    names = [f"{prefix}{index}" for index in range(int(last.removeprefix(prefix)) + 1)]
    hidden, arguments, shared = [], [], {}
    try:
        for batch in map(Tokens.of, batches):
            read, calls = layer_calls(model, batch)
            hidden.append(read)
            if batch.document_ids is None:
                length = batch.token_ids.shape[1]
                if length not in shared:
                    shared[length] = layer_calls(model, Tokens(batch.token_ids[:1]))[1]
                calls = shared[length]
            arguments.append(dict(zip(names, calls, strict=False)))
    except NeedsWhole as why:
        raise ValueError(f"{why}; fit it with --fit moments") from why
    return Stream(hidden, arguments)


def around_layers(model: nn.Module) -> list[nn.Module]:
    """Return what of a model's decoder is in no decoder layer: embedding, norm, positions."""
    decoder = model.get_decoder()
    return [child for child in decoder.children() if child is not decoder.layers]


@torch.no_grad()
def layer_calls(model: nn.Module, batch: Tokens) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return what the first decoder layer reads, (B, T, D), and each one's keyword arguments.

    They follow from a batch alone: the model runs without its layers, each of which hands on what
    it gets.

    Raises:
        NeedsWhole: If the model does more between decoder layers than pass hidden states on.
    """
    read: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def hand_on(hidden_states: Tensor, **kwargs: object) -> Tensor:
        read.append(hidden_states)
        calls.append(kwargs)
        return hidden_states

    layers = model.get_decoder().layers
    own = [layer.__dict__.get("forward") for layer in layers]  # set by a hook library
    for layer in layers:
        layer.forward = hand_on
    try:
        hidden_states(model, *batch)
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    if len(calls) != len(layers) or any(one is not read[0] for one in read):
        raise NeedsWhole(
            f"{type(model).__name__} does more between decoder layers than pass hidden states on"
        )
    return read[0], calls


def input_of(module: nn.Module, call: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return the first input of a module in a call, which stops there."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise StopForward

    with module.register_forward_pre_hook(hook, with_kwargs=True), suppress(StopForward):
        call(*arguments)
    return found[0]


def watch_inputs(
    stream: Stream, name: str, layer: nn.Module, linears: Sequence[str]
) -> dict[str, list[Tensor]]:
    """Go past a layer and return each linear's inputs of every batch, in the order of the calls."""
    inputs: dict[str, list[Tensor]] = {}

    def watch(linear: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs.setdefault(linear, []).append(first_input(args, kwargs))

        return hook

    with ExitStack() as hooks:
        for linear in linears:
            module = layer.get_submodule(linear)
            hook = module.register_forward_pre_hook(watch(linear), with_kwargs=True)
            hooks.enter_context(hook)
        stream.advance(name, layer)
    return inputs


def groups_that_share(inputs: dict[str, list[Tensor]]) -> list[list[str]]:
    """Return the linears in groups that read one tensor, in the order of the calls."""
    groups: dict[int, list[str]] = {}
    for linear, tensors in inputs.items():
        groups.setdefault(id(tensors[0]), []).append(linear)
    return list(groups.values())
