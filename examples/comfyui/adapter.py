"""CLEAR weights in a file: what they are for, and which of a ComfyUI model's weights they replace.

The files are those of the library: diffusers' names, absolute values, not differences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from clear_dit.weights.bfl import Place, place_in_bfl

# Under which an `Adapter` is in a model's `transformer_options`.
WEIGHTS = "clear_dit_weights"
LEARNED = re.compile(
    r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.attn\.processor\."
    r"(spatial_weight|far_weight|far_offset)"
)
# The published files have no metadata; their names say it: clear_local_8_down_4.
NAME = re.compile(r"clear_(local|far)_(\d+)(?:_down_(\d+))?")
WHO = "CLEAR weights"
# Classes of ComfyUI's diffusion models with FLUX.1's blocks.
MODELS = ("Flux", "Chroma")

# Key in the model, and the rows of it (dimension, start, length), as `add_patches` takes them.
Target = str | tuple[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Adapter:
    """What the loaded CLEAR weights are for; without any, nothing.

    Attributes:
        name: of the file.
        radius: they were tuned at, where it is known.
        down_factor: side of the pooling cells they were tuned with, in tokens.
        far: whether they were tuned with far keys; None without weights.
        pooled_weight: see `clear_dit.Window`.
        learned: of pooled keys, by the layer's number.
    """

    name: str = ""
    radius: int | None = None
    down_factor: int = 1
    far: bool | None = None
    pooled_weight: str = "one"
    learned: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def of_layer(self, number: int | None, far_levels: int, device: torch.device) -> dict[str, Any]:
        """What is learned of a layer's pooled keys, as `local_attention` takes it."""
        learned = {} if number is None else self.learned.get(number, {})
        if self.down_factor > 1:
            names = {"spatial_weight": "spatial_weight"}
        elif far_levels:
            names = {"spatial_weight": "far_weight", "far_offset": "far_offset"}
        else:
            names = {}
        return {to: learned[own].to(device) for to, own in names.items() if own in learned}


def read_adapter(
    path: Path, model: Any, shapes: Mapping[str, Any]
) -> tuple[Adapter, dict[Target, torch.Tensor]]:
    """Read and check a file of CLEAR weights.

    Args:
        path: of the file.
        model: ComfyUI's diffusion model.
        shapes: the model's tensors by BFL's names, of which shape and dtype are looked at.

    Returns:
        What the weights are for, and their values by where they belong in the model.

    Raises:
        ValueError: not such a file, or one for another model; the model's weights are packed.
    """
    proj = shapes.get("double_blocks.0.img_attn.proj.weight")
    if any("._orig_mod." in name for name in shapes):  # their names are others, as long as it lasts
        raise ValueError(
            f"{WHO}: another node has compiled this model's blocks one by one, which hides their "
            "weights; unload the models (or restart), and put CLEAR weights before that node."
        )
    if type(model).__name__ not in MODELS or proj is None:
        raise ValueError(
            f"{WHO}: are for FLUX.1 and Chroma, whose blocks this model ({type(model).__name__}) "
            "does not have; connect a FLUX.1 model to the node's model input."
        )
    channels = proj.shape[0]
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{WHO}: {path.name} is not a safetensors file, or is truncated: {error}."
        ) from error
    values: dict[Target, torch.Tensor] = {}
    learned: dict[int, dict[str, torch.Tensor]] = {}
    with file:
        header = dict(file.metadata() or {})
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if not (tensor.is_floating_point() and bool(tensor.float().isfinite().all())):
                raise ValueError(
                    f"{WHO}: {path.name}: {name} has values that are not finite numbers."
                )
            if match := LEARNED.fullmatch(name):
                learned.setdefault(_number(match, model), {})[match[3]] = tensor
                continue
            place = place_in_bfl(name, channels)
            if place is None or place.key not in shapes:
                raise ValueError(
                    f"{WHO}: {path.name} is for another model: this one has no place for {name}."
                )
            whole = shapes[place.key]
            values[_target(place, whole)] = _fitting(path.name, name, tensor, whole, place)
    _check_complete(path.name, model, channels, shapes, values)
    return _adapter(path, header, learned), values


def _number(match: re.Match[str], model: Any) -> int:
    before = len(model.double_blocks) if match[1] == "single_transformer_blocks" else 0
    return before + int(match[2])


def _target(place: Place, whole: torch.Tensor) -> Target:
    key = f"diffusion_model.{place.key}"
    return key if place.is_whole else (key, (0, place.start, _rows(place, whole)))


def _rows(place: Place, whole: torch.Tensor) -> int:
    stop = whole.shape[0] if place.stop is None else min(place.stop, whole.shape[0])
    return stop - place.start


def _fitting(
    file: str, name: str, tensor: torch.Tensor, whole: torch.Tensor, place: Place
) -> torch.Tensor:
    """The tensor, if it is as large as its place."""
    expected = (_rows(place, whole), *whole.shape[1:])
    if not whole.dtype.is_floating_point or whole.ndim != tensor.ndim:
        raise ValueError(
            f"{WHO}: the model's {place.key} is packed ({whole.dtype}, {tuple(whole.shape)}), and "
            "cannot take other values; load the model in bf16, fp16 or fp8."
        )
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{WHO}: {file} is for another model: {name} has shape {tuple(tensor.shape)}, its "
            f"place in {place.key} {expected}."
        )
    return tensor


def _check_complete(
    file: str, model: Any, channels: int, shapes: Mapping[str, Any], values: Mapping[Target, Any]
) -> None:
    """Refuse a file that lacks some layer's: it is another model's, or no CLEAR weights."""
    inside = "attn.to_q", "attn.to_k", "attn.to_v"
    layers = {
        "transformer_blocks": (model.double_blocks, (*inside, "attn.to_out.0")),
        "single_transformer_blocks": (model.single_blocks, inside),
    }
    wanted = [
        f"{stack}.{number}.{name}.weight"
        for stack, (blocks, names) in layers.items()
        for number in range(len(blocks))
        for name in names
    ]
    places = {name: place_in_bfl(name, channels) for name in wanted}
    missing = [
        name
        for name, place in places.items()
        if place and (place.key not in shapes or _target(place, shapes[place.key]) not in values)
    ]
    if missing:
        raise ValueError(
            f"{WHO}: {file} has {len(wanted) - len(missing)} of the {len(wanted)} tensors that "
            f"this model needs ({missing[0]} is missing): it is for another model, or no CLEAR "
            "weights."
        )


def _adapter(
    path: Path, header: Mapping[str, str], learned: dict[int, dict[str, torch.Tensor]]
) -> Adapter:
    match = NAME.match(path.stem)
    spatial = next(
        (of["spatial_weight"] for of in learned.values() if "spatial_weight" in of), None
    )
    radius = header.get("radius") or (match[2] if match else None)
    learned_of_far = any("far_weight" in of for of in learned.values())
    return Adapter(
        name=path.name,
        radius=int(radius) if radius and radius.isdecimal() else None,
        down_factor=1 if spatial is None else spatial.shape[-2],
        far=learned_of_far or header.get("far") == "true",
        pooled_weight=header.get("pooled_weight", "one"),
        learned=learned,
    )
