"""What is trained: the image stream's projections and what is learned of pooled and far keys, or a
LoRA on the former.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import nn

from ..attention.processor import CLEARProcessor
from ..errors import RequestError
from ..families.table import family_of
from ..weights.format import parameters_by_key, pooling_by_key
from ..weights.load import current_settings, published_name, write_weights

LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_config(model: nn.Module, rank: int) -> Any:
    """peft's description of a LoRA on what the model's family trains in every layer."""
    from peft import LoraConfig

    family = family_of(model)
    targets = [
        f"{name}.{projection}"
        for name, attn in family.layers(model).items()
        for projection in family.tuned_names(attn)
    ]
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


def add_lora(model: Any, rank: int, seed: int) -> None:
    """Put a LoRA of peft on the layers that are trained; it changes nothing yet.

    Args:
        model: a family's transformer.
        rank: of the LoRA, whose alpha is the same.
        seed: of its random half.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(lora_config(model, rank))


def lora_pipeline(model: nn.Module) -> Any:
    """The pipeline class of diffusers that saves a LoRA of a family's transformer, and loads it.

    Raises:
        RequestError: diffusers has none for the family.
    """
    name = family_of(model).recipe.pipelines[0]
    found = getattr(diffusers, name)
    if not hasattr(found, "save_lora_weights"):
        raise RequestError(
            f"--lora: diffusers' {name} neither saves nor loads a LoRA; leave --lora out to train "
            "the layers themselves."
        )
    return found


def trained_parameters(model: nn.Module, lora: bool) -> dict[str, nn.Parameter]:
    """What is trained: by the names in a file of CLEAR weights, or, of a LoRA, in the model."""
    if not lora:
        return {**parameters_by_key(model), **pooling_by_key(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def freeze_others(model: nn.Module, lora: bool) -> None:
    """Freeze the model but for what is trained, which becomes float32."""
    model.requires_grad_(False)
    for parameter in trained_parameters(model, lora).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def whole_tensors(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; of sharded parameters too, for which all processes must call this."""
    found = {}
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        found[name] = tensor.to("cpu", copy=True).contiguous()
    return found


def adapter_name(radius: int, down_factor: int, far: bool, lora: bool) -> str:
    """The file an adapter is saved in."""
    return LORA_FILE if lora else published_name(radius, down_factor, far)


def save_adapter(
    model: Any,
    tensors: dict[str, torch.Tensor],
    folder: Path,
    lora: bool,
    dtype: torch.dtype,
    base_model: str,
) -> Path:
    """Save trained tensors, in the format `apply_clear(weights=)` or `load_lora_weights` reads.

    Args:
        model: the transformer they belong to.
        tensors: see `whole_tensors`.
        folder: where; the file has the name these loaders look for.
        lora: whether they are a LoRA's.
        dtype: of the saved tensors.
        base_model: the name of the model they are for.

    Raises:
        ValueError: values that are not finite.
    """
    settings: CLEARProcessor = current_settings(model, "distill")
    setting = settings.radius, settings.down_factor, settings.has_far_keys
    path = folder / adapter_name(*setting, lora)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if not lora:
        write_weights(tensors, path, settings, base_model, "distill")
        return path
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, state_dict=tensors)
    temporary = folder / f".{LORA_FILE}.partial.safetensors"
    try:
        lora_pipeline(model).save_lora_weights(
            folder,
            transformer_lora_layers=state,
            weight_name=temporary.name,
            **_collate_lora_metadata({"transformer": model}),
        )
        with safe_open(temporary, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            write_weights(tensors, path, settings, base_model, "distill", file.metadata())
    finally:
        temporary.unlink(missing_ok=True)
    return path
