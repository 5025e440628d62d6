"""A forward that has one rank's tokens, where `Family.cut` says so, and is whole again behind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from clear_dit.families.family import Cut
from clear_dit.families.table import family_of

from .attention import SharedImage


def cut_arguments(model: nn.Module, share: SharedImage, given: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, of which those of `Cut.arguments` are this rank's part."""
    cut = family_of(model).cut
    return _own_parts(share, cut, cut.arguments, given)


@contextmanager
def cut_inside(model: nn.Module, share: SharedImage) -> Iterator[None]:
    """Within it modules of a model take and return what a `Cut` says."""
    family = family_of(model)
    cut = family.cut

    def output_cut(_: nn.Module, given: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return _own_part(share, cut, out[0]), *out[1:]
        return _own_part(share, cut, out)

    def inputs_cut(
        names: tuple[str, ...], module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        bound = inspect.signature(module.forward).bind(*given, **named)
        bound.arguments |= _own_parts(share, cut, names, bound.arguments)
        return bound.args, bound.kwargs

    def whole(_: nn.Module, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if cut.tokens_first:
            return share.whole_image(out.transpose(0, 1)).transpose(0, 1)
        return share.whole_image(out, cut.image_last)

    handles: list[Any] = []
    with ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        if cut.output_of is not None:
            module = model.get_submodule(cut.output_of)
            handles.append(module.register_forward_hook(output_cut))
        modules = {model.get_submodule(name): names for name, names in cut.inputs.items()}
        for block in family.blocks(model).values() if cut.of_blocks else ():
            modules[block] = (*modules.get(block, ()), *cut.of_blocks)
        handles += [
            module.register_forward_pre_hook(partial(inputs_cut, names), with_kwargs=True)
            for module, names in modules.items()
        ]
        last = model.get_submodule(cut.whole_after)
        handles += [
            module.register_forward_hook(whole)
            for module in (last.values() if isinstance(last, nn.ModuleDict) else [last])
        ]
        yield


def _own_parts(
    share: SharedImage, cut: Cut, names: tuple[str, ...], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name, of which those of these names are this rank's part."""
    return {
        name: _own_part(share, cut, value) if name in names else value
        for name, value in given.items()
    }


def _own_part(share: SharedImage, cut: Cut, given: Any) -> Any:
    """This rank's part of tokens, or of each in a list or a dict; None where there are none."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {key: _own_part(share, cut, tokens) for key, tokens in given.items()}
    if isinstance(given, (list, tuple)):
        return [_own_part(share, cut, tokens) for tokens in given]
    if given.ndim == 1:
        return share.own_part(given[None], cut.image_last)[0]
    return share.own_part(given, cut.image_last)
