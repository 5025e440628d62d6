"""Models by name: where they are, and the settings that suit them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..compat import release
from ..errors import RequestError, first_line
from ..files import ASSETS

if TYPE_CHECKING:
    from diffusers import FluxPipeline

    from ..pipelines.flux import CLEARFluxPipeline

# Side of a token in pixels: an autoencoder that reduces by 8, then 2 x 2 latents to a token.
TOKEN_PIXELS = 16

# What a pipeline has besides its transformer and scheduler.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
OTHER_PARTS = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "vae")

DEMO = ASSETS / "demo"

# What libraries are told while they load holds for the process.
_quieting = threading.RLock()


@dataclass(frozen=True)
class ModelDefaults:
    """What a request does not say.

    Attributes:
        size: native height and width, in pixels.
        radius: of the window, in tokens.
        steps: denoising steps.
        guidance: see `GenerateRequest.guidance`.
    """

    size: int
    radius: int
    steps: int
    guidance: float


DEMO_DEFAULTS = ModelDefaults(size=512, radius=8, steps=20, guidance=2.0)
FLUX_DEFAULTS = ModelDefaults(size=1024, radius=16, steps=28, guidance=3.5)
# FLUX.1-schnell and others without a guidance embedding: one pass, no guidance.
UNGUIDED_DEFAULTS = ModelDefaults(size=1024, radius=16, steps=4, guidance=1.0)


def model_path(model: str) -> str:
    """What `from_pretrained` takes for a model's name: "demo", a folder, or a hub repository.

    Raises:
        RequestError: a folder that is not a FLUX pipeline, or the demo's files are missing.
    """
    if model != "demo":
        folder = Path(model)
        if folder.is_dir():
            _check_folder(folder)
        elif folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise RequestError(
                f"--model must be 'demo', a folder in diffusers format or a hub repository "
                f"(owner/name); got {model!r}."
            )
        return model
    if not (DEMO / "model_index.json").is_file():
        raise RequestError("--model demo: this installation has no demo pipeline (assets/demo).")
    return str(DEMO)


def _check_folder(folder: Path) -> None:
    try:
        index = json.loads((folder / "model_index.json").read_text())
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"--model: {folder} is not a pipeline in diffusers format (no valid model_index.json)."
        ) from error
    if "Flux" not in str(name) or str(name).startswith("Flux2"):
        raise RequestError(
            f"--model: {folder} holds a {name}; only FLUX.1 pipelines are supported"
            f"{_what_is(index.get('transformer'))}."
        )


def _what_is(transformer: Any) -> str:
    """For messages: what works with the transformer an index names, [library, class]; or nothing.

    Imports nothing of torch or diffusers for a pipeline no family of the table is in.
    """
    from ..families.table import named_family

    name = transformer[-1] if isinstance(transformer, list) and transformer else None
    family = named_family(name) if isinstance(name, str) else None
    if family is None:
        return ""
    why = "; ".join(f"{feature}: {why}" for feature, why in family.unsupported.items())
    return f". In Python, apply_clear works on {family.title} ({why})"


def model_defaults(model: str) -> ModelDefaults:
    """The settings that suit a model: the demo's own, else by whether it embeds guidance.

    Raises:
        RequestError: the model's configuration cannot be found.
    """
    if model == "demo":
        return DEMO_DEFAULTS
    path = model_path(model)
    try:
        from diffusers import FluxTransformer2DModel

        config = FluxTransformer2DModel.load_config(path, subfolder="transformer")
    except (OSError, ValueError) as error:
        raise RequestError(f"--model {model}: cannot be loaded: {first_line(error)}") from error
    return FLUX_DEFAULTS if config.get("guidance_embeds") else UNGUIDED_DEFAULTS


def text_length(pipe: FluxPipeline) -> int:
    """Text tokens a pipeline is given, padding included: 256 where guidance is not embedded."""
    longest = 512 if pipe.transformer.config.guidance_embeds else 256
    return min(longest, pipe.tokenizer_2.model_max_length)


def load_pipeline(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    only_transformer: bool = False,
    text_encoders: bool = True,
) -> CLEARFluxPipeline:
    """A FLUX pipeline, ready on a device; without text encoders and autoencoder if asked.

    Raises:
        RequestError: it cannot be found or read.
    """
    path = model_path(model)
    try:
        with quiet_libraries():
            from ..pipelines.flux import CLEARFluxPipeline

            renamed = release(metadata.version("diffusers")) >= (0, 42)
            options: dict[str, Any] = {"dtype" if renamed else "torch_dtype": dtype}
            if only_transformer:
                options |= dict.fromkeys(OTHER_PARTS)
            if not text_encoders:
                options |= dict.fromkeys(TEXT_ENCODERS)
            if model == "demo":
                options["native_size"] = DEMO_DEFAULTS.size
            pipe = CLEARFluxPipeline.from_pretrained(path, use_safetensors=True, **options)
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
