"""Telling requests and pipelines apart: whether stages in a folder, or other ranks, have those."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from clear_dit.families.table import attention_layers
from clear_dit.process_group import RankGroup
from clear_dit.versions import versions
from clear_dit.weights.state import ClearState
from clear_dit.wrappers import unwrapped

from .cascade.run import Request
from .cascade.stage_files import digest
from .cascade.upscaler import Upscaler
from .parallel.agreement import agree

# Of every parameter; other weights and adapters change them.
VALUES = 16


def request_identity(pipe: Any, request: Request) -> dict[str, str]:
    """What determines the latents of a request besides its stages: names people know, to digests.

    Raises:
        ValueError: a setting of which it cannot be told whether it is the same as another.
    """
    generators = request.generator if isinstance(request.generator, list) else [request.generator]
    states = [None if generator is None else generator.get_state() for generator in generators]
    text = {name: value for name, value in request.options.items() if "prompt" in name}
    others = {name: value for name, value in request.options.items() if "prompt" not in name}
    try:
        settings = digest([others, request.steps, request.sigmas, request.guidance_weight])
    except TypeError as error:
        raise ValueError(
            f"CLEARPipeline: {error}; leave it out, or stages_dir and patch parallelism."
        ) from error
    return {
        "prompt": digest(text),
        "seed": digest([states, request.latents]),
        "image": digest(request.pixels),
        "steps, guidance or other setting": settings,
        "upscaler": _upscaler(request.upscaler),
        "model": pipeline_digest(pipe),
        "text encoder": digest(_text_encoders(pipe, request)),
    }


def check_agreement(pipe: Any, request: Request, groups: Iterable[ProcessGroup]) -> None:
    """Refuse a request that is not the same on all ranks; all must call this.

    Compared are versions, sizes, prompts, seeds, settings and a sample of every weight.

    Args:
        request: as all ranks should have it.
        groups: this rank's in each dimension of the mesh.

    Raises:
        ValueError: on every rank; what differs and on which ranks is named.
    """
    facts = versions() | {"size or stages": ", ".join(stage.name for stage in request.stages)}
    facts |= request_identity(pipe, request)
    del facts["model"], facts["text encoder"]  # which not every rank has
    facts |= {name: digest(part) for name, part in _parts(pipe).items()}
    for group in groups:
        agree(RankGroup(group), facts)


def pipeline_digest(pipe: Any) -> str:
    """A digest of what generates: transformer, its attention, autoencoder and scheduler."""
    return digest(list(_parts(pipe).values()))


def _parts(pipe: Any) -> dict[str, Any]:
    transformer = unwrapped(pipe.transformer)
    state = ClearState.on(transformer)
    if state is not None:
        state.decide_far(transformer)  # which is in what processors say of themselves
    return {
        "attention": {
            name: repr(attn.processor).split(" at 0x")[0]
            for name, attn in attention_layers(transformer).items()
        },
        "scheduler": {name: str(value) for name, value in pipe.scheduler.config.items()},
        "strength of adapters": _scales(transformer),
        "transformer weights or adapter": _model(transformer),
        "autoencoder": _model(unwrapped(pipe.vae)),
    }


def _text_encoders(pipe: Any, request: Request) -> dict[str, Any]:
    """What makes the embeddings, where a request has none; ERNIE-Image's "pe" rewrites prompts."""
    if request.options.get("prompt_embeds") is not None:
        return {}
    return {
        name: _model(unwrapped(part))
        for name, part in pipe.components.items()
        if name.startswith(("text_encoder", "prompt_upsampler", "pe"))
        and isinstance(part, nn.Module)
    }


def _upscaler(upscaler: Any) -> str:
    """A digest of what enlarges images.

    Raises:
        ValueError: of a function nothing tells whether it is the same as another.
    """
    if isinstance(upscaler, nn.Module):
        return digest([type(upscaler).__qualname__, _model(upscaler)])
    if upscaler is None or isinstance(upscaler, Upscaler):
        return digest(upscaler and upscaler.digest)
    raise ValueError(
        f"CLEARPipeline: cannot tell whether an upscaler that is a {type(upscaler).__name__} is "
        "the same as another; give a torch.nn.Module or load_upscaler's, or leave out stages_dir "
        "and patch parallelism."
    )


def _scales(model: nn.Module) -> Any:
    """How strongly LoRAs and IP-adapters act; no parameter tells."""
    found = {}
    for name, module in model.named_modules():
        adapter = getattr(module, "adapter", None) or module
        values = [getattr(adapter, key, None) for key in ("scaling", "active_adapters", "scale")]
        if isinstance(values[0], dict) or isinstance(values[2], list):
            found[name] = [str(value) for value in values]
    return found


def _model(model: nn.Module) -> Any:
    plain = (nn.Parameter, torch.Tensor)
    return {
        name: [
            str(parameter.dtype),
            list(parameter.shape),
            # Without values in reach (meta device, quantised) the shape has to do.
            parameter.detach().flatten()[:VALUES]
            if type(parameter.data) in plain and not parameter.is_meta
            else None,
        ]
        for name, parameter in model.named_parameters()
    }
