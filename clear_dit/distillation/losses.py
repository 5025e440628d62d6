"""The three terms of CLEAR's distillation (arXiv 2412.16112, section 3.3), and their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import RequestError

# The single blocks whose attention is compared, of FLUX's 38: 1, 5, 9, ..., 37.
FLUX_SINGLE_BLOCKS, FLUX_CHOSEN = 38, range(1, 38, 4)


class Losses(NamedTuple):
    """The weighted sum and its terms, before their weights; scalars in float32."""

    total: torch.Tensor
    flow: torch.Tensor
    output: torch.Tensor
    attention: torch.Tensor


def noisy(clean: torch.Tensor, noise: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - s) x_0 + s noise, for latents (batch, tokens, channels) and s (batch,)."""
    s = s[:, None, None]
    return (1 - s) * clean + s * noise


def distillation_losses(
    clean: torch.Tensor,
    noise: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    student_attention: Mapping[int, torch.Tensor],
    teacher_attention: Mapping[int, torch.Tensor],
    output_weight: float,
    attention_weight: float,
) -> Losses:
    """Flow matching, output distillation and attention distillation.

    flow = mse(student, noise - x_0); output = mse(student, teacher); attention = the mean over the
    chosen layers of mse(student's attention, teacher's attention). A mean is over all elements.

    Args:
        clean, noise: x_0 and the noise, (batch, tokens, channels).
        student, teacher: predicted velocities at the same x_t; the teacher's None if not needed.
        student_attention, teacher_attention: by layer, see `attention_outputs`.
        output_weight, attention_weight: 0.5 each in the paper; the flow term's is 1.
    """
    zero = torch.zeros((), device=student.device)
    flow = _mse(student, noise - clean)
    output = zero if teacher is None else _mse(student, teacher)
    attention = zero
    if teacher_attention:
        terms = [_mse(student_attention[i], teacher_attention[i]) for i in teacher_attention]
        attention = torch.stack(terms).mean()
    total = flow + output_weight * output + attention_weight * attention
    return Losses(total, flow, output, attention)


def _mse(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(one.float(), other.float())


@contextmanager
def attention_outputs(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the attention outputs of single blocks of a FLUX transformer, during one forward.

    Args:
        model: the transformer itself, without a wrapper.
        layers: indices of single blocks.

    Yields:
        A dict that the forward inside fills: layer to (batch, text + image, channels), what the
        block's attention gives to its output projection. With gradient checkpointing the block
        runs again in the backward pass, outside of this: those tensors are the first run's.
    """
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            found[layer] = output

        return hook

    blocks: Any = model.single_transformer_blocks
    handles = [blocks[layer].attn.register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def default_layers(single_blocks: int) -> tuple[int, ...]:
    """The paper's layers, at the same relative depths in a model of so many single blocks."""
    return tuple(sorted({layer * single_blocks // FLUX_SINGLE_BLOCKS for layer in FLUX_CHOSEN}))


def parse_layers(text: str | None, single_blocks: int) -> tuple[int, ...]:
    """Layers from "1,5,9", or the default ones.

    Raises:
        RequestError: not numbers of single blocks of the model.
    """
    if text is None:
        return default_layers(single_blocks)
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        layers = (-1,)
    if layers[0] < 0 or layers[-1] >= single_blocks:
        raise RequestError(
            f"--attention-layers must be numbers of single blocks from 0 to {single_blocks - 1}, "
            f"with commas between; got {text!r}."
        )
    return layers
