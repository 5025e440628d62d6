"""Forwards under hooks: diffusers and accelerate both wrap a module's `forward` in their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from .compat import names_from

(GROUP_OFFLOADING,) = names_from("diffusers.hooks.group_offloading", "_GROUP_OFFLOADING")
(LAYERWISE_CASTING,) = names_from("diffusers.hooks.layerwise_casting", "_LAYERWISE_CASTING_HOOK")

Result = TypeVar("Result")


class Innermost:
    """The forward of a module below all hooks, to be read and replaced.

    Hooks set before and after a replacement go on as they were, and can be removed in any order.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Whoever came first holds the original, the others a wrapper (`functools.update_wrapper`).
        places: list[tuple[Any, str]] = []
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry._fn_refs:
            first = registry._fn_refs[0]
            own = first.original_forward is not None  # the hook has a forward of its own
            places.append((first, "original_forward" if own else "forward"))
        if hasattr(module, "_old_forward"):  # accelerate's
            places.append((module, "_old_forward"))
        places.append((module, "forward"))
        # Where a stranger has wrapped the innermost itself, the outermost is all there is.
        self._holder, self._name = next(
            (place for place in places if not _is_wrapper(getattr(*place))), places[-1]
        )

    @property
    def forward(self) -> Callable[..., Any]:
        """What runs below all hooks."""
        return getattr(self._holder, self._name)

    @forward.setter
    def forward(self, forward: Callable[..., Any]) -> None:
        setattr(self._holder, self._name, forward)
        own = type(self.module).forward.__get__(self.module)
        if self._name == "forward" and self._holder is self.module and forward == own:
            del self.module.forward  # needs no entry of its own


def _is_wrapper(forward: Callable[..., Any]) -> bool:
    # A method is the module's own, also where diffusers has decorated it in the class.
    return hasattr(forward, "__wrapped__") and not isinstance(forward, MethodType)


def loaded_once(modules: Iterable[nn.Module], run: Callable[[], Result]) -> Result:
    """Run something that calls modules many times, with their offloaded weights brought once.

    The hooks of every offloaded submodule act once, around all of `run`: as they see it, their
    module is called once. Calls inside go past its hooks.

    Args:
        modules: they and their submodules are looked through, in order.
        run: calls them with tensors that are on the right device already.
    """
    return _nest([m for module in modules for m in module.modules() if _is_offloaded(m)], run)


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of a model are brought for each call of a module, and taken away after it.

    Those that are cast for each call are, too.
    """
    return any(map(_is_offloaded, model.modules()))


def _is_offloaded(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    kinds = (GROUP_OFFLOADING, LAYERWISE_CASTING)
    if registry is not None and any(registry.get_hook(kind) is not None for kind in kinds):
        return True
    return getattr(getattr(module, "_hf_hook", None), "offload", False)  # AlignDevicesHook's


def _nest(modules: list[nn.Module], run: Callable[[], Result]) -> Result:
    if not modules:
        return run()
    module, *rest = modules
    place = Innermost(module)
    stock = place.forward

    def inside() -> Result:
        hooked = module.forward
        module.forward = stock
        try:
            return _nest(rest, run)
        finally:
            module.forward = hooked

    place.forward = inside
    try:
        return module.forward()
    finally:
        place.forward = stock
