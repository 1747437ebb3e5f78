"""Flags of `qat train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["weights", "scales", "magnitudes", "codebooks", "norms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Distil a teacher's cache into a student."""

    v2_checkpoint: Path
    """The student to train: a native folder or a run."""
    cache_dir: Path
    """Teacher cache to learn from; its held-out split measures."""
    output_dir: Path
    """Folder of the run: record, best and final student, state to resume from."""
    model_id: str | None = None
    """Full-precision model; latent weights start near its weights. The one the student names."""
    mlp_only: bool = False
    """Train MLP layers only."""
    attn_only: bool = False
    """Train attention layers only."""
    trainable: tuple[Part, ...] = ("weights", "scales")
    """What moves: weights (and so indices), scales, magnitudes, codebooks, norms."""
    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences of a micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches of a step."""
    lr: float = 1e-4
    """Peak learning rate of latent weights."""
    scale_lr_ratio: float = 1.0
    """Rate of scales and magnitudes over --lr."""
    codebook_lr_ratio: float = 1.0
    """Rate of codebooks over --lr."""
    norm_lr_ratio: float = 1.0
    """Rate of norms over --lr."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    constant_lr: bool = False
    """Stay at the peak after warm-up instead of falling along a cosine."""
    min_lr_ratio: float = 0.1
    """End of the cosine over the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of latent weights."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
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

    def __post_init__(self) -> None:
        for flag in ("max_steps", "batch_size", "accumulation_steps", "log_steps"):
            if getattr(self, flag) < 1:
                raise ValueError(
                    f"--{flag.replace('_', '-')} {getattr(self, flag)} must be 1 or more"
                )
        if self.mlp_only and self.attn_only:
            raise ValueError(
                "--mlp-only and --attn-only exclude each other; leave out both for all"
            )
        if not self.trainable:
            raise ValueError("--trainable is empty, nothing would move; name weights or scales")
        if self.lr <= 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                f"--lr {self.lr} must be above 0, --min-lr-ratio {self.min_lr_ratio} within 0..1"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of layers that train."""
        if self.mlp_only:
            return ("mlp",)
        return ("attention",) if self.attn_only else ("mlp", "attention")
