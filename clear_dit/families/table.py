"""Which family a model belongs to. A family's file is imported when a model of it is met."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..wrappers import unwrapped
from .family import Family

if TYPE_CHECKING:
    from torch import nn

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
    "Krea2Transformer2DModel": "krea2",
    "Flux3Transformer2DModel": "flux3",
    "QwenImage21Transformer2DModel": "qwen_image21",
    "LongCatImageTransformer2DModel": "longcat_image",
    "ErnieImageTransformer2DModel": "ernie_image",
}

# Those of them that run beside a transformer, over the same tokens.
CONTROLNETS = ("FluxControlNetModel",)


def known_models(controlnets: bool = True) -> str:
    """The classes, for messages; with or without ControlNets."""
    *names, last = (name for name in MODELS if controlnets or name not in CONTROLNETS)
    return f"{', '.join(names)} and {last}"


def all_families() -> list[Family]:
    """Every family that the installed diffusers has, in the table's order."""
    import diffusers

    known = (file for name, file in MODELS.items() if hasattr(diffusers, name))
    return [_load(file) for file in dict.fromkeys(known)]


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


def head_dim_of(model: Any) -> int:
    """Channels of a head of a model's attention, by its configuration; 64 if that does not say."""
    config = model.config
    if "attention_head_dim" in config:
        return int(config["attention_head_dim"])
    for channels, heads in (("dim", "n_heads"), ("hidden_size", "num_attention_heads")):
        if channels in config and heads in config:
            return int(config[channels]) // int(config[heads])
    return 64


def heads_of(attn: Any) -> int:
    """Heads of a layer's queries, by either name that diffusers has for them."""
    return int(attn.heads if hasattr(attn, "heads") else attn.num_heads)


def channels_of(model: Any) -> int:
    """Channels of a token between a model's layers, by its configuration."""
    config = model.config
    for name in ("hidden_size", "dim"):
        if name in config:
            return int(config[name])
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def _known_class(model: Any) -> str | None:
    """The name of a model's class. Wrappers that make a subclass of it (FSDP) do not hide it."""
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS and cls.__module__.startswith("diffusers."):
            return cls.__name__
    return None


def _load(file: str) -> Family:
    return import_module(f".{file}", __package__).FAMILY


def transformer_of(pipe_or_model: Any, who: str) -> nn.Module:
    """The transformer of a pipeline, or the model itself, without wrappers (`unwrapped`).

    Args:
        who: asks, for messages.

    Raises:
        ValueError: the class is not supported.
    """
    model = unwrapped(getattr(pipe_or_model, "transformer", pipe_or_model))
    if not is_transformer(model):
        raise _unsupported(model, who, known_models(controlnets=False))
    return model


def models_of(pipe_or_model: Any, who: str) -> list[nn.Module]:
    """A pipeline's transformer and its ControlNets, or the model itself; as `transformer_of`."""
    found = []
    if hasattr(pipe_or_model, "transformer"):
        found.append(transformer_of(pipe_or_model, who))
        pipe_or_model = getattr(pipe_or_model, "controlnet", None)
    for model in getattr(pipe_or_model, "nets", [pipe_or_model]):  # several ControlNets
        model = unwrapped(model)
        if model is not None and find_family(model) is None:
            raise _unsupported(model, who, known_models())
        found += [] if model is None else [model]
    return found


def _unsupported(model: Any, who: str, known: str) -> ValueError:
    return ValueError(
        f"{who}: supported models are {known} of diffusers, alone or in a pipeline; got "
        f"{type(model).__name__} of {type(model).__module__}."
    )
