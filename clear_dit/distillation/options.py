"""What a distillation is asked to do; names and defaults as in diffusers' training scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError
from ..generation.checks import Bounds, take_numbers, takes_far
from ..generation.models import model_path

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
OPTIMIZERS = {"prodigy": 1.0, "adamw": 1e-4}  # and their learning rates
REPORTS = ("tensorboard", "wandb", "none")
AUTO_PRECISION = "auto"
PRECISIONS = (AUTO_PRECISION, "no", "bf16")
_BOUNDS: dict[str, Bounds] = {
    "radius": (1, 10**9),
    "down_factor": (1, 1024),
    "lora": (1, 1024),
    "max_train_samples": (1, 10**7),
    "train_batch_size": (1, 1024),
    "gradient_accumulation_steps": (1, 10_000),
    "max_train_steps": (1, 10**7),
    "learning_rate": (1e-12, 100),
    "lr_warmup_steps": (0, 10**7),
    "max_grad_norm": (0, 1e6),
    "weight_decay": (0, 1),
    "output_weight": (0, 1e6),
    "attention_weight": (0, 1e6),
    "prompt_dropout": (0, 1),
    "ema_decay": (0, 1),
    "checkpointing_steps": (1, 10**7),
    "checkpoints_total_limit": (1, 10_000),
    "validation_steps": (1, 10**7),
    "seed": (0, 2**62),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "lr_scheduler": LR_SCHEDULERS,
    "optimizer": tuple(OPTIMIZERS),
    "report_to": REPORTS,
    "mixed_precision": PRECISIONS,
}


@dataclass(frozen=True)
class DistillOptions:
    """A distillation. The defaults are the paper's (arXiv 2412.16112), for 4 processes.

    Attributes:
        model: "demo", "demo-sd3", a folder in diffusers format, or a hub repository (owner/name).
        samples: a folder that `clear-dit sample` wrote with this model.
        out: the folder for adapter, card, checkpoints and logs; made if its parent is there.
        radius, down_factor: of the window, in tokens.
        far: train with far keys, which let every token see the whole image; False for the paper's
            CLEAR. None takes far keys unless down_factor is above 1, with which they do not go.
        impl: see `local_attention`.
        lora: rank of a LoRA on the same layers, instead of training them; the weights of pooled
            and far keys then stay at their initial value. None for the layers themselves.
        output_weight, attention_weight: of the distillation terms; 0 and 0 need no teacher.
        attention_layers: blocks compared of the last stack, "1,5,9"; None for the paper's, scaled.
        prompt_dropout: share of samples trained with the empty prompt; None for 0.1 where the
            samples were made with classifier-free guidance, else 0.
        max_train_samples: use the first so many; None for all.
        train_batch_size: samples at once, of a process.
        gradient_accumulation_steps: batches of a process in a step.
        max_train_steps: optimizer steps.
        optimizer: "prodigy" (arXiv 2306.06101) or "adamw".
        learning_rate: None for 1 with Prodigy, 1e-4 with AdamW.
        weight_decay: decoupled.
        lr_scheduler, lr_warmup_steps: see `diffusers.optimization.get_scheduler`.
        max_grad_norm: gradients are clipped to it; 0 for no clipping.
        mixed_precision: "no" or "bf16"; "auto" for what `accelerate launch` says, without it "bf16"
            where training is in bfloat16 (see `resolve_dtype`).
        gradient_checkpointing: less memory, a third more time.
        use_ema, ema_decay: the adapter is the moving average of the trained weights.
        checkpointing_steps, checkpoints_total_limit: how often, and how many are kept.
        resume_from_checkpoint: "latest", or a checkpoint's folder; None to begin.
        report_to: "tensorboard", "wandb" or "none".
        validation_prompts: a file of prompts, the first four of which are generated, or "demo".
        validation_steps: how often.
        seed: of order, noise, noise levels, dropout and LoRA's start.
        cpu: do not use a GPU.

    Raises:
        RequestError: the first value that is out of its range.
    """

    model: str
    samples: Path
    out: Path
    radius: int
    down_factor: int = 1
    far: bool | None = None
    impl: str = "auto"
    lora: int | None = None
    output_weight: float = 0.5
    attention_weight: float = 0.5
    attention_layers: str | None = None
    prompt_dropout: float | None = None
    max_train_samples: int | None = None
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    max_train_steps: int = 10_000
    optimizer: str = "prodigy"
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    mixed_precision: str = AUTO_PRECISION
    gradient_checkpointing: bool = False
    use_ema: bool = False
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    report_to: str = "tensorboard"
    validation_prompts: str | None = None
    validation_steps: int = 500
    seed: int = 0
    cpu: bool = False

    def __post_init__(self) -> None:
        model_path(self.model)
        take_numbers(self, _BOUNDS)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise RequestError(
                    f"{_flag(name)} must be one of {', '.join(choices)}; got {value!r}."
                )
        if self.out.exists() and not self.out.is_dir():
            raise RequestError(f"--out must be a folder, and {self.out} is a file.")
        if not self.out.absolute().parent.is_dir():
            raise RequestError(f"--out: there is no folder {self.out.absolute().parent}.")

    @property
    def takes_far(self) -> bool:
        """Whether the window has far keys."""
        return takes_far(self.far, self.radius, self.down_factor)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
