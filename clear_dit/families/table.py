"""Which family a model belongs to. A family's file is imported when a model of it is met."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .family import Family

# Class of a model in diffusers: the file of its family, which defines FAMILY.
MODELS = {
    "FluxTransformer2DModel": "flux1",
    "FluxControlNetModel": "flux1",
    "ChromaTransformer2DModel": "chroma",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwen_image",
    "SD3Transformer2DModel": "sd3",
    "ZImageTransformer2DModel": "z_image",
    "HunyuanImageTransformer2DModel": "hunyuan_image",
    "CogView4Transformer2DModel": "cogview4",
}


# Those of them that run beside a transformer, over the same tokens.
CONTROLNETS = ("FluxControlNetModel",)


def known_models(controlnets: bool = True) -> str:
    """The classes, for messages; with or without ControlNets."""
    *names, last = (name for name in MODELS if controlnets or name not in CONTROLNETS)
    return f"{', '.join(names)} and {last}"


def all_families() -> list[Family]:
    """Every family, in the table's order."""
    return [_load(file) for file in dict.fromkeys(MODELS.values())]


def find_family(model: Any) -> Family | None:
    """The family of a model, None if it is not one of diffusers' that CLEAR knows."""
    name = _known_class(model)
    return None if name is None else named_family(name)


def named_family(class_name: str) -> Family | None:
    """The family of a class in diffusers, by the class's name."""
    return _load(MODELS[class_name]) if class_name in MODELS else None


def family_of(model: Any) -> Family:
    """The family of a supported model."""
    family = find_family(model)
    assert family is not None, type(model).__name__
    return family


def is_transformer(model: Any) -> bool:
    """Whether a model is a family's transformer, and not a ControlNet."""
    name = _known_class(model)
    return name is not None and name not in CONTROLNETS


def attention_layers(model: Any) -> dict[str, Any]:
    """The attention layers of a supported model by name, such as "transformer_blocks.0.attn"."""
    return family_of(model).layers(model)


def _known_class(model: Any) -> str | None:
    """The name of a model's class. Wrappers that make a subclass of it (FSDP) do not hide it."""
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS and cls.__module__.startswith("diffusers."):
            return cls.__name__
    return None


def _load(file: str) -> Family:
    return import_module(f".{file}", __package__).FAMILY
