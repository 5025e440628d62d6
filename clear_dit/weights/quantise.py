"""Linear layers in 8 and 4 bits, by torchao.

On a GPU the layers that take the time multiply in 8 or 4 bits: tokens are rounded, a scale for each
row, on their way into a product. That pays where rounding and product are compiled together, which
happens here, layer by layer, and in chunks of rows, so that what lies between them stays small.
On a CPU int8 is of the weights alone, which takes less memory and no less time.
Which layers those are is the family's to say, see `linears_of`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..attention.norm_rope import HAS_TRITON
from ..chunking import by_chunks
from ..compat import release
from ..families.precision import linear_layers, linears_of
from ..families.table import transformer_of
from ..hooks import is_offloaded
from ..log_levels import at_level
from .changing import changing
from .format import parameters_by_key
from .state import originals_of

WHO = "quantize"
# The least torchao whose configurations are those of `_configurations`; as in pyproject.toml.
MINIMUM_TORCHAO = "0.15"
# Rows in a product: enough to fill any GPU, and 12288 channels of them take 0.2 GB in int32.
CHUNK_ROWS = 4096
# On a GPU a product of int8 has more than 16 rows; a short prompt may have fewer.
LEAST_ROWS = 32
STATEMENT = "_clear_dit_quantised"

logger: logging.Logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """A way to quantise.

    Attributes:
        capability: the least of an NVIDIA GPU.
        hardware: such GPUs, for people.
        bits: of a weight.
        any_dtype: whether it also runs where weights and activations are not bfloat16.
        on_cpu: whether a CPU runs it.
    """

    capability: tuple[int, int]
    hardware: str
    bits: int
    any_dtype: bool = False
    on_cpu: bool = False


KINDS = {
    "int8": Kind((8, 0), "Ampere (A100, RTX 30) or newer", 8, any_dtype=True, on_cpu=True),
    "fp8": Kind((8, 9), "Ada or Hopper (RTX 40, H100) or newer", 8),
    "nvfp4": Kind((10, 0), "Blackwell (B200, RTX 50)", 4),
}


@dataclass(frozen=True)
class Quantised:
    """What was quantised in a model, so that it can be done again.

    Attributes:
        kind: one of KINDS.
        torchao: its version.
        layers: torchao's configuration, as its own JSON, to the names of its layers.
        wide: names of linear layers that stay as they were, to why.
    """

    kind: str
    torchao: str
    layers: Mapping[str, tuple[str, ...]]
    wide: Mapping[str, str]

    def statement(self) -> dict[str, Any]:
        """For the metadata of an image: digests of the names, one in a line, in their order."""
        return {
            "kind": self.kind,
            "torchao": self.torchao,
            "layers": [
                {"configuration": json.loads(text), "count": len(names), "sha256": _digest(names)}
                for text, names in self.layers.items()
            ],
            "wide": {"count": len(self.wide), "sha256": _digest(self.wide)},
        }


def _digest(names: Any) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def quantised(model: nn.Module) -> Quantised | None:
    """What `quantize` did to a model."""
    return getattr(model, STATEMENT, None)


def check_kind(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what a device or an installation lacks.

    Args:
        device: that will run the model.
        dtype: of its weights and activations.

    Raises:
        ValueError: which device, what the kind needs and what to use instead; in one line.
    """
    if kind not in KINDS:
        raise ValueError(f"{WHO}: kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    needs = KINDS[kind]
    if find_spec("torchao") is None or release(metadata.version("torchao")) < release(
        MINIMUM_TORCHAO
    ):
        raise ValueError(
            f"{WHO}: {kind} needs torchao {MINIMUM_TORCHAO} or newer; run: "
            "pip install 'clear-dit[quantize]'."
        )
    if device.type == "cpu" and needs.on_cpu:
        return
    if device.type != "cuda" or torch.version.hip is not None:
        way = "Use int8" if device.type == "cpu" else "Go without"
        raise ValueError(
            f"{WHO}: {kind} needs an NVIDIA GPU, {needs.hardware}; the device is {device}. {way}."
        )
    have = torch.cuda.get_device_capability(device)
    if have < needs.capability:
        fitting = [name for name, other in KINDS.items() if other.capability <= have]
        raise ValueError(
            f"{WHO}: {kind} needs compute capability {_shown(needs.capability)}, "
            f"{needs.hardware}; {torch.cuda.get_device_name(device)} has {_shown(have)}. "
            + (f"Use {fitting[-1]}." if fitting else "Go without.")
        )
    if not needs.any_dtype and dtype != torch.bfloat16:
        raise ValueError(
            f"{WHO}: {kind} needs weights in bfloat16, got {str(dtype).removeprefix('torch.')}; "
            "use bfloat16, or int8."
        )
    if not HAS_TRITON:
        raise ValueError(
            f"{WHO}: {kind} compiles its products with Triton, which is not installed; run: "
            "pip install 'clear-dit[gpu]'."
        )


def _shown(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def quantize(pipe_or_model: Any, kind: str, device: torch.device | str | None = None) -> Quantised:
    """Quantise the linear layers of a transformer, for good.

    Call it after CLEAR weights are loaded (what these replaced is kept, quantised like them, for
    stages of full attention), LoRAs are fused and projections are fused, none of which
    can be done to quantised layers, and before offloading. A LoRA that is not fused may come before
    or after. A model that waits on the CPU is quantised layer by layer on the device that will run
    it, which never holds more of it than a layer.

    Args:
        pipe_or_model: a pipeline of a family, or its transformer.
        kind: "int8", on NVIDIA GPUs from Ampere on (products of int8 with int8) and on a CPU
            (weights alone); "fp8", from Ada on (e4m3, a scale for each row); or "nvfp4", on
            Blackwell (blocks of 16, and a scale for each chunk of rows).
        device: that will run it; where the model is, if None.

    Returns:
        What was quantised.

    Raises:
        ValueError: an unknown kind, a device or an installation that lacks it, a model that is
            quantised or offloaded already.
    """
    model: Any = transformer_of(pipe_or_model, WHO)
    device = torch.device(model.device if device is None else device)
    check_kind(kind, device, model.dtype)
    _refuse_unsuitable(model)
    linears = linears_of(model)
    products, storage = _configurations(kind, device)
    layers: dict[str, tuple[str, ...]] = {}
    for configuration, names in ((products, linears.narrow), (storage, linears.stored)):
        if names:
            text = _as_json(configuration)
            layers[text] = layers.get(text, ()) + names
    done = Quantised(kind, metadata.version("torchao"), layers, dict(linears.wide))
    originals = originals_of(model)
    plain = originals.plain(model, WHO) if originals.loaded_here else {}
    with changing(model), _quiet():
        for names, configuration in ((linears.narrow, products), (linears.stored, storage)):
            for name in names:
                _quantise(model.get_submodule(name), configuration, device)
        for name in linears.narrow:
            model.get_submodule(name).__class__ = ChunkedLinear
        if plain:
            parameters = parameters_by_key(model)
            originals.keep_quantised(
                {
                    key: value if _is_plain(parameters[key]) else _alike(value, products, device)
                    for key, value in plain.items()
                }
            )
        setattr(model, STATEMENT, done)
    logger.info(
        "%s: %d linear layers in %s, of %d more the weights alone; %d stay wide",
        type(model).__name__,
        len(linears.narrow),
        kind,
        len(linears.stored),
        len(linears.wide),
    )
    return done


def _refuse_unsuitable(model: nn.Module) -> None:
    who = f"{WHO}: {type(model).__name__}"
    if is_offloaded(model):
        raise ValueError(f"{who} is offloaded; quantise it before.")
    for name, linear in linear_layers(model):
        weight = linear.weight
        if weight.is_meta:
            raise ValueError(f"{who}: {name} has no values here (meta device).")
        if not _is_plain(weight) or not weight.is_floating_point():
            raise ValueError(
                f"{who}: {name} is quantised or sharded already ({type(weight.data).__name__})."
            )


@torch.no_grad()
def _quantise(linear: Any, configuration: Any, device: torch.device) -> None:
    from torchao.quantization import quantize_

    home = linear.weight.device
    quantize_(linear.to(device), configuration)
    assert not _is_plain(linear.weight)
    linear.to(home)


def _alike(weight: torch.Tensor, configuration: Any, device: torch.device) -> torch.Tensor:
    """A weight on the CPU, quantised."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    _quantise(linear, configuration, device)
    return linear.weight.detach()


def _is_plain(parameter: torch.Tensor) -> bool:
    return type(parameter.data) is torch.Tensor


def _configurations(kind: str, device: torch.device) -> tuple[Any, Any]:
    """torchao's, for products and for weights that are stored alone."""
    with _quiet():
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
        )

        # They would change settings of the whole process.
        own: dict[str, Any] = {"set_inductor_config": False}
        if kind == "int8":
            stored = Int8WeightOnlyConfig(**own)
            if device.type == "cpu":
                return stored, stored
            return Int8DynamicActivationInt8WeightConfig(**own), stored
        stored = Float8WeightOnlyConfig(**own)
        if kind == "fp8":
            return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **own), stored
        from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

        return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False), stored


def _as_json(configuration: Any) -> str:
    from torchao.core.config import config_to_dict

    return json.dumps(config_to_dict(configuration), sort_keys=True)


def _quiet() -> AbstractContextManager[None]:
    """torchao says at warning level which libraries for other GPUs it lacks."""
    return at_level("torchao", logging.ERROR)


class ChunkedLinear(nn.Linear):
    """A quantised layer, whose tokens go through in chunks; rows are rounded each by itself."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and tokens.requires_grad):
            return super().forward(tokens)
        product = _compiled() if tokens.is_cuda else F.linear
        rows = tokens.flatten(0, -2)[None]
        count = rows.shape[1]
        if tokens.is_cuda and count < LEAST_ROWS:
            rows = F.pad(rows, (0, 0, 0, LEAST_ROWS - count))

        def run(part: slice) -> torch.Tensor:
            return product(rows[:, part], self.weight, self.bias)

        out = by_chunks(run, rows.shape[1], CHUNK_ROWS)
        return out[:, :count].reshape(*tokens.shape[:-1], -1)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    """`F.linear` with the rounding of its tokens; one for all layers and numbers of rows."""

    def linear(
        tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return F.linear(tokens, weight, bias)

    return torch.compile(linear, dynamic=True)
