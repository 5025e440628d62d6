"""Models by name: where they are, what they are, and the settings that suit them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..compat import release
from ..errors import RequestError, first_line
from ..files import DEMO_SIZE, DEMOS
from .index import INDEX, Index, Part, index_file, is_repository, read_index

if TYPE_CHECKING:
    from ..families.family import Family
    from ..families.recipe import Defaults
    from ..pipelines.pipeline import CLEARPipeline

# Side of a token in pixels, of most families: an autoencoder that reduces by 8, then 2 x 2 latents.
TOKEN_PIXELS = 16

DEMO = DEMOS["demo"]
DEMO_DEFAULTS: dict[str, Any] = {"size": DEMO_SIZE, "radius": 8, "steps": 20, "guidance": 2.0}

# Of a pipeline with one, its entry may lead nowhere: prompts are then encoded as they are.
UPSAMPLER = "prompt_upsampler"
# The parts whose work is over when prompts are encoded.
OF_TEXTS = ("text_encoder", UPSAMPLER)

# What libraries are told while they load holds for the process.
_quieting = threading.RLock()


@dataclass(frozen=True)
class Model:
    """A model by name, as far as its folder's or repository's configuration files tell.

    Attributes:
        path: what `from_pretrained` takes.
        family: of its transformer.
        defaults: what a request does not say.
        token_pixels: side of a token.
        side_pixels: what sides of images are multiples of.
        native_size: in pixels, where it is not the family's; else None.
        index: of the pipeline and its parts.
    """

    family: Family
    defaults: Defaults
    token_pixels: int
    side_pixels: int
    native_size: int | None
    index: Index

    @property
    def takes_negative_prompt(self) -> bool:
        """Whether guidance that is on has a second pass with a prompt of one's own."""
        pipeline = self.index.pipeline.removeprefix("CLEAR")
        return self.family.recipe.guidance.takes_negative(
            self.index.config("transformer"), pipeline
        )


def model_path(model: str) -> str:
    """What `from_pretrained` takes for a model's name: a demo, a folder, or a hub repository.

    Raises:
        RequestError: neither of them, a folder that is no pipeline that is known, or a demo's files
            are missing.
    """
    if model in DEMOS:
        if not (DEMOS[model] / INDEX).is_file():
            raise RequestError(
                f"--model {model}: this installation has no such pipeline (assets/{model})."
            )
        return str(DEMOS[model])
    if Path(model).is_dir():
        _family_of(read_index(model))
    elif not is_repository(model):
        raise RequestError(
            f"--model must be {' or '.join(map(repr, DEMOS))}, a folder in diffusers format or a "
            f"hub repository (owner/name); got {model!r}."
        )
    return model


def find_model(model: str) -> Model:
    """What is known of a model; of one on the hub its configuration files are fetched.

    Raises:
        RequestError: see `model_path`; or its configuration cannot be found or read.
    """
    path = model_path(model)
    index = index_file(Path(path))
    return _find_model(model, path, index.stat().st_mtime_ns if index.is_file() else 0)


@functools.lru_cache(maxsize=32)
def _find_model(model: str, path: str, changed: int) -> Model:
    index = read_index(path)
    family = _family_of(index)
    _check_parts(index)
    transformer, autoencoder = index.config("transformer"), index.config("vae")
    recipe = family.recipe
    defaults = recipe.defaults_of(transformer, index.content) or recipe.defaults
    native_size = index.content.get("native_size")
    if model in DEMOS:
        defaults = replace(defaults, **DEMO_DEFAULTS)
        native_size = defaults.size
    elif native_size is not None:
        defaults = replace(defaults, size=native_size)
    token_pixels = recipe.patch * (recipe.reduction or _reduction(autoencoder))
    return Model(
        family=family,
        defaults=defaults,
        token_pixels=token_pixels,
        side_pixels=recipe.step * token_pixels,
        native_size=native_size,
        index=index,
    )


def _family_of(index: Index) -> Family:
    """The family of a pipeline.

    Raises:
        RequestError: a pipeline that is not known; those of the same family are named.
    """
    from ..families.table import MODELS, named_family

    transformer = index.parts.get("transformer")
    family = None if transformer is None else named_family(str(transformer.class_name))
    if family is None:
        raise RequestError(
            f"--model: {index.path} holds a {index.pipeline}, whose transformer is none of "
            f"{', '.join(MODELS)}."
        )
    if index.pipeline.removeprefix("CLEAR") not in family.recipe.pipelines:
        raise RequestError(
            f"--model: {index.path} holds a {index.pipeline}; of {family.title} the supported "
            f"pipelines are {', '.join(family.recipe.pipelines)}."
        )
    return family


def _check_parts(index: Index) -> None:
    """Refuse a pipeline without a text encoder, or without one of its parts where they should be.

    Raises:
        RequestError: which part.
    """
    for name in dict.fromkeys(("vae", "text_encoder", *index.parts)):
        part = index.parts.get(name, Part(None, None, name))
        cls = part.class_name
        if cls is None:
            missing = name.startswith(("vae", "text_encoder"))
        else:
            missing = not (part.is_there or (name.startswith(UPSAMPLER) and part.source is None))
        if missing:
            what = name if cls is None else f"{name} ({cls})"
            raise RequestError(
                f"--model: {index.path} has no {what}, without which a {index.pipeline} cannot "
                f"generate; put it into the folder {part.folder or name} there."
            )


def _reduction(config: Mapping[str, Any]) -> int:
    """Side of a latent pixel, in pixels, by an autoencoder's configuration."""
    if "spatial_compression_ratio" in config:
        return int(config["spatial_compression_ratio"])
    if "temperal_downsample" in config:
        return 2 ** len(config["temperal_downsample"])
    channels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(channels) - 1)


def model_defaults(model: str) -> Defaults:
    """The settings that suit a model.

    Raises:
        RequestError: see `find_model`.
    """
    return find_model(model).defaults


def load_pipeline(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    only_transformer: bool = False,
    text_encoders: bool = True,
) -> CLEARPipeline:
    """A model's pipeline, ready on a device; without text encoders and autoencoder if asked.

    Raises:
        RequestError: it cannot be found or read.
    """
    found = find_model(model)
    renamed = release(metadata.version("diffusers")) >= (0, 42)
    options: dict[str, Any] = {"dtype" if renamed else "torch_dtype": dtype}
    for part in found.index.parts:
        # Qwen-Image 2.1's pipeline has a question to its processor when it is made.
        if only_transformer and part not in ("transformer", "scheduler", "processor"):
            options[part] = None
    if not text_encoders:
        options |= {part: None for part in found.index.parts if part.startswith(OF_TEXTS)}
    try:
        with quiet_libraries():
            from ..pipelines.pipeline import CLEARPipeline

            pipe: CLEARPipeline = CLEARPipeline.from_pretrained(
                found.index.path, native_size=found.native_size, use_safetensors=True, **options
            )
    except (OSError, ValueError) as error:
        raise RequestError(f"--model {model}: cannot be loaded: {first_line(error)}") from error
    return pipe.to(device)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide what diffusers and transformers say about themselves while they load.

    Such as that torchvision is missing, or that the demo's autoencoder is an AutoencoderTiny.
    Afterwards they say what they said before; threads that load at once wait for each other.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    with _quieting:
        before = [(one.get_verbosity(), one.is_progress_bar_enabled()) for one in libraries]
        try:
            for library in libraries:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
        finally:
            for library, (level, shows_bars) in zip(libraries, before, strict=True):
                library.set_verbosity(level)
                if shows_bars:
                    library.enable_progress_bar()
