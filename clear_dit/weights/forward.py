"""A model's forward under CLEAR: what belongs to the call is found here, and ends with it.

It stands below all hooks (see `Innermost`), in the place of the class's `forward`: whoever calls
the model, or its `forward` directly as PEFT does, comes by here, and everything is given up again
whatever ends the call. A copy of the model has one of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from ..attention.processor import CLEARProcessor
from ..attention.tracker import CarryingCheckpoint, LayerRadii
from ..families.table import attention_layers, family_of
from ..hooks import Innermost, is_offloaded

# Attribute of a model that holds its `ClearState`.
STATE = "_clear_state"

STRICT_EXPORT = (
    "CLEAR: torch.export with strict=True cannot follow a model's forward under apply_clear; leave "
    "strict=False, its default."
)

# A context manager within which a model is otherwise.
Change = Callable[[nn.Module], AbstractContextManager[None]]

# What the calls of this thread change about models, for each forward and no longer.
_CHANGES: ContextVar[tuple[tuple[nn.Module, Change], ...]] = ContextVar(
    "clear_dit_changes", default=()
)


@contextmanager
def changed_in_forwards(model: nn.Module, change: Change) -> Iterator[None]:
    """Within it every forward of a model in this thread, and no other, finds it changed.

    Between forwards the model is as it was, and during one no other thread uses it.

    Args:
        model: has a `ClearState`.
        change: what is entered around each forward, later ones within earlier ones.
    """
    state, mine = vars(model)[STATE], object()
    token = _CHANGES.set((*_CHANGES.get(), (model, change)))
    try:
        state.calls.add(mine)
        yield
    finally:
        state.calls.discard(mine)
        _CHANGES.reset(token)


@contextmanager
def as_between_forwards() -> Iterator[None]:
    """Within it forwards in this thread find every model as it is between them.

    For what a call lets others run, such as a callback, which may generate images of its own.
    """
    token = _CHANGES.set(())
    try:
        yield
    finally:
        _CHANGES.reset(token)


@contextmanager
def other_attributes(name: str, values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within it an attribute of modules has other values.

    These stand before submodules of that name, which stay: other threads may be looking through
    the modules of the model.
    """
    before = {module: vars(module)[name] for module in values if name in vars(module)}
    try:
        for module, value in values.items():
            vars(module)[name] = value
        yield
    finally:
        for module in values:
            if module in before:
                vars(module)[name] = before[module]
            else:
                vars(module).pop(name, None)


class ClearForward:
    """The forward of one model.

    Args:
        model: a transformer or ControlNet of a family.
        replaced: a forward of the instance's own that it takes the place of; None for the class's.
    """

    def __init__(self, model: nn.Module, replaced: Callable[..., Any] | None) -> None:
        self.model = model
        self.replaced = replaced

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.stock)

    @property
    def __code__(self) -> CodeType:
        """By which torch.export names what it traces."""
        return inspect.unwrap(type(self.model).forward).__code__

    def __get__(self, *_: Any) -> ClearForward:
        """As a bound method has it: cache-dit puts a forward back by it."""
        return self

    @property
    def stock(self) -> Callable[..., Any]:
        """The forward it stands for."""
        return self.replaced or type(self.model).forward.__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiled = torch.compiler.is_compiling()
        state = vars(self.model).get(STATE)
        if compiled and state is not None and state.is_idle:
            return self.stock(*args, **kwargs)  # compiled and exported whole
        if not torch.compiler.is_exporting():
            return self._run_outside_of_graphs(compiled, args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError(STRICT_EXPORT)
        return self._run(compiled, args, kwargs)

    def _run(self, compiled: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model, stock = self.model, self.stock
        state = vars(model).get(STATE)
        if state is None or self._is_within_another():
            return stock(*args, **kwargs)
        changes = [change for other, change in _CHANGES.get() if other is model]
        compiled = compiled or _has_compiled_blocks(model)
        state.prepare(model)
        with ExitStack() as stack:
            alone = changes or compiled or state.sharing is not None or _scales_adapters(kwargs)
            alone = alone or is_offloaded(model)  # one thread would take away another's weights
            stack.enter_context(state.access.exclusive() if alone else state.access.shared())
            for change in changes:
                stack.enter_context(change(model))
            stack.enter_context(state.own_weights(model))
            return self._call(state, compiled, args, kwargs)

    def _is_within_another(self) -> bool:
        """Whether somebody has wrapped it since, and `put_under` put another around that."""
        outermost = Innermost(self.model).forward
        return isinstance(outermost, ClearForward) and outermost is not self

    # What it calls may be compiled, but not this: it decides anew in every call.
    _run_outside_of_graphs = torch.compiler.disable(_run, recursive=False)

    def _call(
        self, state: Any, compiled: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        model = self.model
        call = state.read(model, args, kwargs)
        sharing = state.sharing
        if call is None and sharing is None:
            return self.stock(*args, **kwargs)
        given, share = state.by_name(args, kwargs), None
        if call is not None:
            given |= call.changes
        if sharing is not None:
            local = call if call is not None and call.is_local else None
            given, share = sharing.before(model, local, given)
        with ExitStack() as stack:
            if call is not None:
                forward = call.forward._replace(share=share)
                stack.enter_context(call.tracker.under_way(forward))
                _carry_into_checkpoints(model)
                if compiled:
                    layers = _radii_of_layers(model)
                    told = call.tracker.announced_to_compiled(forward, call.impl, layers)
                    stack.enter_context(told)
            if share is not None:
                stack.enter_context(sharing.cut(model, share))
            output = self.stock(**given)
        return output if sharing is None else sharing.after(output)


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Of what a model's forward takes by position; empty where its signature does not say."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(one.name for one in parameters if one.kind in kinds)


def _radii_of_layers(model: nn.Module) -> list[LayerRadii]:
    """Of the layers that run CLEAR."""
    processors = (attn.processor for attn in attention_layers(model).values())
    return [each.of_layer for each in processors if isinstance(each, CLEARProcessor)]


def _has_compiled_blocks(model: nn.Module) -> bool:
    """Whether torch.compile traces a block of the model."""
    return any(
        block._compiled_call_impl is not None or hasattr(block, "_orig_mod")
        for block in family_of(model).blocks(model).values()
    )


def _scales_adapters(given: Mapping[str, Any]) -> bool:
    """Whether diffusers scales the model's LoRAs for this forward, in place."""
    names = ("joint_attention_kwargs", "attention_kwargs")
    return any("scale" in (given.get(name) or ()) for name in names)


def _carry_into_checkpoints(model: nn.Module) -> None:
    """Let the layers find their forward when gradient checkpointing runs them again."""
    if not torch.is_grad_enabled():
        return
    for module, name in _checkpoints(model):
        stock = getattr(module, name)
        if not isinstance(stock, CarryingCheckpoint):
            setattr(module, name, CarryingCheckpoint(stock))


def _checkpoints(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Attributes that run something again in the backward pass: diffusers' and PyTorch's."""
    if getattr(model, "gradient_checkpointing", False):
        yield model, "_gradient_checkpointing_func"
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):
            yield module, "checkpoint_fn"


def put_under(model: nn.Module) -> None:
    """Put a `ClearForward` into a model's innermost forward."""
    place = Innermost(model)
    own = place.forward
    of_class = getattr(own, "__func__", None) is type(model).forward
    place.forward = ClearForward(model, None if of_class else own)


def is_bare(model: nn.Module) -> bool:
    """Whether a model's innermost forward, or what somebody has put over it, is not CLEAR's."""
    return not isinstance(Innermost(model).forward, ClearForward)


def take_away(model: nn.Module) -> None:
    """Take it out again. Where somebody has wrapped it since, it stays, and does nothing."""
    place = Innermost(model)
    if isinstance(place.forward, ClearForward):
        place.forward = place.forward.stock
    for module, name in _checkpoints(model):
        checkpoint = getattr(module, name)
        if isinstance(checkpoint, CarryingCheckpoint):
            setattr(module, name, checkpoint.stock)
