"""Settings of a training run; `qat train` makes its flags of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qat.runtime.config import PlaceConfig, require_at_least, require_at_most, require_seed
from qat.storage.addresses import TAKES_ADDRESS

MOST_SEQUENCES = 2**16  # of a micro-batch, and micro-batches of a step, which are read before it
KINDS = {
    "body": ("mlp", "attention", "other"),
    "embedding": ("embedding", "head"),
    "all": ("mlp", "attention", "other", "embedding", "head"),
}
Layers = Literal["mlp", "attention", "embedding", "body", "all"]
Part = Literal["auto", "weights", "scales", "directions", "magnitudes", "codebooks", "norms"]
Compile = Literal["auto", "on", "off"]
Averages = Literal["8bit"]
FormWeights = Literal["once", "in-use"]
Divergence = Literal[
    "forward-kl",
    "reverse-kl",
    "jensen-shannon",
    "skewed-kl",
    "confidence-kl",
    "kd",
    "cross-entropy",
]
KD_TEMPERATURE = 2.0  # the usual one of the loss kd


@dataclass(frozen=True, kw_only=True, slots=True)
class RateConfig:
    """Learning rate, its schedule, and what a step does to gradients."""

    lr: float = 2e-4
    """Peak learning rate of latent weights. After a quick fit (--fit moments) 4e-4 gets further in
    few steps; after the default fit it would undo what error feedback found."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: fall along a cosine, stay, or stay and fall in the last fifth."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps, in place of --optim.warmup-steps."""
    min_lr_ratio: float = 0.1
    """Rate at the end over the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of latent weights."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    averages: Averages | None = None
    """How AdamW keeps its averages of gradients and of their squares: in float32 when not given.
    8bit: 2 bytes for each number that trains in the place of 8, by torchao; not with --shard."""
    ema_decay: float = 0.0
    """Measure and keep a moving average of what trains, of this decay; 0 = none."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """When the loss is not finite or jumps: stop, or go back to the last state at half the rate."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(0, self, "warmup_steps", "weight_decay", "clip_grad_norm", group="optim")
        if self.lr <= 0:
            raise ValueError(f"--optim.lr {self.lr} must be above 0; try 2e-4")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"--optim.min-lr-ratio {self.min_lr_ratio} must be within 0 and 1")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"--optim.warmup-ratio {self.warmup_ratio} must be within 0 and 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--optim.ema-decay {self.ema_decay} must be within 0 and 1; try 0.99")

    def warmup_of(self, max_steps: int) -> int:
        """Return the steps of warm-up of a run of so many."""
        if self.warmup_ratio is None:
            return self.warmup_steps
        return round(self.warmup_ratio * max_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(RateConfig):
    """Optimizer, learning rates and their schedule."""

    relative: bool = False
    """Rates are shares: of latent weights, of the size (rms) of their rounding errors at the start;
    of all else, of its own size. One rate then suits tensors of all formats, such as 0.005
    with --optim.scale-lr-ratio 0.1."""
    scale_lr_ratio: float = 1.0
    """Rate of scales and magnitudes over --optim.lr."""
    codebook_lr_ratio: float = 1.0
    """Rate of codebooks over --optim.lr."""
    norm_lr_ratio: float = 1.0
    """Rate of norms over --optim.lr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Distance from the teacher that training lowers."""

    divergence: Divergence = "forward-kl"
    """Divergence from the teacher; kd is that of older runs, within the cached tokens.
    cross-entropy: on the text itself, whatever the teacher says of it."""
    temperature: float | None = None
    """Divides all logits; 2 for kd, 1 for the others when not given."""
    hard_weight: float = 0.0
    """Weight of the cross-entropy on the teacher's likeliest token."""
    hard_weight_end: float | None = None
    """Value that the weight moves to, in a straight line; it stays when not given."""
    sampled_negatives: int = 0
    """0 = form all of the student's logits. Otherwise its partition is estimated from the cached
    tokens and this many drawn for each micro-batch, such as 4096: less work in the head, a noisier
    gradient."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(0, self, "sampled_negatives", group="loss")
        if self.divergence == "cross-entropy" and self.sampled_negatives:
            raise ValueError(
                f"--loss.sampled-negatives {self.sampled_negatives} draws what the teacher is "
                "known on; leave it out with cross-entropy"
            )

    @property
    def used_temperature(self) -> float:
        """Return the temperature of the loss."""
        if self.temperature is not None:
            return self.temperature
        return KD_TEMPERATURE if self.divergence == "kd" else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalsConfig:
    """How often a run evaluates, logs and saves."""

    eval_steps: int = 100
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_samples: int = 64
    """Held-out sequences of an evaluation."""
    log_steps: int = 10
    """Steps between log lines."""
    save_steps: int = 100
    """Steps between states to resume from; 0 = none."""
    keep_states: int = 1
    """States to keep: the last N."""
    keep_states_every: int = 0
    """Of states at multiples of this number of steps all are kept; 0 = no others."""
    keep_checkpoints: int | None = None
    """Students to keep of those at --intervals.save-steps: the last N, 0 = all; none when not
    given."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(1, self, "eval_samples", "log_steps", "keep_states", group="intervals")
        require_at_least(0, self, "eval_steps", "save_steps", group="intervals")
        require_at_least(0, self, "keep_states_every", group="intervals")

    def kept_states(self) -> dict[str, int]:
        """Return what `StateWriter` is told to keep."""
        return {"keep": self.keep_states, "keep_every": self.keep_states_every}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerwiseConfig:
    """A stage before end-to-end training: each decoder layer learns the teacher layer's output."""

    sequences: int = 0
    """Training sequences of the stage, such as 512; 0 = no such stage."""
    epochs: int = 2
    """Times that each decoder layer sees them."""
    batch_size: int = 8
    """Sequences of a step."""
    lr: float = 2e-4
    """Peak learning rate of latent weights; a share where --optim.relative says so."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_at_least(0, self, "sequences", group="layerwise")
        require_at_least(1, self, "epochs", "batch_size", group="layerwise")
        if self.lr <= 0:
            raise ValueError(f"--layerwise.lr {self.lr} must be above 0; try 2e-4")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where the run's numbers and results go in addition to its folder."""

    to: Literal["folder", "wandb", "tensorboard", "both"] = "folder"
    """folder: the run's own files only. wandb: Weights & Biases as well; WANDB_MODE=offline is
    read. tensorboard: event files in the run's folder as well. both: all of them."""
    project: str = "qat"
    """Project at Weights & Biases."""
    name: str | None = None
    """Run name at Weights & Biases; the folder's name when not given."""
    group: str | None = None
    """Group at Weights & Biases: the experiment that the run belongs to."""
    tags: tuple[str, ...] = ()
    """Tags at Weights & Biases."""
    copy_to: Path | None = field(default=None, metadata=TAKES_ADDRESS)
    """Folder or address that the results are copied to with each state and at the end, such as a
    mounted drive."""

    def sinks(self) -> dict[str, Any]:
        """Return what `open_tracker` is told of them."""
        names = ("project", "name", "group", "tags")
        wandb = {name: getattr(self, name) for name in names}
        return {
            "wandb": wandb if self.to in ("wandb", "both") else None,
            "tensorboard": self.to in ("tensorboard", "both"),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(PlaceConfig):
    """Distil a teacher's cache into a student. What trains is float32, whatever the dtype."""

    checkpoint: Path
    """The student to train: a native folder, a run, a `.pt` file with its config.json."""
    cache_dir: Path = field(metadata=TAKES_ADDRESS)
    """Teacher cache to learn from; its held-out split measures. At an address it is read by way of
    copies in caches, which take half of the free disk at most."""
    eval_cache_dir: Path | None = field(default=None, metadata=TAKES_ADDRESS)
    """Another cache of the same teacher that measures in its place."""
    eval_sets: tuple[str, ...] = ()
    """Texts whose perplexity is measured as well, NAME=SOURCE or SOURCE each, as `qat evaluate
    --perplexity` takes them, in windows as long as the cache's sequences."""
    eval_only: bool = False
    """Measure the run's best student, or the one to start from where there is none, and stop."""
    output_dir: Path = field(metadata=TAKES_ADDRESS)
    """Folder of the run: record, best and final student, state to resume from. Or an address, such
    as s3://bucket/run: the run works in a folder in runs, is copied there with each state, and
    resumes from there where that folder is gone."""
    model_id: str | None = None
    """Full-precision model; latent weights start near its weights. The one the student names."""
    layers: Layers = "all"
    """Layers that train; the others stay as they are. body: mlp and attention. embedding: a
    quantized embedding or head. all: every quantized layer."""
    formats: tuple[str, ...] | None = None
    """Train layers in these formats only, as the plan names them, such as gguf:q2_0: those of few
    bits lose most, and the others cost a step's time. All when not given; norms train whatever the
    formats."""
    trainable: tuple[Part, ...] = ("auto",)
    """What trains in them: weights (and so indices), scales, codebooks, norms; of low-rank scales
    magnitudes alone, or directions, which are scales without their magnitudes. auto: weights and
    scales, or scales alone where those are low rank."""
    max_steps: int = 1000
    """Optimizer steps end to end; 0: the stage before them, --layerwise.sequences, alone."""
    batch_size: int = 8
    """Sequences of a micro-batch; processes of torchrun share them."""
    accumulation_steps: int = 1
    """Micro-batches of a step."""
    curriculum: str | None = None
    """Lengths of sequences as length:first step, such as 64:0,128:1000."""
    shard: bool = False
    """Processes of torchrun hold some rows of every quantized weight each, with what trains of it
    and its optimizer state, and gather it decoder layer by decoder layer; otherwise all of them,
    unless by prediction their devices do not hold that."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    form_weights: FormWeights = "once"
    """once: before a step, in the compute dtype, with a gradient of the same size for each weight.
    in-use: by each decoder layer as it runs and again in the backward pass, which turns gradients
    into those of scales or latent weights one layer at a time, for models that do not fit
    otherwise. Takes --gradient-checkpointing."""
    compile: Compile = "auto"
    """Run each decoder layer as a compiled program (torch.compile), which the first steps take a
    minute to make. auto: on CUDA."""
    seed: int = 0
    """Decides the order of the data, drawn negatives and dropout."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    layerwise: LayerwiseConfig = field(default_factory=LayerwiseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Refuse values out of range and parts that exclude each other."""
        if self.max_steps == 0 and not self.layerwise.sequences:
            raise ValueError(
                "--max-steps 0 must be 1 or more; with --layerwise.sequences it is that stage alone"
            )
        require_at_least(0, self, "max_steps")
        require_at_least(1, self, "batch_size", "accumulation_steps")
        require_seed(self)
        require_at_most(MOST_SEQUENCES, self, "batch_size", "accumulation_steps")
        if self.form_weights == "in-use" and not self.gradient_checkpointing:
            raise ValueError(
                "--form-weights in-use without --gradient-checkpointing would keep all weights "
                "until the backward pass; give both"
            )
        if not self.trainable:
            raise ValueError("--trainable is empty, nothing would move; name weights or scales")
        if "directions" in self.trainable and {"scales", "magnitudes"} & set(self.trainable):
            raise ValueError(
                f"--trainable {' '.join(self.trainable)}: directions are scales without their "
                "magnitudes; drop directions for all of the scales"
            )
        self.lengths()

    def parts(self, *, is_low_rank: bool = False) -> tuple[Part, ...]:
        """Return what trains, `auto` resolved.

        Args:
            is_low_rank: Whether the student's scales are. With latent weights those diverge: at
                lr 5e-5 SmolLM2-135M's training loss went from 0.5 to 7 in 22 steps; scales
                alone brought held-out kl_nats from 0.89 to 0.63 in 16.
        """
        usual = ("scales",) if is_low_rank else ("weights", "scales")
        parts = [p for part in self.trainable for p in (usual if part == "auto" else (part,))]
        if "directions" in parts:
            parts = [part for part in parts if part != "scales"]
        return tuple(dict.fromkeys(parts))

    def hard_weight(self, step: int) -> float | None:
        """Return the weight of the hard cross-entropy at a step; None where it is in no step."""
        start, end = self.loss.hard_weight, self.loss.hard_weight_end
        if not start and not end:
            return None
        end = start if end is None else end
        return start + (end - start) * step / max(1, self.max_steps - 1)

    def lengths(self) -> list[tuple[int, int]]:
        """Return the curriculum as (first step, length), ascending; empty without one."""
        if self.curriculum is None:
            return []
        try:
            pairs = [tuple(map(int, part.split(":"))) for part in self.curriculum.split(",")]
            stages = sorted((step, length) for length, step in pairs)
        except ValueError:
            stages = []
        if not stages or stages[0][0] != 0 or min(length for _, length in stages) < 2:
            raise ValueError(
                f"--curriculum {self.curriculum} must be length:first step pairs from step 0 on, "
                "such as 64:0,128:1000"
            )
        return stages

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of layers that train."""
        return KINDS.get(self.layers, (self.layers,))
