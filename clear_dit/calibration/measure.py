"""The error that local attention of one layer causes, at every radius, all others being full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..attention.processor import CLEARProcessor
from ..families.table import attention_layers, family_of
from ..kernels.window import EVERYTHING
from ..weights.forward import other_attributes
from ..weights.state import ClearState
from .forwards import ForwardOf, predicted, relative_error


class LayerErrors:
    """Measures a model that runs CLEAR with one radius, and for a time others.

    Blocks before the layer that is measured are not computed again: what they gave is replayed.

    Args:
        model: a transformer after `apply_clear`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = family_of(model).blocks(model)

    @property
    def layers(self) -> list[str]:
        """Names, in their order."""
        return list(attention_layers(self._model))

    @contextmanager
    def radii(self, radii: Mapping[str, int]) -> Iterator[None]:
        """Within it layers have these radii, and those that are not named see everything."""
        # Those of now: `apply_clear` makes new ones.
        processors: dict[str, CLEARProcessor] = {
            name: attn.processor for name, attn in attention_layers(self._model).items()
        }
        before = {name: processor.layer_radii for name, processor in processors.items()}
        try:
            for name, processor in processors.items():
                intervals = len(processor.radii.levels) + 1
                processor.layer_radii = (radii.get(name, EVERYTHING),) * intervals
            yield
        finally:
            for name, processor in processors.items():
                processor.layer_radii = before[name]

    def of(
        self,
        forward: ForwardOf,
        radii: Sequence[int],
        told: Callable[[], Any] = lambda: None,
    ) -> list[list[float]]:
        """Relative squared errors of the prediction, for every layer those of every radius.

        Args:
            told: called after each forward.
        """
        given: dict[nn.Module, Any] = {}

        def keep(block: nn.Module, _: Any, output: Any) -> None:
            given[block] = output

        with ExitStack() as stack, self.radii({}):
            for block in self._blocks.values():
                stack.callback(block.register_forward_hook(keep).remove)
            expected = predicted(self._model, forward)
        names, errors = list(self._blocks), []
        for layer in self.layers:
            own = next(name for name in names if layer.startswith(f"{name}."))
            before = [self._blocks[name] for name in names[: names.index(own)]]
            replayed = {block: _giving(given[block]) for block in before}
            errors.append(list[float]())
            for radius in radii:
                with other_attributes("forward", replayed), self.radii({layer: radius}):
                    value = predicted(self._model, forward)
                errors[-1].append(relative_error(value, expected))
                told()
        return errors


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


@torch.no_grad()
def pairs(model: nn.Module, forward: ForwardOf, radii: Sequence[int]) -> list[int]:
    """Pairs of query and key that a layer attends over, at every radius."""
    state = ClearState.on(model)
    assert state is not None
    call = state.read(model, (), forward.given)
    assert call is not None
    layout = call.forward.layout
    return [call.tracker.window(layout, radius).attended_pairs() for radius in radii]
