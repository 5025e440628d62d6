"""Models by name: where they are, what they are, and the settings that suit them."""

from __future__ import annotations

import functools
import json
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
from ..files import ASSETS

if TYPE_CHECKING:
    from ..families.family import Family
    from ..families.recipe import Defaults
    from ..pipelines.pipeline import CLEARPipeline

# Side of a token in pixels, of most families: an autoencoder that reduces by 8, then 2 x 2 latents.
TOKEN_PIXELS = 16

DEMO = ASSETS / "demo"
# The demos by name: their folders.
DEMOS = {"demo": DEMO, "demo-sd3": ASSETS / "demo-sd3"}
DEMO_DEFAULTS: dict[str, Any] = {"size": 512, "radius": 8, "steps": 20, "guidance": 2.0}

INDEX = "model_index.json"
CONFIG = "config.json"

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
        parts: names of the pipeline's.
    """

    path: str
    family: Family
    defaults: Defaults
    token_pixels: int
    side_pixels: int
    native_size: int | None
    parts: tuple[str, ...]


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
    folder = Path(model)
    if folder.is_dir():
        _family_of(folder, _read_index(folder))
    elif folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
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
    index = Path(path) / INDEX
    return _find_model(model, path, index.stat().st_mtime_ns if index.is_file() else 0)


@functools.lru_cache(maxsize=32)
def _find_model(model: str, path: str, changed: int) -> Model:
    index = read_config(path, INDEX)
    family = _family_of(path, index)
    _check_parts(path, index)
    transformer, autoencoder = (read_config(path, CONFIG, part) for part in ("transformer", "vae"))
    recipe = family.recipe
    assert recipe is not None  # `_family_of` has seen to it
    defaults = recipe.defaults_of(transformer, index) or recipe.defaults
    native_size = index.get("native_size")
    if model in DEMOS:
        defaults = replace(defaults, **DEMO_DEFAULTS)
        native_size = defaults.size
    elif native_size is not None:
        defaults = replace(defaults, size=native_size)
    token_pixels = recipe.patch * (recipe.reduction or _reduction(autoencoder))
    return Model(
        path=path,
        family=family,
        defaults=defaults,
        token_pixels=token_pixels,
        side_pixels=recipe.step * token_pixels,
        native_size=native_size,
        parts=_parts(index),
    )


def read_config(path: str, name: str, part: str = "") -> dict[str, Any]:
    """A JSON file of a pipeline's; fetched where that is on the hub.

    Args:
        path: see `Model`.
        name: of the file.
        part: of the pipeline, whose folder the file is in.

    Raises:
        RequestError: it cannot be fetched or read.
    """
    file = Path(path) / part / name
    if not Path(path).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            file = Path(hf_hub_download(path, name, subfolder=part or None))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise RequestError(
                f"--model {path}: {name} cannot be fetched from the hub ({first_line(error)}); a "
                "gated model needs its licence accepted, and hf auth login."
            ) from error
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"--model: {file} is missing or is not JSON.") from error
    if not isinstance(found, dict):
        raise RequestError(f"--model: {file} is not a JSON object.")
    return found


def _is_part(entry: Any) -> bool:
    """Whether an entry of an index is a part's library and class, and not Krea 2's numbers."""
    listed = isinstance(entry, (list, tuple)) and len(entry) == 2
    return listed and all(one is None or isinstance(one, str) for one in entry)


def _read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's model_index.json.

    Raises:
        RequestError: there is none, or none that can be read.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no valid {INDEX}"
        if (folder / CONFIG).is_file() and not (folder / INDEX).exists():
            why = "it is one model of it; give the folder around it"
        raise RequestError(
            f"--model: {folder} is not a pipeline in diffusers format ({why})."
        ) from error
    return index


def _family_of(path: str | Path, index: Mapping[str, Any]) -> Family:
    """The family of a pipeline.

    Raises:
        RequestError: a pipeline that is not known; those of the same family are named.
    """
    from ..families.table import MODELS, named_family

    transformer: Any = index.get("transformer")
    name = str(index["_class_name"])
    family = named_family(str(transformer[-1])) if _is_part(transformer) else None
    if family is None or family.recipe is None:
        raise RequestError(
            f"--model: {path} holds a {name}, whose transformer is none of {', '.join(MODELS)}."
        )
    if name.removeprefix("CLEAR") not in family.recipe.pipelines:
        raise RequestError(
            f"--model: {path} holds a {name}; of {family.title} the supported pipelines are "
            f"{', '.join(family.recipe.pipelines)}."
        )
    return family


def _parts(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a pipeline's parts: each has a library and a class, or twice None."""
    return tuple(name for name, entry in index.items() if _is_part(entry))


def _check_parts(path: str, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline without a text encoder, or a folder without one of its parts.

    Raises:
        RequestError: which part.
    """
    for name in _parts(index):
        cls = index[name][-1]
        there = not Path(path).is_dir() or (Path(path) / name).is_dir()
        if (cls is None and name.startswith("text_encoder")) or (cls is not None and not there):
            what = name if cls is None else f"{name} ({cls})"
            raise RequestError(
                f"--model: {path} has no {what}, without which a {index['_class_name']} cannot "
                f"generate; put it into the folder {name} there."
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
    for part in found.parts:
        # Qwen-Image 2.1's pipeline has a question to its processor when it is made.
        if only_transformer and part not in ("transformer", "scheduler", "processor"):
            options[part] = None
    if not text_encoders:
        options |= {part: None for part in found.parts if part.startswith("text_encoder")}
    try:
        with quiet_libraries():
            from ..pipelines.pipeline import CLEARPipeline

            pipe: CLEARPipeline = CLEARPipeline.from_pretrained(
                found.path, native_size=found.native_size, use_safetensors=True, **options
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
