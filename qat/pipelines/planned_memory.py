"""The most memory that each command holds, predicted from config, plan and settings alone.

Numbers of a model: W in quantized weights, P in their scales and codebooks, D in what stays dense,
F in the file of the student (bytes); w the largest weight, e the largest that stays dense, l the
largest decoder layer. d bytes of the compute dtype, n = B T tokens of a micro-batch, V vocabulary,
H hidden size, N processes. All bytes are of one process:

    student      W + 4 P + d D          indices are bytes, scales float32
    held         d W                    weights formed once, where they fit 0.3 of the memory, else
                                        d w
    logits       5 * 4 * min(n, 256) V  of a chunk of positions: both sides, their exponents, and a
                                        gradient
    activations  d n (4 H + 2 q + 2 k + 4 I) a decoder layer, q and k the widths of queries and
                                        keys, I of the feed-forward part: what its norms, products
                                        and attention keep for the backward pass. With gradient
                                        checkpointing d n H, and one layer's as above

    quantize     F + max(layer: d l, fit: 20 * 4 w, dense: 12 e as it is read and made smaller)
    evaluate     student + held + logits
    build-cache  d (W + D) + 4 V of each of 1024 tokens
    train        M, L, S of W and P are in layers that train, move, and are parts of the first:
                 4 L + (W - L) + 2 (M - L) + 4 P + d D + d W held + 8 (L + S) of AdamW
                   + max(step: d M gradients + activations + logits; state: 22 (L + S), 12 of
                   them a copy of what is saved, the others while it is written, and F in the end).
                   With averages in 8 bits 2 in the place of 8 for AdamW, of the copy too.
                   With weights formed in use d (W + M) are of one decoder layer and of what is
                   outside of them, and 4 S of gradients are beside them; or, where they fit, all
                   W held by an evaluation while the best student, F, is written
    pretrain     (16 + d) (W + D)       weights, gradients, AdamW in float32, and as products read
                                        them; + activations + logits; of every process
    layer-wise   W + 4 P + d D, what is outside decoder layers held, and of one layer 16 + 2 d bytes
                 a weight (latent, gradient, AdamW; held, and that one's gradient) and its
                 activations; or evaluate. Before steps latent weights stay as well: train.
                 Files of hidden states are not counted

Of `--shard` over N processes each has 1/N of latent weights, gradients, AdamW and state; held
weights are float32 rows, 4 W / N, and one decoder layer's, d l, gathered.

Libraries take 50 MB of scratch in all of them, a fit's 30 more. On a CPU the process itself comes
on top: Python, torch and transformers, 435 MB, 85 more for a fit. The 5, 12, 20 and 22, scratch
and process were measured on Llamas of 5 to 75 M weights (x86, torch 2.13, float32); other kinds of
feed-forward parts and attention keep other activations. On a GPU nothing was measured.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import nn

from qat.evaluate.on_cache import HELD_SHARE
from qat.pipelines.place import Place
from qat.quant.plan import QuantPlan, TensorKind, tensor_kind

GIB = 2**30
PROCESS_BYTES, FIT_LIBRARIES_BYTES = 435e6, 85e6  # on a CPU
SCRATCH_BYTES, FIT_SCRATCH_BYTES = 50e6, 30e6
DENSE_BYTES = 12  # of a number that stays dense: file, float32, smaller, and what compares them
FIT_COPIES = 20  # of the largest weight in float32 while it is fitted
LOGIT_COPIES = 5  # of a chunk of logits: student, teacher, exponents, gradient
CHUNK_TOKENS = 256
CACHE_TOKENS = 1024  # that the teacher reads at once on a CPU
ADAM_BYTES = 8  # two float32 numbers for each that trains
ADAM_8BIT_BYTES = 2 * (1 + 4 / 256)  # a code each, and a scale of a block
BLOCK_BYTES = 16  # of a number of the decoder layer that trains alone: latent, gradient, AdamW
STATE_BYTES = 10  # of a number that trains while its state is written, but for the copy of that
KV_BYTES = 2  # of a number in the KV cache of a runtime, float16


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """Numbers that the memory of a model in a plan follows from."""

    quantized: int
    """Weights on grids, W."""
    trained: int
    """Those of layers that train, M."""
    latent: int
    """Those that move, L: M, or 0 where scales alone train."""
    trained_parts: int
    """Scales and codebooks of layers that train, S."""
    parts: int
    """Scales and codebooks, P."""
    dense: int
    """Numbers that stay dense, D."""
    file_bytes: int
    """Of the student, F."""
    largest: int
    """Numbers of the largest quantized weight, w."""
    largest_dense: int
    """Numbers of the largest tensor that stays dense, e."""
    layer: int
    """Numbers of the largest decoder layer, l."""
    num_layers: int
    linears: int
    """Weights that each token is multiplied by, but for the head's."""
    queries: int
    """Width of all queries of a token, q."""
    kept: int
    """Numbers that a decoder layer keeps of each token for the backward pass."""
    hidden: int
    vocab: int
    kv: int
    """Numbers of a token in the KV cache of all layers."""
    context: int
    """Tokens that the model is made for."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        plan: QuantPlan,
        *,
        kinds: Collection[TensorKind] | None = None,
        moves_weights: bool = True,
    ) -> "ModelSizes":
        """Return the sizes of a model, which may be on the meta device, in a plan.

        Args:
            model: Full-precision causal LM.
            plan: Its formats.
            kinds: Of the layers that train, as `tensor_kind` names them; None = all.
            moves_weights: Whether weights train in them, or scales alone.
        """
        config = model.config.get_text_config()
        specs = plan.quantized
        shapes = {name: plan.shapes[f"{name}.weight"] for name in specs}
        parts = {
            name: sum(map(math.prod, spec.part_shapes(shapes[name]).values()))
            for name, spec in specs.items()
        }
        weights = {name: math.prod(shape) for name, shape in shapes.items()}
        dense = [plan.shapes[name] for name, spec in plan.specs.items() if not spec.is_quantized]
        chosen = [name for name in specs if kinds is None or tensor_kind(name) in kinds]
        trained = sum(weights[name] for name in chosen)
        layers = list(model.get_decoder().layers)
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        queries, keys = width * config.num_attention_heads, width * kv_heads
        return cls(
            quantized=sum(weights.values()),
            trained=trained,
            latent=trained if moves_weights else 0,
            trained_parts=sum(parts[name] for name in chosen),
            parts=sum(parts.values()),
            dense=plan.num_weights - sum(weights.values()),
            file_bytes=plan.file_bytes,
            largest=max(weights.values(), default=0),
            largest_dense=max(map(math.prod, dense), default=0),
            layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            num_layers=len(layers),
            linears=sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2),
            queries=queries,
            kept=4 * config.hidden_size + 2 * queries + 2 * keys + 4 * config.intermediate_size,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            kv=2 * keys * len(layers),
            context=getattr(config, "max_position_embeddings", 0) or 0,
        )

    @property
    def kv_cache_bytes(self) -> int:
        """Return the bytes of the KV cache of one sequence of the model's full length."""
        return KV_BYTES * self.kv * self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """Where and how a command runs."""

    dtype: torch.dtype
    batch_size: int
    """Sequences of a micro-batch, of all processes."""
    seq_len: int
    num_processes: int = 1
    is_split: bool = False
    """Whether processes hold some rows of each weight (--shard)."""
    recomputes: bool = False
    """Gradient checkpointing."""
    total_bytes: int | None = None
    """Of the device."""
    has_process: bool = True
    """Whether the process itself is in the device's memory, as on a CPU."""
    adam_bytes: float = ADAM_BYTES
    """Of a number that trains, in AdamW."""
    forms_in_use: bool = False
    """Whether decoder layers form their weights as they run."""
    keeps_states: bool = True
    """Whether states to resume from are copied to the same memory, as on a CPU."""

    @classmethod
    def on(cls, place: Place, **settings: int) -> "Situation":
        """Return the situation of one process on a device; `settings` are other fields."""
        is_host = place.device.shares_host_memory
        known = {"has_process": is_host, "keeps_states": is_host}
        total = place.device.total_bytes()
        return cls(dtype=place.dtype, total_bytes=total, **{**known, **settings})

    @property
    def tokens(self) -> int:
        """Return the tokens of a micro-batch that one process reads."""
        return -(-self.batch_size // self.num_processes) * self.seq_len

    @property
    def state_bytes(self) -> float:
        """Return the bytes that saving a state takes for each number that trains."""
        return 4 + self.adam_bytes + STATE_BYTES if self.keeps_states else 0.0


def predict_memory(sizes: ModelSizes, there: Situation) -> dict[str, int]:
    """Return the peak bytes of one process of each command."""
    counts = {
        "quantize": quantize_bytes(sizes, there) + FIT_LIBRARIES_BYTES * there.has_process,
        "build-cache": cache_bytes(sizes, there),
        "train": training_bytes(sizes, there),
        "train, 8-bit averages": training_bytes(sizes, replace(there, adam_bytes=ADAM_8BIT_BYTES)),
        "train scales, formed in use": training_bytes(
            replace(sizes, latent=0), replace(there, forms_in_use=True, recomputes=True)
        ),
        "pretrain": pretraining_bytes(sizes, there),
        "layer-wise": layerwise_bytes(sizes, there),
        "evaluate": evaluation_bytes(sizes, there),
    }
    rest = SCRATCH_BYTES + PROCESS_BYTES * there.has_process
    return {mode: round(count + rest) for mode, count in counts.items()}


def quantize_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what `qat init-student --fit moments --no-eval` holds."""
    return sizes.file_bytes + max(
        4 * FIT_COPIES * sizes.largest, there.dtype.itemsize * sizes.layer
    )


def evaluation_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what `qat evaluate` of a student holds."""
    return student_bytes(sizes, there) + held_bytes(sizes, there) + logit_bytes(sizes, there)


def cache_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what `qat build-cache` with the full-precision model holds."""
    teacher = there.dtype.itemsize * (sizes.quantized + sizes.dense)
    return teacher + 4 * CACHE_TOKENS * sizes.vocab


def training_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what `qat train` end to end holds of the model, of what trains and of a step."""
    width, share = there.dtype.itemsize, there.num_processes if there.is_split else 1
    moved = sizes.latent + sizes.trained_parts
    looked_up = 2 * (sizes.trained - sizes.latent)  # grid values in float16
    held, gradients = width * sizes.quantized, width * sizes.trained
    if there.is_split:
        held = 4 * sizes.quantized / share + width * sizes.layer
        gradients = 4 * sizes.trained / share + width * sizes.layer
    if there.forms_in_use:
        outer = max(0, sizes.quantized - sizes.linears)
        looked_up, held = 2 * outer, width * (outer + sizes.layer)
        gradients = held + 4 * sizes.trained_parts
    model = (indices_bytes(sizes) + looked_up) / share + 4 * sizes.parts + width * sizes.dense
    step = gradients + activation_bytes(sizes, there) + logit_bytes(sizes, there)
    if there.forms_in_use:  # an evaluation holds all where there is room, as the best is written
        all_held = held_bytes(sizes, there) - held
        step = max(step, all_held + logit_bytes(sizes, there) + sizes.file_bytes)
    state = there.state_bytes * moved / share + sizes.file_bytes  # the last one, and the student
    return model + held + there.adam_bytes * moved / share + max(step, state)


def pretraining_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what `qat pretrain` holds of the model, of AdamW and of a step.

    Split by rows, as on the chips of one XLA process, it gathers a decoder layer at a time.
    """
    count, share = sizes.quantized + sizes.dense, there.num_processes if there.is_split else 1
    read = there.dtype.itemsize if there.dtype != torch.float32 else 0
    gathered = there.dtype.itemsize * sizes.layer if there.is_split else 0
    gradients = (4 + read) * count / share + gathered
    step = gradients + activation_bytes(sizes, there) + logit_bytes(sizes, there)
    state = there.state_bytes * count / share
    return (4 + there.adam_bytes) * count / share + max(step, state)


def layerwise_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what the stage `--layerwise.sequences` of `qat train` holds, alone (--max-steps 0)."""
    width = there.dtype.itemsize
    outer = width * max(0, sizes.quantized - sizes.linears)
    one = (BLOCK_BYTES + 2 * width) * sizes.layer
    one += activation_bytes(sizes, there) / sizes.num_layers
    stage = student_bytes(sizes, there) + outer + one
    return max(stage, evaluation_bytes(sizes, there))


def indices_bytes(sizes: ModelSizes) -> int:
    """Return what latent weights take, and the indices of weights that do not move."""
    return 4 * sizes.latent + sizes.quantized - sizes.latent


def student_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what a student holds whose indices do not move."""
    return sizes.quantized + 4 * sizes.parts + there.dtype.itemsize * sizes.dense


def held_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what weights take that are formed once, or else one at a time."""
    whole = there.dtype.itemsize * sizes.quantized
    has_room = there.total_bytes is None or whole <= HELD_SHARE * there.total_bytes
    return whole if has_room else there.dtype.itemsize * sizes.largest


def logit_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what a chunk of logits takes on its way to a loss and back."""
    return 4 * LOGIT_COPIES * min(there.tokens, CHUNK_TOKENS) * sizes.vocab


def activation_bytes(sizes: ModelSizes, there: Situation) -> float:
    """Return what the decoder layers keep for the backward pass."""
    numbers = sizes.num_layers * sizes.kept
    if there.recomputes:
        numbers = sizes.num_layers * sizes.hidden + sizes.kept
    return there.dtype.itemsize * there.tokens * numbers
