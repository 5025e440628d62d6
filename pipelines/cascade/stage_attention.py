"""Full attention for one stage: with the stock weights where CLEAR runs, or with two positions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from clear_dit.attention.processor import CLEARProcessor, FluxAttnProcessor
from clear_dit.families.table import attention_layers
from clear_dit.weights.format import refuse_unsuitable
from clear_dit.weights.state import ClearState, originals_of

logger = logging.getLogger(__name__)

WHO = "CLEARFluxPipeline: full attention at the native size"


def runs_clear(model: nn.Module) -> bool:
    """Whether any attention layer of a FLUX transformer has local attention."""
    processors = [attn.processor for attn in attention_layers(model).values()]
    return any(isinstance(one, CLEARProcessor) and one.local for one in processors)


def pools_keys(model: nn.Module) -> bool:
    """Whether any attention layer of a FLUX transformer has the pooled keys of down_factor."""
    processors = [attn.processor for attn in attention_layers(model).values()]
    return any(isinstance(one, CLEARProcessor) and one.down_factor > 1 for one in processors)


def can_run_full(model: nn.Module) -> bool:
    """Whether `full_attention` can put the stock weights back, where CLEAR weights are loaded.

    Raises:
        ValueError: it cannot, as somebody changed the model's weights since.
    """
    originals = originals_of(model)
    if not originals:
        return True
    try:
        refuse_unsuitable(model, WHO, merged_lora=True)
        originals.refuse_lost(WHO)
    except ValueError as error:
        logger.info("CLEAR runs in every stage of the cascade: %s", error)
        return False
    originals.check(model, WHO)
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
    with originals_of(model).back(model, WHO):
        try:
            for name, attn in layers.items():
                if isinstance(attn.processor, CLEARProcessor):
                    attn.set_processor(stock.get(name) or FluxAttnProcessor())
            yield
        finally:
            for name, attn in layers.items():
                attn.set_processor(processors[name])
