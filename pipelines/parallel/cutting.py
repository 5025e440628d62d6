"""A forward that has one rank's tokens, where `Family.cut` says so, and is whole again behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from clear_dit.families.table import family_of

from .attention import SharedImage


def cut_arguments(model: nn.Module, share: SharedImage, given: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, of which those of `Cut.arguments` are this rank's part."""
    names = family_of(model).cut.arguments
    return {
        name: _own_part(share, value) if name in names else value for name, value in given.items()
    }


@contextmanager
def cut_inside(model: nn.Module, share: SharedImage) -> Iterator[None]:
    """Within it modules of a model take and return what a `Cut` says."""
    family = family_of(model)
    cut = family.cut

    def first_cut(tokens: Any) -> Any:
        if isinstance(tokens, tuple):
            return share.own_part(tokens[0]), *tokens[1:]
        return share.own_part(tokens)

    def named_cut(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return given, {
            name: _own_part(share, value) if name in cut.of_blocks else value
            for name, value in named.items()
        }

    def whole(_: nn.Module, given: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if cut.tokens_first:
            return share.whole_image(out.transpose(0, 1)).transpose(0, 1)
        return share.whole_image(out)

    handles: list[Any] = []
    with ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in handles])
        if cut.output_of is not None:
            module = model.get_submodule(cut.output_of)
            handles.append(module.register_forward_hook(lambda _, given, out: first_cut(out)))
        if cut.input_of is not None:
            module = model.get_submodule(cut.input_of)
            handles.append(module.register_forward_pre_hook(lambda _, given: first_cut(given)))
        handles += [
            block.register_forward_pre_hook(named_cut, with_kwargs=True)
            for block in (family.blocks(model).values() if cut.of_blocks else ())
        ]
        last = model.get_submodule(cut.whole_after)
        handles += [
            module.register_forward_hook(whole)
            for module in (last.values() if isinstance(last, nn.ModuleDict) else [last])
        ]
        yield


def _own_part(share: SharedImage, given: Any) -> Any:
    """This rank's part of tokens, or of each in a list or a dict; None where there are none."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {key: share.own_part(tokens) for key, tokens in given.items()}
    if isinstance(given, (list, tuple)):
        return [share.own_part(tokens) for tokens in given]
    return share.own_part(given)
