"""Weights of a model fitted to formats and put in place, alone or fed by those fitted before.

The decoder layers come first, in the order of the forward pass; embedding and head last, against
what the quantized body makes of the text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qat.calibrate.decoder_layers import walk_decoder_layers
from qat.calibrate.statistics import Batch, InputStatistics
from qat.calibrate.token_groups import TokenGroups, group_tokens
from qat.model.head import logits_of
from qat.model.surgery import put_layer, quantized_layer, release_weights
from qat.quant.drift import (
    Correction,
    Moments,
    WantedWeight,
    choose_corrections,
    wanted_weight,
)
from qat.quant.fit import check_weight, fit_weight
from qat.quant.hessian import NUM_SWEEPS, fit_with_hessian
from qat.quant.output_feedback import fit_in_turns
from qat.quant.quantized_tensor import QuantizedTensor
from qat.quant.spec import TensorSpec
from qat.runtime.distributed import total_of

WeightOf = Callable[[str], Tensor]
GramsByName = Mapping[str, Sequence[Tensor]]
NUMBERED = re.compile(r"\.\d+\.")  # the name of a module inside a decoder layer
WalkLayers = Callable[..., Iterator[tuple[list[str], InputStatistics]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputGrams:
    """Second moments of the gradients that a text's drawn labels give: G = mean g g^T."""

    runs: GramsByName = field(default_factory=dict)
    """Of runs of a linear's outputs, (R, R) each, by its name; rows of others are taken for
    unrelated."""
    embedding: Tensor | None = None
    """Of the rows that the embedding reads, (I, I): a tied one is fitted to serve both its uses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitTask:
    """What is fitted to what."""

    specs: Mapping[str, TensorSpec]
    """Of each weight to fit, by the name of its module."""
    weight_of: WeightOf
    """Returns the full-precision weight, (O, I), of a module's name."""
    row_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """How much each row counts for a learned codebook, (O,), by module name: token frequencies of
    an embedding. Rows of modules that are not named count alike."""
    num_sweeps: int = NUM_SWEEPS
    """Of a fit against H."""
    grams: OutputGrams = field(default_factory=OutputGrams)

    def check(self) -> None:
        """Refuse weights that a format cannot hold, naming the module, before any long work."""
        for name, spec in self.specs.items():
            try:
                check_weight(self.weight_of(name), spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def fit(self, name: str, importance: Tensor | None = None) -> QuantizedTensor:
        """Return a weight fitted by second moments of its inputs; errors name its module."""
        weight, spec, rows = self.weight_of(name), self.specs[name], self.row_weights.get(name)
        try:
            return fit_weight(weight, spec, importance=importance, row_weights=rows)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def fit_against(
        self,
        names: Sequence[str],
        moments: Moments,
        corrections: Mapping[str, Correction],
        kept: Tensor | None = None,
    ) -> dict[str, QuantizedTensor]:
        """Return weights of one format that read the same inputs, fitted against all of H.

        They are rows of one weight: a step over columns takes hardly longer for twice the rows.
        `kept` is the second moment K that errors of an embedding count by, see `qat.quant.drift`.
        """
        weights = [self.weight_of(name).to(moments.hessian.device) for name in names]
        wanted = [
            wanted_weight(weight, moments, corrections[name], kept)
            for name, weight in zip(names, weights, strict=True)
        ]

        hessian = moments.hessian if kept is None else moments.hessian + kept

        def targets() -> list[Tensor]:
            pairs = zip(weights, wanted, strict=True)
            return [w.float() if aim is None else aim[:] for w, aim in pairs]

        def fit(weight: Tensor, target: Tensor | WantedWeight | None) -> QuantizedTensor:
            return fit_with_hessian(
                weight,
                self.specs[names[0]],
                hessian,
                target=target,
                row_weights=self.row_weights.get(names[0]),
                num_sweeps=self.num_sweeps,
            )

        try:
            runs_of = self.grams.runs
            if all(name in runs_of and self.specs[name].has_own_rows for name in names):
                grams = [gram for name in names for gram in runs_of[name]]
                sizes = list(map(len, grams))
                runs = (torch.cat(rows).split(sizes) for rows in (weights, targets()))
                fitted = fit_in_turns(*runs, grams, fit)
            elif len(names) == 1:
                fitted = fit(weights[0], wanted[0])
            else:
                is_moved = any(aim is not None for aim in wanted)
                fitted = fit(torch.cat(weights), torch.cat(targets()) if is_moved else None)
        except ValueError as error:
            raise ValueError(f"{' and '.join(names)}: {error}") from error
        if len(names) == 1:  # of any format, also one whose parts have no rows
            return {names[0]: fitted}
        return dict(zip(names, fitted.split([len(weight) for weight in weights]), strict=True))

    def takes_groups(self, head: str) -> bool:
        """Return whether a head's rows are fitted in groups: where others are in turns."""
        return bool(self.grams.runs) and self.specs[head].has_own_rows

    def fit_in_groups(
        self,
        name: str,
        moments: Moments,
        correction: Correction,
        kept: Tensor | None,
        groups: TokenGroups,
    ) -> QuantizedTensor:
        """Return a head's weight, the rows of each group fitted against an H of their own."""
        weight, runs = self.weight_of(name).to(moments.hessian.device), []
        wanted = wanted_weight(weight, moments, correction, kept)
        for group, rows in enumerate(groups.groups):
            hessian = groups.hessian(group, moments.hessian)
            fitted = fit_with_hessian(
                weight[rows],
                self.specs[name],
                hessian if kept is None else hessian + kept,
                target=None if wanted is None else wanted[rows],
                num_sweeps=self.num_sweeps,
            )
            runs.append(fitted)
        return QuantizedTensor.join(runs).rows(torch.cat(groups.groups).argsort())

    def of_one_format(self, names: Sequence[str]) -> list[list[str]]:
        """Return names in groups whose weights may be fitted as one, in order."""
        groups: dict[object, list[str]] = {}
        for name in names:
            spec = self.specs[name]
            key = (spec, name in self.grams.runs) if spec.has_own_rows else name
            groups.setdefault(key, []).append(name)
        return list(groups.values())


@torch.no_grad()
def fit_with_moments(
    model: nn.Module, task: FitTask, importance: Mapping[str, Tensor] | None
) -> None:
    """Put fitted layers in the place of a model's, each by the second moments of its inputs."""
    with tqdm(total=len(task.specs), desc="fit", unit="layer") as progress:
        for name in task.specs:
            progress.set_postfix_str(name.removeprefix("model.layers."), refresh=False)
            quantized = task.fit(name, (importance or {}).get(name))
            put_layer(model, name, quantized_layer(model.get_submodule(name), quantized))
            progress.update()
    model.requires_grad_(False)


@torch.no_grad()
def fit_by_decoder_layers(
    model: nn.Module,
    task: FitTask,
    batches: Sequence[Batch],
    *,
    reference: nn.Module | None = None,
    dtype: torch.dtype,
    walk_layers: WalkLayers = walk_decoder_layers,
) -> None:
    """Put fitted layers in the place of a model's, in the order of its forward pass.

    Args:
        model: Causal LM; quantized layers that it has already hold their weights.
        task: What is fitted.
        batches: Token ids, (B, T) each, on the model's device.
        reference: The full-precision model; the model itself as it comes when not given.
        dtype: Compute dtype of the walk.
        walk_layers: `walk_decoder_layers`, or what is called as it.
    """
    progress = tqdm(total=len(task.specs), desc="fit", unit="layer")

    def put(name: str, quantized: QuantizedTensor) -> None:
        layer = quantized_layer(model.get_submodule(name), quantized)
        layer.held_weight = layer.fake_quantized_weight(dtype)
        put_layer(model, name, layer)
        progress.update()

    head = head_weight(model, task.specs)
    body = [name for name in task.specs if NUMBERED.search(name)]
    walk = walk_layers(model, body, batches, head=head, reference=reference)
    with closing(walk):
        for names, statistics in walk if body or head else ():
            weights = [task.weight_of(name) for name in names]
            found = choose_corrections(weights, statistics.halves)
            corrections = dict(zip(names, found, strict=True))
            moments, groups = statistics.all, None
            if names == [head] and task.takes_groups(head):
                groups = group_tokens(partial(logits_of, reference or model), statistics.sample)
            del statistics, weights  # halves of a wide layer's are gigabytes
            kept = embedding_moment(model, task, names, moments)
            for some in task.of_one_format(names):
                progress.set_postfix_str(some[0].removeprefix("model.layers."), refresh=False)
                if groups is None:
                    fitted = task.fit_against(some, moments, corrections, kept)
                else:
                    one = (moments, corrections[head], kept, groups)
                    fitted = {head: task.fit_in_groups(head, *one)}
                for name, quantized in fitted.items():
                    put(name, quantized)
    for name in task.specs:  # an untied embedding, whose inputs are tokens
        if name != head and name not in body:
            put(name, task.fit(name))
    progress.close()
    release_weights(model)
    model.requires_grad_(False)


def embedding_moment(
    model: nn.Module, task: FitTask, names: Sequence[str], moments: Moments
) -> Tensor | None:
    """Return what else errors count by, (I, I), where the weight is a tied embedding's."""
    gram = task.grams.embedding
    if gram is None or [model.get_submodule(n) for n in names] != [model.get_input_embeddings()]:
        return None
    return gram.to(moments.hessian)


def head_weight(model: nn.Module, specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the module whose weight makes the logits, if it is to be fitted."""
    head, names = model.get_output_embeddings(), {m: n for n, m in model.named_modules()}
    if names.get(head) in specs:
        return names[head]
    embedding = model.get_input_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is getattr(
        embedding, "weight", None
    )
    tied = getattr(head, "tied", (None,))[0]
    name = names.get(embedding)
    return name if name in specs and (is_tied or tied is embedding) else None


def token_frequencies(batches: Sequence[Tensor], vocab_size: int) -> Tensor:
    """Return how often each token occurs, (V,), no token less than half a time.

    A token that the text lacks may come later. Of several processes, in the batches of all.
    """
    ids = torch.cat([batch.flatten() for batch in batches])
    return total_of(torch.bincount(ids, minlength=vocab_size)).cpu().float().clamp_min(0.5)
