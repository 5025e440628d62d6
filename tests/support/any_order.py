"""What a model must be after operations in any order, and a freshly built model that is just that.

All weights are multiples of 1/16 below 1, LoRAs add multiples of 1/32: sums and casts to bfloat16
and back are exact, so that a model that was brought to a state by a detour has its very weights.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

from clear_dit import apply_clear
from clear_dit.attention.processor import LEARNED
from clear_dit.families.table import attention_layers
from clear_dit.weights.learned import make_far_trainable
from support.families.models import HEAD_DIM, HEADS, make_inputs, make_model
from support.ip_adapter import make_ip_adapter

GRIDS = ((3, 5), (5, 3), (4, 4))
SMALL = {
    "flux": {"num_layers": 1, "num_single_layers": 1},
    # diffusers' own fused projections leave norms out, and fail at a second attention.
    "sd3": {"num_layers": 2, "dual_attention_layers": (), "qk_norm": None},
}
PIPELINES = {"flux": diffusers.FluxPipeline, "sd3": diffusers.StableDiffusion3Pipeline}
LORA_TARGETS = r"(single_)?transformer_blocks\..*\.(to_q|to_v|to_out\.0|net\.0\.proj)"
TUNED = ("to_q.", "to_k.", "to_v.", "to_out.0.")
# Largest error, as a part of the image's norm: other orders of the same sums.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 4e-2}


class File(NamedTuple):
    """A file of CLEAR weights: the seed of its values, and what they were made for."""

    seed: int
    down_factor: int = 1
    far: bool = False
    learned: bool = False


FILES = {
    "local": File(11),
    "other": File(12),
    "far": File(13, far=True),
    "learned": File(14, far=True, learned=True),
    "pooled": File(15, down_factor=2),
}


class Clear(NamedTuple):
    """Settings of CLEAR, as they were given."""

    radius: int
    down_factor: int = 1
    far: bool | None = None


class Seen(NamedTuple):
    """All that an image depends on.

    Attributes:
        clear: its `far` is what runs.
        pooling: the file that what the processors learned comes from.
        own: name and scale of LoRAs in the model's own weights, which tuned ones replace.
        lora: name and scale of those that count everywhere.
    """

    family: str
    checkpoint: int
    tuned: str | None
    own: tuple[tuple[str, float], ...]
    lora: tuple[tuple[str, float], ...]
    clear: Clear | None
    pooling: str | None
    prompted: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class State:
    """A model as the operations on it ought to have left it.

    Attributes:
        checkpoint: the seed of the model's own weights.
        tuned: the file of CLEAR weights it has.
        strange: another checkpoint was loaded over CLEAR weights.
        lost: it was saved and loaded with CLEAR weights, without the originals.
        clear: settings, None without CLEAR.
        applied: whether `apply_clear` was called, and `remove_clear` not since.
        by_hand: whether the processors come from `set_attn_processor`.
        shared: all layers have one such processor.
        pooling: the file that what the processors learned comes from.
        blocked: stock processors were set where CLEAR was applied.
        lora: names and scales of the LoRAs that are there.
        own: those that were fused and unloaded before CLEAR weights came: nothing tells them.
        burned: those that were fused and unloaded since: they stay on whatever weights there are.
        merged, disabled: what was done to them.
        fused: whether the projections are.
        prompted: whether there is an IP-adapter.
    """

    family: str
    checkpoint: int = 0
    tuned: str | None = None
    strange: bool = False
    lost: bool = False
    clear: Clear | None = None
    applied: bool = False
    by_hand: bool = False
    shared: bool = False
    pooling: str | None = None
    blocked: bool = False
    lora: tuple[tuple[str, float], ...] = ()
    own: tuple[tuple[str, float], ...] = ()
    burned: tuple[tuple[str, float], ...] = ()
    merged: bool = False
    disabled: bool = False
    fused: bool = False
    prompted: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def seen(self) -> Seen:
        clear, file = self.clear, FILES.get(self.tuned or "")
        if clear is not None:
            wanted = clear.far
            if wanted is None:
                can = clear.down_factor == 1 and clear.radius > 1
                wanted = can and (file is None or file.far)
            clear = clear._replace(far=wanted)
        lora = self.burned + (() if self.disabled else self.lora)
        return Seen(
            self.family,
            self.checkpoint,
            None if self.strange else self.tuned,
            self.own,
            lora,
            clear,
            self.pooling,
            self.prompted,
            self.dtype,
        )


def values(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Random multiples of 1/16 within 1/4, float64, of a parameter's shape."""
    generator = torch.Generator().manual_seed(hash_of(name, seed))
    return torch.randint(-4, 5, like.shape, generator=generator).double() / 16


def hash_of(name: str, seed: int) -> int:
    """The same in every process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 10**9 * 100 + seed


def fill(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give a plain model the weights of a checkpoint."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, parameter, seed))
    return model


def plain_model(family: str, seed: int) -> torch.nn.Module:
    """A stock model with the weights of a checkpoint."""
    model = make_model(family, **SMALL[family])
    for buffer in model.buffers():
        buffer.copy_(buffer.bfloat16())
    return fill(model, seed)


@functools.cache
def checkpoint(family: str, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, float64."""
    return {name: value.double() for name, value in plain_model(family, seed).state_dict().items()}


def tuned_values(model: torch.nn.Module, file: File) -> dict[str, torch.Tensor]:
    """What a file holds for the model's own parameters, by their names in the plain model."""
    layers = attention_layers(model)
    return {
        key: values(key, parameter, file.seed)
        for key, parameter in model.named_parameters()
        if any(key.startswith(f"{name}.{tuned}") for name in layers for tuned in TUNED)
    }


def learned_values(name: str, like: torch.Tensor, file: File) -> torch.Tensor:
    """What a file holds for a processor's parameter."""
    return values(name, like, file.seed) / 2 + 1 / 4


def lora_parts(target: str, shape: torch.Size, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B of rank 1, float64, for a weight of a shape (outputs, inputs)."""
    generator = torch.Generator().manual_seed(hash_of(target, ord(name)))
    outputs, inputs = shape
    sizes = ((1, inputs), (outputs, 1))
    down, up = (torch.randint(0, 2, size, generator=generator) * 0.5 - 0.25 for size in sizes)
    return down.double(), up.double()


def add_loras(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], lora: tuple[tuple[str, float], ...]
) -> None:
    """Replace weights by those with LoRAs, of names and scales."""
    targets = [name for name, _ in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    for name, scale in lora:
        for target in targets:
            key = f"{target}.weight"
            down, up = lora_parts(target, weights[key].shape, name)
            weights[key] = weights[key] + scale * up @ down


def make_pipe(family: str, model: torch.nn.Module) -> Any:
    """A pipeline of the transformer alone."""
    cls = PIPELINES[family]
    parts = dict.fromkeys(cls._get_signature_keys(cls)[0])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return cls(**parts | {"transformer": model, "scheduler": scheduler})


@functools.cache
def image_prompt_weights(family: str) -> dict[str, Any]:
    """The file of an IP-adapter; values survive bfloat16."""
    if family == "flux":
        found = make_ip_adapter()
    else:
        width = HEADS * HEAD_DIM
        with torch.random.fork_rng():
            torch.manual_seed(0)
            projection = IPAdapterTimeImageProjection(
                6, width, 64, heads=1, num_queries=4, timestep_in_dim=8
            )
            layer = SD3IPAdapterJointAttnProcessor2_0(width, width, HEAD_DIM, 64)
        found = {"image_proj": projection.state_dict(), "ip_adapter": {}}
        for index in range(2):
            layer_values = {
                f"{index}.{key}": values(f"{index}.{key}", value, 7)
                for key, value in layer.state_dict().items()
            }
            found["ip_adapter"] |= layer_values
    return {
        part: {key: (value * 16).round().float() / 16 for key, value in tensors.items()}
        for part, tensors in found.items()
    }


def load_image_prompt(family: str, model: torch.nn.Module) -> None:
    """`pipe.load_ip_adapter`, without an image encoder."""
    weights = {part: dict(tensors) for part, tensors in image_prompt_weights(family).items()}
    if family == "flux":
        make_pipe(family, model).load_ip_adapter(
            [weights], weight_name=[""], image_encoder_pretrained_model_name_or_path=None
        )
    else:
        make_pipe(family, model).load_ip_adapter(weights, weight_name="", image_encoder_folder=None)


def inputs_of(seen: Seen, grid: tuple[int, int]) -> dict[str, Any]:
    """Of a forward, in the model's dtype."""
    inputs = make_inputs(seen.family, *grid, text=3)
    for name, value in inputs.items():
        if name not in ("img_ids", "txt_ids"):
            inputs[name] = value.to(seen.dtype)
    if seen.prompted:
        prompt = torch.arange(12.0).reshape(1, 2, 6).sin().to(seen.dtype)
        given = [prompt] if seen.family == "flux" else prompt
        inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": given}
    return inputs


@torch.no_grad()
def draw(model: torch.nn.Module, seen: Seen, grid: tuple[int, int]) -> torch.Tensor:
    """The model's prediction for inputs that are always the same."""
    return model(**inputs_of(seen, grid), return_dict=False)[0]


def fresh(seen: Seen) -> torch.nn.Module:
    """A new model, brought to a state by the shortest way: plain weights, CLEAR last, once."""
    model = plain_model(seen.family, seen.checkpoint)
    weights = dict(checkpoint(seen.family, seen.checkpoint))
    add_loras(model, weights, seen.own)
    if seen.tuned is not None:
        weights |= tuned_values(model, FILES[seen.tuned])
    add_loras(model, weights, seen.lora)
    model.double().load_state_dict(weights)
    model.to(seen.dtype)
    if seen.prompted:
        load_image_prompt(seen.family, model)
    if seen.clear is not None:
        apply_clear(model, **seen.clear._asdict())
    if seen.pooling is not None:
        file = FILES[seen.pooling]
        if file.learned:
            make_far_trainable(model)
        give_learned(model, file)
    return model


@torch.no_grad()
def give_learned(model: torch.nn.Module, file: File) -> None:
    """Fill what the processors learn with a file's values."""
    for name, attn in attention_layers(model).items():
        for kind in LEARNED:
            parameter = getattr(attn.processor, kind)
            if parameter is not None:
                parameter.copy_(learned_values(f"{name}.{kind}", parameter, file))


def gradient(model: torch.nn.Module, seen: Seen) -> torch.Tensor:
    """That of the latents, with gradient checkpointing; leaves none in the model."""
    inputs = inputs_of(seen, GRIDS[0])
    latents = inputs["hidden_states"].requires_grad_()
    model.train()
    model.enable_gradient_checkpointing()
    model(**inputs, return_dict=False)[0].float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    model.disable_gradient_checkpointing()
    model.eval()
    assert latents.grad is not None
    return latents.grad


@functools.lru_cache(4096)
def expected(seen: Seen, grid: tuple[int, int]) -> torch.Tensor:
    """The image of a fresh model."""
    return draw(_fresh_before(seen), seen, grid)


@functools.lru_cache(1024)
def right_gradient(seen: Seen) -> torch.Tensor:
    """`gradient` of a fresh model."""
    return gradient(fresh(seen), seen)


_fresh_before = functools.lru_cache(64)(fresh)


def error(image: torch.Tensor, right: torch.Tensor) -> float:
    """As a part of the norm of what is right."""
    return ((image.double() - right.double()).norm() / right.double().norm()).item()
