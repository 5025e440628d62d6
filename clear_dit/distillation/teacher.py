"""Teacher and student in one backbone: they share every weight that does not differ.

The teacher is the student with other attention: diffusers' own, with the projections as they were.
Those are held twice (1.79 of FLUX.1-dev's 11.9 billion parameters); under LoRA not even those,
since the base layers below the LoRA are the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..attention.processor import FluxAttnProcessor
from ..families.table import family_of
from ..weights.forward import changed_in_forwards, other_attributes
from ..weights.state import ClearState

# The name under which an attention layer keeps its frozen copies, so that they move, and are
# sharded, with it.
COPIES = "teacher"


class Teacher:
    """The stock model inside a student.

    Args:
        model: a family's transformer with CLEAR on all layers, before anything is trained; a LoRA
            for the student is there already.
        stock: the processor of full attention, for all layers; those that were there before CLEAR
            where None.

    Adds frozen copies of the projections to the model's layers; `detach` takes them away.
    """

    def __init__(self, model: nn.Module, stock: Any = None) -> None:
        family = family_of(model)
        before = ClearState.attach(model).processors
        self._model = model
        self.layers: dict[str, Any] = family.layers(model)
        # By attribute, what layers have instead.
        self._others: dict[str, dict[nn.Module, Any]] = {"processor": {}}
        for name, attn in self.layers.items():
            processor = stock or before.get(name) or FluxAttnProcessor()
            self._others["processor"][attn] = processor
            for attribute, other in _projections(attn, family.tuned_names(attn)).items():
                self._others.setdefault(attribute, {})[attn] = other

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, forwards of the model are the teacher's, without gradients."""
        with changed_in_forwards(self._model, self._change), torch.no_grad():
            yield

    @contextmanager
    def _change(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for attribute, others in self._others.items():
                stack.enter_context(other_attributes(attribute, others))
            yield

    def detach(self) -> None:
        """Remove the frozen copies."""
        for attn in self.layers.values():
            if hasattr(attn, COPIES):
                delattr(attn, COPIES)


def _projections(attn: Any, names: list[str]) -> dict[str, Any]:
    """The linear layers of these names as they are now, by the attribute they are in."""
    linears = {name: attn.get_submodule(name) for name in names}
    bases: dict[str, Any] = {
        name: getattr(linear, "base_layer", None) for name, linear in linears.items()
    }
    if all(base is None for base in bases.values()):
        bases = {name: _frozen_copy(each) for name, each in linears.items()}
        copies = {name.replace(".", "_"): each for name, each in bases.items()}
        attn.add_module(COPIES, nn.ModuleDict(copies))
    found: dict[str, Any] = {}
    for name, base in bases.items():
        attribute, _, place = name.partition(".")
        if place:  # to_out.0
            found.setdefault(attribute, list(getattr(attn, attribute)))[int(place)] = base
        else:
            found[attribute] = base
    return found


def _frozen_copy(linear: nn.Linear) -> nn.Linear:
    """Not `deepcopy`, which would copy the mode of fake tensors too."""
    has_bias = linear.bias is not None
    twin = nn.Linear(linear.in_features, linear.out_features, has_bias, device="meta")
    for name, parameter in linear.named_parameters():
        setattr(twin, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return twin
