"""Flags of `qat train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["weights", "scales", "magnitudes", "codebooks", "norms"]
Loss = Literal["forward-kl", "reverse-kl", "jensen-shannon", "skewed-kl", "confidence-kl", "kd"]
COUNTS = (
    *("max_steps", "batch_size", "accumulation_steps", "log_steps", "eval_samples"),
    "sampled_negatives",
)
SEED_TEMPERATURE = 2.0  # of the seeds' loss, where no other is asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Distil a teacher's cache into a student."""

    v2_checkpoint: Path
    """The student to train: a native folder or a run."""
    cache_dir: Path
    """Teacher cache to learn from; its held-out split measures."""
    eval_cache_dir: Path | None = None
    """Another cache of the same teacher that measures in its place."""
    output_dir: Path
    """Folder of the run: record, best and final student, state to resume from."""
    model_id: str | None = None
    """Full-precision model; latent weights start near its weights. The one the student names."""
    mlp_only: bool = False
    """Train MLP layers only."""
    attn_only: bool = False
    """Train attention layers only."""
    trainable: tuple[Part, ...] | None = None
    """What moves: weights (and so indices), scales, magnitudes, codebooks, norms; when not given
    weights and scales, or scales alone where those are low rank, as in the seeds' V2 students."""
    g_only: bool = False
    """Move magnitudes only, as --trainable magnitudes does."""
    freeze_mags: bool = False
    """Low-rank scales keep their magnitudes."""
    train_lut: bool = False
    """Move codebooks as well."""
    train_norms_only: bool = False
    """Move norms only, as --trainable norms does."""
    loss: Loss = "forward-kl"
    """Divergence from the teacher; kd is the seeds' own, within the cached tokens."""
    temperature: float | None = None
    """Divides all logits; 2 for kd, 1 for the others when not given."""
    hard_top1: float = 0.0
    """Weight of the cross-entropy on the teacher's likeliest token."""
    hard_top1_end: float | None = None
    """Value that --hard-top1 moves to, in a straight line; stays when not given."""
    hard_full: float = 0.0
    """The seeds' second name for the same cross-entropy: added to --hard-top1."""
    full_logits: bool = True
    """Form all of the student's logits. Without, its partition is estimated from the cached tokens
    and --sampled-negatives drawn ones: less work in the head, a noisier gradient."""
    sampled_negatives: int = 4096
    """Tokens drawn for each micro-batch with --no-full-logits."""
    layerwise: bool = False
    """First train each block against the teacher block's output, one after the other."""
    layerwise_sequences: int = 512
    """Training sequences of the layer-by-layer pass."""
    layerwise_epochs: int = 2
    """Times that each block sees them."""
    layerwise_batch_size: int = 8
    """Sequences of a step of the layer-by-layer pass."""
    layerwise_lr: float = 2e-4
    """Peak rate of latent weights in the layer-by-layer pass."""
    max_steps: int = 1000
    """Optimizer steps end to end."""
    batch_size: int = 8
    """Sequences of a micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches of a step."""
    lr: float = 2e-4
    """Peak learning rate of latent weights. After a quick fit (--fit moments) 4e-4 gets further in
    few steps; after the default fit it would undo what error feedback found."""
    scale_lr_ratio: float = 1.0
    """Rate of scales and magnitudes over --lr."""
    codebook_lr_ratio: float = 1.0
    """Rate of codebooks over --lr."""
    norm_lr_ratio: float = 1.0
    """Rate of norms over --lr."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After warm-up: fall along a cosine, stay, or stay and fall in the last fifth."""
    constant_lr: bool = False
    """The same as --schedule constant."""
    min_lr_ratio: float = 0.1
    """Rate at the end over the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of latent weights."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    ema_decay: float = 0.0
    """Measure and keep a moving average of what trains, of this decay; 0 = none."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """When the loss is not finite or jumps: stop, or go back to the last state at half the rate."""
    curriculum: str | None = None
    """Lengths of sequences as length:first step, such as 64:0,128:1000."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    eval_steps: int = 100
    """Steps between held-out evaluations; 0 = only before and after."""
    eval_samples: int = 64
    """Held-out sequences of an evaluation."""
    log_steps: int = 10
    """Steps between log lines."""
    save_steps: int = 100
    """Steps between states to resume from; 0 = none."""
    keep_checkpoints: int | None = None
    """Students to keep of those at --save-steps: the last N, 0 = all; none when not given."""
    seed: int = 0
    """Order of the data."""
    dtype: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp16. What trains is always float32."""
    device: str = "auto"
    """auto, cpu, cuda, mps, xla or tpu."""
    wandb: bool = False
    """Log to Weights & Biases as well; WANDB_MODE=offline is heeded."""
    wandb_project: str = "qat"
    """Project at Weights & Biases."""
    wandb_run: str | None = None
    """Run name at Weights & Biases; the folder's name when not given."""
    wandb_group: str | None = None
    """Group at Weights & Biases: the experiment that the run belongs to."""
    wandb_tags: tuple[str, ...] = ()
    """Tags at Weights & Biases."""
    gdrive_dir: Path | None = None
    """Folder that the results are copied to at the end, such as a mounted Drive."""

    def __post_init__(self) -> None:
        for flag in COUNTS:
            if getattr(self, flag) < 1:
                raise ValueError(
                    f"--{flag.replace('_', '-')} {getattr(self, flag)} must be 1 or more"
                )
        self.refuse_contradictions()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema-decay {self.ema_decay} must be within 0 and 1; try 0.99")
        self.lengths()
        if self.trainable == ():
            raise ValueError("--trainable is empty, nothing would move; name weights or scales")
        for flag in ("eval_steps", "save_steps", "warmup_steps", "clip_grad_norm", "weight_decay"):
            if getattr(self, flag) < 0:
                raise ValueError(
                    f"--{flag.replace('_', '-')} {getattr(self, flag)} must be 0 or more"
                )
        if self.lr <= 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                f"--lr {self.lr} must be above 0, --min-lr-ratio {self.min_lr_ratio} within 0..1"
            )

    def refuse_contradictions(self) -> None:
        """Refuse flags that exclude each other."""
        if self.mlp_only and self.attn_only:
            raise ValueError(
                "--mlp-only and --attn-only exclude each other; leave out both for all"
            )
        if self.g_only and self.train_norms_only:
            raise ValueError("--g-only and --train-norms-only exclude each other; choose one")
        if self.freeze_mags and self.parts() == ("magnitudes",):
            raise ValueError(
                "--freeze-mags leaves nothing of magnitudes to train; drop one of them"
            )

    def parts(self, *, is_low_rank: bool = False) -> tuple[Part, ...]:
        """Return what moves, the seeds' words counted in.

        Args:
            is_low_rank: Whether the student's scales are. Beside latent weights those run away: at
                the seeds' rate SmolLM2-135M's training loss went from 0.5 to 7 in 22 steps; scales
                alone brought held-out kl_nats from 0.89 to 0.63 in 16.
        """
        if self.g_only:
            return ("magnitudes",)
        if self.train_norms_only:
            return ("norms",)
        usual = ("scales",) if is_low_rank else ("weights", "scales")
        parts = [*(self.trainable or usual), *(["codebooks"] if self.train_lut else [])]
        return tuple(dict.fromkeys(parts))

    @property
    def loss_temperature(self) -> float:
        """Return the temperature of the loss."""
        if self.temperature is not None:
            return self.temperature
        return SEED_TEMPERATURE if self.loss == "kd" else 1.0

    def hard_weight(self, step: int) -> float:
        """Return the weight of the hard cross-entropy at a step."""
        end = self.hard_top1 if self.hard_top1_end is None else self.hard_top1_end
        share = step / max(1, self.max_steps - 1)
        return self.hard_full + self.hard_top1 + (end - self.hard_top1) * share

    @property
    def has_hard(self) -> bool:
        """Return whether the hard cross-entropy is part of the loss at any step."""
        return bool(self.hard_full or self.hard_top1 or self.hard_top1_end)

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
        if self.mlp_only:
            return ("mlp",)
        return ("attention",) if self.attn_only else ("mlp", "attention")
