"""Layers whose processors diffusers replaced, or moved, since CLEAR was applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..attention.processor import LEARNED, CLEARProcessor
from ..attention.tracker import WindowTracker
from ..families.table import attention_layers, family_of


def reconcile(state: Any, model: nn.Module) -> list[str]:
    """Put CLEAR's processors back where diffusers took them away as a matter of course.

    It does so when it loads or unloads an IP-adapter, and in some families when it fuses
    projections or unfuses them: a layer then has a stock processor for what it does now, or
    one of CLEAR's made again without its settings.

    Layers in other places, since blocks were removed, moved or added, are found again.

    Args:
        state: the model's `ClearState`; what it says of its layers is brought up to date.

    Returns:
        The names of layers that have another processor for no such reason.

    Raises:
        ValueError: a layer with CLEAR is inside of something strange.
    """
    if not state.installed:
        return []
    _keep_stock_to_unfuse(state, model)
    layers, family, others = attention_layers(model), family_of(model), list[str]()
    _find_again(state, model, layers)
    earlier = _tracker_set_again(layers)
    if earlier is not None:
        state.tracker = earlier
    # One for all layers comes by set_attn_processor; diffusers makes one for each.
    distinct = len({id(attn.processor) for attn in layers.values()}) > 1 or len(layers) == 1
    for name, attn in layers.items():
        current, installed = attn.processor, state.installed.get(name)
        kind = type(current).__name__
        if not getattr(current, "blank", True) and (
            installed is None or current.settings == installed.settings
        ):
            installed = current  # a copy's parameters are its own
        if installed is None:
            others.append(name)
            continue
        if current is state.installed.get(name) or state.is_given_up(name, current):
            continue
        if hasattr(type(current), "for_layer"):
            if earlier is None:
                current = _like(state, installed, type(current), current)
            _install(state, name, attn, current, current.stock())
        elif isinstance(current, CLEARProcessor):
            continue  # somebody's own
        elif kind in family.processors and (
            kind != next(iter(family.processors))
            or (distinct and family.was_undone(model, installed))
        ):
            new = _like(state, installed, family.processors[kind], current)
            _install(state, name, attn, new, current)
        else:
            others.append(name)
    return others


def _find_again(state: Any, model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Go by the layers there are: blocks may have been removed, moved, copied or wrapped.

    Raises:
        ValueError: of a wrapper, in which CLEAR would run unseen.
    """
    names = {id(processor): name for name, processor in state.installed.items()}
    hidden = names.keys() - {id(attn.processor) for attn in layers.values()}
    hidden &= {id(module) for module in model.modules()}
    if hidden:
        name = names[hidden.pop()]
        block = model.get_submodule(".".join(name.split(".")[:2]))
        raise ValueError(
            f"CLEAR: {name} was wrapped since apply_clear, in a {type(block).__name__} of "
            f"{type(block).__module__}; unwrap it, or call remove_clear before wrapping."
        )
    installed, processors = dict[str, Any](), dict[str, Any]()
    of_class = {type(one): state.processors.get(name) for name, one in state.installed.items()}
    for name, attn in layers.items():
        current = attn.processor
        before = name if current is state.installed.get(name) else names.get(id(current), name)
        if before in state.installed:
            installed[name] = state.installed[before]
        stock = state.processors.get(before, of_class.get(type(current)))
        if stock is not None:
            processors[name] = stock
    state.installed, state.processors = installed, processors


def _like(state: Any, installed: CLEARProcessor, cls: Any, current: Any) -> Any:
    """A processor for what `current` does, with the installed one's settings and parameters."""
    new = cls.for_layer(installed, state.tracker, current)
    for learned in LEARNED:
        setattr(new, learned, getattr(installed, learned))
    new.layer_radii = installed.layer_radii
    return new


def _install(state: Any, name: str, attn: Any, new: Any, stock: Any) -> None:
    attn.set_processor(new)
    state.installed[name] = new
    state.processors[name] = stock or state.processors[name]


def _tracker_set_again(layers: Mapping[str, Any]) -> WindowTracker | None:
    """That of processors of an earlier `apply_clear`, where every layer has such again."""
    processors = [attn.processor for attn in layers.values()]
    if any(getattr(processor, "blank", True) for processor in processors):
        return None
    trackers = {id(processor.tracker): processor.tracker for processor in processors}
    return next(iter(trackers.values())) if len(trackers) == 1 else None


def _keep_stock_to_unfuse(state: Any, model: nn.Module) -> None:
    """Have stock processors come back with unfused projections, not CLEAR's of today."""
    kept = getattr(model, "original_attn_processors", None) or {}
    for key, processor in kept.items():
        if hasattr(type(processor), "for_layer"):
            kept[key] = processor.stock() or state.processors[key.removesuffix(".processor")]
