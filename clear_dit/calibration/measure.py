"""What CLEAR costs and how far it moves a model's predictions, in the whole and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..attention.processor import CLEARProcessor
from ..attention.radii import Radii
from ..families.table import attention_layers, family_of
from ..kernels.window import EVERYTHING
from ..plugin import apply_clear
from ..weights.forward import other_attributes
from ..weights.state import ClearState
from .forwards import ForwardOf, Trajectory, predicted, relative_error


class Measure:
    """Measures how far CLEAR moves a model's predictions: squared errors, relative.

    Args:
        model: a transformer; it runs CLEAR from then on, until `remove_clear`.
        base: radius of the uniform window, in tokens.
        far: whether with far keys.
    """

    def __init__(self, model: nn.Module, base: int, far: bool) -> None:
        apply_clear(model, radius=base, far=far)
        self._model, self._far = model, far
        self._blocks = family_of(model).blocks(model)
        self._expected: dict[int, torch.Tensor] = {}  # by the forward

    @property
    def names(self) -> list[str]:
        """Of the layers, in their order."""
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

    def whole(self, radii: Radii, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """Mean errors of all layers together, (trajectories, intervals)."""
        apply_clear(self._model, radius=radii, far=self._far)
        found = [
            [np.mean([self._error(forward) for forward in part]) for part in each.points]
            for each in trajectories
        ]
        return np.array(found)

    def changes(
        self,
        forward: ForwardOf,
        about: Mapping[str, int],
        tried: Sequence[Sequence[int]],
        told: Callable[[], Any] = lambda: None,
    ) -> list[list[float]]:
        """Errors when one layer changes: for every layer those of every radius tried for it.

        Blocks before the layer are not computed again: what they gave is replayed.

        Args:
            about: radii of the other layers, see `radii`.
            tried: for every layer, in their order.
            told: called after each forward.
        """
        given: dict[nn.Module, Any] = {}

        def keep(block: nn.Module, _: Any, output: Any) -> None:
            given[block] = output

        with ExitStack() as stack, self.radii(about):
            for block in self._blocks.values():
                stack.callback(block.register_forward_hook(keep).remove)
            predicted(self._model, forward)
        names, errors = list(self._blocks), []
        for layer, radii in zip(self.names, tried, strict=True):
            own = next(name for name in names if layer.startswith(f"{name}."))
            before = [self._blocks[name] for name in names[: names.index(own)]]
            replayed = {block: _giving(given[block]) for block in before}
            errors.append(list[float]())
            for radius in radii:
                changed = {**about, layer: radius}
                with other_attributes("forward", replayed), self.radii(changed):
                    errors[-1].append(self._error(forward))
                told()
        return errors

    def _error(self, forward: ForwardOf) -> float:
        if id(forward) not in self._expected:
            with self.radii({}):
                self._expected[id(forward)] = predicted(self._model, forward).cpu()
        value = predicted(self._model, forward).cpu()
        return relative_error(value, self._expected[id(forward)])

    @torch.no_grad()
    def pairs(self, forward: ForwardOf, radii: Sequence[int]) -> list[int]:
        """Pairs of query and key that a layer attends over, at every radius."""
        state = ClearState.on(self._model)
        assert state is not None
        call = state.read(self._model, (), forward.given)
        assert call is not None
        layout = call.forward.layout
        return [call.tracker.window(layout, radius).attended_pairs() for radius in radii]


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
