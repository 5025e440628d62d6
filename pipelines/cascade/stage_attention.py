"""Full attention for one stage: with the stock weights where CLEAR runs, or with two positions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from clear_dit.attention.processor import CLEARProcessor, FluxAttnProcessor
from clear_dit.families.table import attention_layers
from clear_dit.weights.format import refuse_unsuitable
from clear_dit.weights.forward import changed_in_forwards, other_attributes
from clear_dit.weights.state import ClearState, originals_of

from .step_caches import caches_on

logger: logging.Logger = logging.getLogger(__name__)

WHO = "CLEARPipeline: full attention at the native size"


def runs_clear(model: nn.Module) -> bool:
    """Whether any attention layer of a FLUX transformer has local attention."""
    return any(one.local for one in _clear_processors(model))


def pools_keys(model: nn.Module) -> bool:
    """Whether any attention layer of a FLUX transformer has the pooled keys of down_factor."""
    return any(one.down_factor > 1 for one in _clear_processors(model))


def _clear_processors(model: nn.Module) -> list[CLEARProcessor]:
    # Not while another thread's forward has others for a moment.
    with ClearState.attach(model).access.shared():
        processors = [attn.processor for attn in attention_layers(model).values()]
    return [processor for processor in processors if isinstance(processor, CLEARProcessor)]


def keeps_between_forwards(model: nn.Module) -> bool:
    """Whether a model keeps what belongs to one image from forward to forward.

    Step caches do, and ranks that share images: no other image may come between.
    """
    state = ClearState.on(model)
    shared = state is not None and state.sharing is not None
    return shared or bool(caches_on(model))


def can_run_full(model: nn.Module) -> bool:
    """Whether `full_attention` can put the stock weights back, where CLEAR weights are loaded.

    Raises:
        ValueError: it cannot, as somebody changed the model's weights since.
    """
    originals = originals_of(model)
    if not originals or originals.are_back or originals.are_quantised:
        return True
    try:
        refuse_unsuitable(model, WHO, merged_lora=True)
        originals.refuse_lost(WHO)
    except ValueError as error:
        logger.info("CLEAR runs in every stage of the cascade: %s", error)
        return False
    # Not while another thread's stage has swapped them.
    with ClearState.attach(model).access.shared():
        originals.check(model, WHO)
    return True


@contextmanager
def full_attention(model: nn.Module) -> Iterator[None]:
    """Within it forwards in this thread have the processors and weights from before `apply_clear`.

    Where CLEAR weights are loaded, other threads' forwards wait until the end: the weights are
    swapped for all of it, and CLEAR's wait on the CPU. Afterwards they are what they were, bit for
    bit.
    """
    state = ClearState.attach(model)
    state.prepare(model)
    with ExitStack() as stack:
        if state.originals:
            stack.enter_context(state.access.exclusive())
            stack.enter_context(state.originals.back(model, WHO))
        stack.enter_context(changed_in_forwards(model, _stock_processors))
        yield


@contextmanager
def _stock_processors(model: nn.Module) -> Iterator[None]:
    state = ClearState.attach(model)
    stock = {
        attn: state.processors.get(name) or FluxAttnProcessor()
        for name, attn in attention_layers(model).items()
        if isinstance(attn.processor, CLEARProcessor)
    }
    with other_attributes("processor", stock):
        yield
