"""The three terms of CLEAR's distillation (arXiv 2412.16112, section 3.3), and their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import RequestError
from ..families.table import attention_layers, family_of

# The single blocks whose attention is compared, of FLUX's 38: 1, 5, 9, ..., 37.
FLUX_SINGLE_BLOCKS, FLUX_CHOSEN = 38, range(1, 38, 4)


# By attention layer.
AttentionOutputs = Mapping[str, Sequence[torch.Tensor]]


class Losses(NamedTuple):
    """The weighted sum and its terms, before their weights; scalars in float32."""

    total: torch.Tensor
    flow: torch.Tensor
    output: torch.Tensor
    attention: torch.Tensor


def noisy(clean: torch.Tensor, noise: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - s) x_0 + s noise, for latents (batch, ...) and s (batch,)."""
    s = s.reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - s) * clean + s * noise


def distillation_losses(
    clean: torch.Tensor,
    noise: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    student_attention: AttentionOutputs,
    teacher_attention: AttentionOutputs,
    output_weight: float,
    attention_weight: float,
) -> Losses:
    """Flow matching, output distillation and attention distillation.

    flow = mse(student, noise - x_0); output = mse(student, teacher); attention = the mean over the
    chosen layers of mse(student's attention, teacher's attention). A mean is over all elements.

    Args:
        clean, noise: x_0 and the noise, (batch, ...).
        student, teacher: predicted velocities at the same x_t; the teacher's None if not needed.
        student_attention, teacher_attention: by layer, see `attention_outputs`.
        output_weight, attention_weight: 0.5 each in the paper; the flow term's is 1.
    """
    zero = torch.zeros((), device=student.device)
    flow = _mse(student, noise - clean)
    output = zero if teacher is None else _mse(student, teacher)
    attention = zero
    if teacher_attention:
        terms = [
            _mse_of_all(student_attention[name], outputs)
            for name, outputs in teacher_attention.items()
        ]
        attention = torch.stack(terms).mean()
    total = flow + output_weight * output + attention_weight * attention
    return Losses(total, flow, output, attention)


def _mse(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(one.float(), other.float())


def _mse_of_all(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Over all elements of several tensors."""
    count = sum(one.numel() for one in ones)
    pairs = zip(ones, others, strict=True)
    return torch.stack([_mse(one, other) * (one.numel() / count) for one, other in pairs]).sum()


@contextmanager
def attention_outputs(model: nn.Module, blocks: Sequence[int]) -> Iterator[AttentionOutputs]:
    """Collect the attention outputs of blocks of a transformer's last stack, during forwards.

    Args:
        model: the transformer itself, without a wrapper.
        blocks: their indices.

    Yields:
        A dict that the forwards inside fill: attention layer to what it returned in each of them,
        (batch, tokens, channels), of text and image apart where the layer returns them so. With
        gradient checkpointing a block runs again in the backward pass, outside of this: those
        tensors are the first run's.
    """
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            found.setdefault(name, []).extend(parts)

        return hook

    stack, _ = last_stack(model)
    prefixes = tuple(f"{stack}.{block}." for block in blocks)
    layers = attention_layers(model).items()
    chosen = [(name, attn) for name, attn in layers if name.startswith(prefixes)]
    handles = [attn.register_forward_hook(keep(name)) for name, attn in chosen]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def last_stack(model: nn.Module) -> tuple[str, int]:
    """Name of the last stack of blocks a transformer has, and how many there are."""
    stack = [name for name in family_of(model).stacks if len(getattr(model, name, ()))][-1]
    return stack, len(getattr(model, stack))


def default_layers(count: int) -> tuple[int, ...]:
    """The paper's layers, at the same relative depths in a stack of so many blocks."""
    return tuple(sorted({layer * count // FLUX_SINGLE_BLOCKS for layer in FLUX_CHOSEN}))


def parse_layers(text: str | None, stack: str, count: int) -> tuple[int, ...]:
    """Blocks from "1,5,9", or the default ones.

    Args:
        stack, count: see `last_stack`.

    Raises:
        RequestError: not numbers of blocks of the stack.
    """
    if text is None:
        return default_layers(count)
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        layers = (-1,)
    if layers[0] < 0 or layers[-1] >= count:
        raise RequestError(
            f"--attention-layers must be numbers of {stack} from 0 to {count - 1}, with commas "
            f"between; got {text!r}."
        )
    return layers
