"""Full attention for one stage: with the stock weights where CLEAR runs, or with two positions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from clear_dit.attention.processor import CLEARProcessor, FluxAttnProcessor
from clear_dit.families.table import attention_layers
from clear_dit.weights.format import parameters_by_key, refuse_unsuitable
from clear_dit.weights.state import ClearState

logger = logging.getLogger(__name__)


def runs_clear(model: nn.Module) -> bool:
    """Whether any attention layer of a FLUX transformer has local attention."""
    processors = [attn.processor for attn in attention_layers(model).values()]
    return any(isinstance(one, CLEARProcessor) and one.local for one in processors)


def pools_keys(model: nn.Module) -> bool:
    """Whether any attention layer of a FLUX transformer has the pooled keys of down_factor."""
    processors = [attn.processor for attn in attention_layers(model).values()]
    return any(isinstance(one, CLEARProcessor) and one.down_factor > 1 for one in processors)


def can_run_full(model: nn.Module) -> bool:
    """Whether `full_attention` can put the stock weights back, where CLEAR weights are loaded."""
    state = ClearState.on(model)
    if state is None or not state.weights:
        return True
    try:
        refuse_unsuitable(model, "full attention at the native size")
    except ValueError as error:
        logger.info("CLEAR runs in every stage of the cascade: %s", error)
        return False
    return True


@contextmanager
def full_attention(model: nn.Module) -> Iterator[None]:
    """Within it the processors and weights are those from before `apply_clear`.

    Afterwards they are what they were, bit for bit. CLEAR weights wait on the CPU meanwhile.
    """
    layers, state = attention_layers(model), ClearState.on(model)
    if state is not None:
        state.reconcile(model)
    processors = {name: attn.processor for name, attn in layers.items()}
    stock = {} if state is None else state.processors
    weights = {} if state is None else state.weights
    parameters = parameters_by_key(model) if weights else {}
    tuned = {key: parameters[key].detach().to("cpu", copy=True) for key in weights}
    try:
        _copy_into(parameters, weights)
        for name, attn in layers.items():
            if isinstance(attn.processor, CLEARProcessor):
                attn.set_processor(stock.get(name) or FluxAttnProcessor())
        yield
    finally:
        for name, attn in layers.items():
            attn.set_processor(processors[name])
        _copy_into(parameters, tuned)


@torch.no_grad()
def _copy_into(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for key, value in values.items():
        parameters[key].copy_(value)
