"""CLEAR's distillation (arXiv 2412.16112): one backbone is student and teacher."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from tqdm import tqdm

from ..errors import RequestError
from ..families.recipe import Recipe
from ..families.table import family_of
from ..generation.checks import find_window
from ..generation.conditioning import stacked
from ..generation.models import find_model, load_pipeline
from ..pipelines.pipeline import CLEARPipeline
from ..plugin import apply_clear
from ..progress import bar_options
from ..weights.learned import make_far_trainable
from . import checkpoint
from .card import card, hardware, mean_losses
from .cpu_attention import per_head_attention
from .data import Batch, Draws
from .files import write_text
from .fingerprint import fingerprint
from .losses import (
    AttentionOutputs,
    Losses,
    attention_outputs,
    distillation_losses,
    last_stack,
    noisy,
    parse_layers,
)
from .options import DistillOptions
from .precision import quiet_norms, weights_dtype
from .samples import SampleIndex, open_samples, read_index
from .setup import check_room, make_accelerator, make_optimizer, make_schedule
from .sharded import ShardedAverage, ShardedOptimizer, deal_out
from .student import (
    adapter_name,
    add_lora,
    freeze_others,
    lora_pipeline,
    save_adapter,
    trained_parameters,
    whole_tensors,
)
from .teacher import Teacher
from .validation import Validator, validation_prompts

logger: logging.Logger = logging.getLogger(__name__)

# Of prompts, where the samples were made with classifier-free guidance.
DEFAULT_DROPOUT = 0.1
LOSS_NAMES = Losses._fields
# Options that a resumed run must have in common; see also `Run.settings`.
_SETTINGS = (
    *("radius", "down_factor", "lora", "output_weight", "attention_weight", "optimizer"),
    *("weight_decay", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "use_ema"),
    *("ema_decay", "seed"),
)


def distill(options: DistillOptions, progress: bool = True) -> dict[str, Any]:
    """Train an adapter for CLEAR's local attention on samples of the model itself.

    Under `accelerate launch` or `torchrun`, all processes call this.

    Args:
        options: what to do.
        progress: show a progress bar on standard error.

    Returns:
        adapter (its path), process (this one's number), steps, parameters (trained), first and
        last (means of up to 100 steps' losses), seconds_per_step (validation and checkpoints left
        out), resumed_from (a step).

    Raises:
        RequestError: bad options, samples or checkpoint, or a loss that is not finite.
        OSError: a file cannot be written; nothing is left of it.
    """
    index = read_index(options.samples)
    find_window(
        index.height,
        index.width,
        options.radius,
        options.down_factor,
        token_pixels=find_model(options.model).token_pixels,
        far=options.takes_far,
    )
    prompts = validation_prompts(options.validation_prompts) if options.validation_prompts else []
    found = checkpoint.find_checkpoint(options.out, options.resume_from_checkpoint)
    run = Run(options, index, only_transformer=not prompts)
    if found is not None:
        checkpoint.check(found, run.settings)
    check_room(options, run.parameters)
    run.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if run.accelerator.is_main_process:
        options.out.mkdir(exist_ok=True)
        checkpoint.clean(options.out)
    if prompts:
        run.validator = Validator(run.pipe, prompts, index, run.dtype, options.out / "validation")
    run.prepare(found)
    resumed_from = run.progress.step
    with quiet_norms():
        run.train(progress)
    return run.finish() | {"resumed_from": resumed_from}


class Run:
    """A distillation: the model with both roles, and everything that moves with the steps.

    Attributes:
        pipe: the pipeline whose transformer is trained.
        model: the transformer itself; `wrapped` is what accelerate makes of it.
        settings: what a resumed run must have in common.
        parameters: how many numbers are trained.
    """

    def __init__(self, options: DistillOptions, index: SampleIndex, only_transformer: bool) -> None:
        self.options = options
        self.index = index
        self.accelerator: Any = make_accelerator(options)
        self.device: Any = self.accelerator.device
        mixed = self.accelerator.mixed_precision == "bf16"
        self.dtype: torch.dtype = torch.bfloat16 if mixed else torch.float32
        # FSDP shards parameters of one dtype only.
        fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        loaded = torch.float32 if fsdp else weights_dtype(self.dtype, self.device)
        self.pipe: CLEARPipeline = load_pipeline(
            options.model, loaded, self.device, only_transformer
        )
        self.model: Any = self.pipe.transformer
        identity = fingerprint(self.model)
        wanted = options.max_train_samples
        samples = open_samples(options.samples, options.model, identity, wanted or 0)
        self.recipe: Recipe = self.pipe.recipe
        stack, count = last_stack(self.model)
        self.stack: str = stack
        self.layers: tuple[int, ...] = parse_layers(options.attention_layers, self.stack, count)
        guided = self.recipe.guidance.passes(self.model.config, index.guidance) > 1
        dropout = options.prompt_dropout
        if dropout is None:
            dropout = DEFAULT_DROPOUT if guided else 0.0
        self.draws: Draws = Draws(samples, wanted or index.count, options.seed, dropout)
        self._build_roles()
        self.parameters: int = sum(p.numel() for p in self._trained().values())
        self.progress: checkpoint.Progress = checkpoint.Progress()
        self.validator: Validator | None = None
        self.settings: dict[str, Any] = {"fingerprint": identity}
        for name in _SETTINGS:
            self.settings[name] = getattr(options, name)
        self.settings |= {
            "far": options.takes_far,
            "learning_rate": options.rate,
            "samples": index.digest,
            "sample_count": self.draws.count,
            "effective_batch": self.effective_batch,
            "prompt_dropout": dropout,
            "attention_layers": list(self.layers),
            "mixed_precision": self.accelerator.mixed_precision,
        }
        if options.lr_scheduler in ("linear", "cosine"):  # which end with the last step
            self.settings["max_train_steps"] = options.max_train_steps

    def _build_roles(self) -> None:
        options = self.options
        try:
            apply_clear(
                self.model,
                options.radius,
                options.down_factor,
                far=options.takes_far,
                impl=options.impl,
            )
        except ValueError as error:
            raise RequestError(str(error)) from error
        if options.lora is not None:
            lora_pipeline(self.model)  # which can save it
            add_lora(self.model, options.lora, options.seed)
        elif options.takes_far:
            make_far_trainable(self.model)
        self.teacher: Teacher | None = None
        if options.output_weight > 0 or options.attention_weight > 0:
            on_cpu = weights_dtype(self.dtype, self.device) != self.dtype
            stock = per_head_attention(self.model) if on_cpu else None
            self.teacher = Teacher(self.model, stock)
        freeze_others(self.model, self.lora)
        if options.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()

    @property
    def lora(self) -> bool:
        return self.options.lora is not None

    @property
    def effective_batch(self) -> int:
        """Samples in an optimizer step."""
        options = self.options
        each = options.train_batch_size * options.gradient_accumulation_steps
        return each * self.accelerator.num_processes

    def _trained(self) -> dict[str, nn.Parameter]:
        return trained_parameters(self.model, self.lora)

    def prepare(self, found: Path | None) -> None:
        """Optimizer, schedule, average, trackers; and the state of a checkpoint."""
        options, accelerator = self.options, self.accelerator
        optimizer = make_optimizer(options, list(self._trained().values()), accelerator)
        wrapped, optimizer = accelerator.prepare(self.model, optimizer)
        self.wrapped: Any = wrapped
        self.optimizer: Any = optimizer
        self.schedule: Any = make_schedule(options, self.optimizer)
        self.parts: dict[str, Any] = {
            "progress": self.progress,
            "trained": _Parameters(self._trained()),
            "optimizer": ShardedOptimizer(self.optimizer, list(self._trained().values())),
            "schedule": self.schedule,
        }
        self.average: Any = None
        if options.use_ema:
            from diffusers.training_utils import EMAModel

            self.average = EMAModel(self._trained().values(), decay=options.ema_decay)
            self.parts["average"] = ShardedAverage(self.average)
        if found is not None:
            checkpoint.load(accelerator, found, self.parts)
            logger.info("resumed from %s", found)
        if options.report_to != "none":
            # What a killed run had logged beyond the checkpoint is dropped.
            purge = {"purge_step": self.progress.step + 1} if found is not None else {}
            accelerator.init_trackers("logs", init_kwargs={"tensorboard": purge})

    def calls(self, batch: Batch) -> list[dict[str, Any]]:
        """What the transformer is called with, both roles alike: once, or for each row.

        Rows of different lengths are not put together. All processes do the same, whatever rows
        they have: they meet in every forward.
        """
        latents = noisy(batch.clean, batch.noise, batch.s)
        latents = latents.to(weights_dtype(self.dtype, self.device))
        rows = [slice(None)]
        if not self.draws.stackable:
            rows = [slice(row, row + 1) for row in range(len(batch.s))]
        return [
            self.recipe.denoiser.arguments(
                latents[some], batch.s[some], stacked(batch.conditionings[some])
            )
            for some in rows
        ]

    def _velocity(self, calls: list[dict[str, Any]]) -> torch.Tensor:
        """What the transformer predicts for the rows of all calls."""
        outputs = [self.wrapped(**arguments, return_dict=False)[0] for arguments in calls]
        velocity, shape = self.recipe.denoiser.velocity, self.index.shape
        return torch.cat([velocity(output, shape) for output in outputs])

    def losses(self, batch: Batch) -> Losses:
        """Both roles at the same x_t, and the three terms.

        Args:
            batch: on the device.
        """
        options, calls = self.options, self.calls(batch)
        layers = self.layers if options.attention_weight > 0 else ()
        expected: torch.Tensor | None = None
        expected_attention: AttentionOutputs = {}
        if self.teacher is not None:
            with self.teacher.attention(), attention_outputs(self.model, layers) as kept:
                expected = self._velocity(calls)
            expected_attention = kept
        with attention_outputs(self.model, layers) as kept:
            predicted = self._velocity(calls)
        return distillation_losses(
            batch.clean,
            batch.noise,
            predicted,
            expected,
            kept,
            expected_attention,
            options.output_weight,
            options.attention_weight,
        )

    def step(self, step: int) -> list[float]:
        """One optimizer step; its losses, as in LOSS_NAMES, means over all its samples.

        Raises:
            RequestError: the loss is not finite; nothing is changed.
        """
        options, accelerator = self.options, self.accelerator
        size, parts = options.train_batch_size, options.gradient_accumulation_steps
        sums = torch.zeros(len(LOSS_NAMES), device=self.device)
        dtype = weights_dtype(self.dtype, self.device)
        for part in range(parts):
            place = part * accelerator.num_processes + accelerator.process_index
            first = step * self.effective_batch + place * size
            batch = self.draws.batch(range(first, first + size)).to(self.device, dtype)
            with accelerator.accumulate(self.wrapped):
                losses = self.losses(batch)
                accelerator.backward(losses.total)
                sums += torch.stack(losses).detach() / parts
                if accelerator.sync_gradients:
                    means = accelerator.reduce(sums, "mean")
                    if not means.isfinite().all():
                        raise RequestError(
                            f"the loss is not finite at step {step + 1}; a lower --learning-rate "
                            "or --mixed-precision no may help."
                        )
                    if options.max_grad_norm > 0:
                        accelerator.clip_grad_norm_(
                            list(self._trained().values()), options.max_grad_norm
                        )
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        if self.average is not None:
            self.average.step(self._trained().values())
        return means.tolist()

    def train(self, show_progress: bool) -> None:
        """All steps that are left, with checkpoints and validation."""
        options, progress = self.options, self.progress
        bar = tqdm(
            range(progress.step, options.max_train_steps),
            desc="distilling",
            initial=progress.step,
            total=options.max_train_steps,
            **bar_options(show_progress and self.accelerator.is_local_main_process),
        )
        for step in bar:
            start = time.perf_counter()
            losses = self.step(step)
            progress.seconds += time.perf_counter() - start
            progress.step = step + 1
            progress.losses.append(losses)
            named = dict(zip(LOSS_NAMES, losses, strict=True))
            bar.set_postfix({name: f"{value:.4f}" for name, value in named.items()}, refresh=False)
            rate = self.schedule.get_last_lr()[0] * self.optimizer.param_groups[0].get("d", 1.0)
            self.accelerator.log(named | {"learning_rate": float(rate)}, step=progress.step)
            last = progress.step == options.max_train_steps
            if last or progress.step % options.checkpointing_steps == 0:
                self._save_checkpoint()
            if self.validator and (last or progress.step % options.validation_steps == 0):
                self._validate(self.validator)

    def _save_checkpoint(self) -> None:
        tensors = self._adapter_tensors()
        checkpoint.save(
            self.accelerator,
            self.options.out,
            self.settings,
            self.options.checkpoints_total_limit,
            self.parts,
            lambda folder: self._save_adapter(tensors, folder),
        )

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        trained = self._trained()
        if self.average is not None:
            trained = dict(zip(trained, self.average.shadow_params, strict=True))
        return whole_tensors(trained)

    def _save_adapter(self, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
        dtype = torch.float32 if self.lora else self.dtype
        return save_adapter(self.model, tensors, folder, self.lora, dtype, self.options.model)

    def _validate(self, validator: Validator) -> None:
        # With shards, every process has to take part.
        if self.accelerator.is_main_process or checkpoint.is_sharded(self.accelerator):
            with self._averaged():
                validator.run(
                    self.progress.step, self.accelerator.trackers, self.accelerator.is_main_process
                )
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are such."""
        with ExitStack() as stack:
            if self.average is not None:
                trained = list(self._trained().values())
                self.average.store(trained)
                stack.callback(self.average.restore, trained)
                self.average.copy_to(trained)
            yield

    def finish(self) -> dict[str, Any]:
        """Write adapter, card and losses; what `distill` returns."""
        options, progress = self.options, self.progress
        tensors = self._adapter_tensors()
        name = adapter_name(options.radius, options.down_factor, options.takes_far, self.lora)
        adapter = options.out / name
        if self.accelerator.is_main_process:
            self._save_adapter(tensors, options.out)
            facts = {
                "parameters": self.parameters,
                "samples": self.draws.count,
                "effective_batch": self.effective_batch,
                "stack": self.stack,
                "layers": self.layers,
                "trained": family_of(self.model).tuned,
                "hours": progress.seconds / 3600,
                "hardware": hardware(self.device, self.accelerator.num_processes),
                "mixed_precision": self.accelerator.mixed_precision,
            }
            write_text(
                options.out / "README.md",
                card(options, self.index, adapter, facts, progress.losses),
            )
            lines = [",".join(("step", *LOSS_NAMES))]
            for step, losses in enumerate(progress.losses, 1):
                lines.append(",".join((str(step), *map(repr, losses))))
            write_text(options.out / "losses.csv", "\n".join(lines) + "\n")
        self.accelerator.end_training()
        if self.teacher is not None:
            self.teacher.detach()
        return {
            "adapter": str(adapter),
            "process": self.accelerator.process_index,
            "steps": progress.step,
            "parameters": self.parameters,
            "first": dict(zip(LOSS_NAMES, mean_losses(progress.losses, False), strict=True)),
            "last": dict(zip(LOSS_NAMES, mean_losses(progress.losses, True), strict=True)),
            "seconds_per_step": progress.seconds / max(1, progress.step),
        }


class _Parameters:
    """Parameters by name, as a part of a checkpoint."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state.keys() != self.parameters.keys():
            raise ValueError("it holds other parameters")
        for name, parameter in self.parameters.items():
            if state[name].shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(deal_out(state[name], parameter.data))
