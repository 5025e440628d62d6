"""Teacher and student in one backbone: they share every weight that does not differ.

The teacher is the student with other attention: diffusers' own, with the projections as they were.
Those are held twice (1.79 of FLUX.1-dev's 11.9 billion parameters); under LoRA not even those,
since the base layers below the LoRA are the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..attention.processor import FluxAttnProcessor, Rotary
from ..families.table import family_of
from ..weights.forward import changed_in_forwards, other_attributes
from ..weights.state import ClearState

# The name under which an attention layer keeps its frozen copies, so that they move, and are
# sharded, with it.
COPIES = "teacher"


class TeacherProcessor:
    """Full attention with given projections instead of the layer's own.

    Args:
        projections: to_q, to_k, to_v, and to_out in a double block.
        stock: the processor that computes it.
    """

    # diffusers sets these on any processor.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, projections: dict[str, Any], stock: Any) -> None:
        self.projections, self.stock = projections, stock

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What `FluxAttnProcessor` computes; same arguments and result."""
        layer = _Overridden(attn, self.projections)
        return self.stock(
            layer, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


class _Overridden:
    """An attention layer some of whose modules are others."""

    def __init__(self, attn: Any, modules: dict[str, Any]) -> None:
        self.__dict__.update(modules, _attn=attn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


class Teacher:
    """The stock model inside a student.

    Args:
        model: a FLUX transformer with CLEAR on all layers, before anything is trained; a LoRA for
            the student is there already.
        stock: the processor of full attention; diffusers' own where None.

    Adds frozen copies of the projections to the model's layers; `detach` takes them away.
    """

    def __init__(self, model: nn.Module, stock: Any = None) -> None:
        family = family_of(model)
        family.require("distil", "Teacher")
        stock = FluxAttnProcessor() if stock is None else stock
        ClearState.attach(model)
        self._model, self.layers = model, family.layers(model)
        self.processors = {
            name: TeacherProcessor(_projections(attn), stock) for name, attn in self.layers.items()
        }

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Inside, forwards of the model are the teacher's, without gradients."""
        with changed_in_forwards(self._model, self._change), torch.no_grad():
            yield

    def _change(self, model: nn.Module) -> AbstractContextManager[None]:
        return other_attributes(
            "processor", {attn: self.processors[name] for name, attn in self.layers.items()}
        )

    def detach(self) -> None:
        """Remove the frozen copies."""
        for attn in self.layers.values():
            if hasattr(attn, COPIES):
                delattr(attn, COPIES)


def _projections(attn: Any) -> dict[str, Any]:
    linears = {name: getattr(attn, name) for name in ("to_q", "to_k", "to_v")}
    if hasattr(attn, "to_out"):
        linears["to_out"] = attn.to_out[0]
    bases = {name: getattr(linear, "base_layer", None) for name, linear in linears.items()}
    if all(base is None for base in bases.values()):
        copies = nn.ModuleDict({name: _frozen_copy(each) for name, each in linears.items()})
        attn.add_module(COPIES, copies)
        bases = dict(copies.items())
    found: dict[str, Any] = dict(bases)
    if "to_out" in found:
        found["to_out"] = [found["to_out"], attn.to_out[1]]
    return found


def _frozen_copy(linear: nn.Linear) -> nn.Linear:
    """Not `deepcopy`, which would copy the mode of fake tensors too."""
    has_bias = linear.bias is not None
    twin = nn.Linear(linear.in_features, linear.out_features, has_bias, device="meta")
    for name, parameter in linear.named_parameters():
        setattr(twin, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return twin
