"""Telling pipelines apart: whether stages in a folder were painted by the one at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .stage_files import digest

# Of every parameter; other weights and adapters change them.
VALUES = 16


def pipeline_digest(pipe: Any) -> str:
    """A digest of what paints: transformer, its attention, autoencoder and scheduler."""
    processors = pipe.transformer.attn_processors
    return digest(
        [
            {name: repr(processor).split(" at 0x")[0] for name, processor in processors.items()},
            {name: str(value) for name, value in pipe.scheduler.config.items()},
            _model(pipe.transformer),
            _model(pipe.vae),
        ]
    )


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
