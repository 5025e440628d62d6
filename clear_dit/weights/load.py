"""Loading and saving the weights CLEAR fine-tunes: to_q, to_k, to_v and to_out of the image stream.

Loading is strict and reads a file twice, tensor by tensor: to check all of it, then to copy. Files
saved here carry metadata besides; see `format.py`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..attention.processor import CLEARProcessor
from ..families.table import attention_layers, transformer_of
from ..versions import __version__
from .changing import changing
from .format import (
    FILE_DTYPES,
    check_header,
    keys_of_far,
    learned_of_far,
    made_for_far,
    parameters_by_key,
    pooling_by_key,
    pooling_shapes,
    refuse_unsuitable,
)
from .learned import give_learned, refuse_shared, settle
from .reconcile import reconcile
from .saved import mark
from .state import ClearState, originals_of

logger: logging.Logger = logging.getLogger(__name__)

FORMAT = "clear-dit"
SUFFIX = ".safetensors"


def current_settings(model: nn.Module, who: str) -> CLEARProcessor:
    """A processor that stands for all layers.

    Raises:
        ValueError: a layer without CLEAR, layers that differ, radii by layer or noise level, or
            layers that share pooling weights.
    """
    with _alone(model) as state:
        if state is not None:
            reconcile(state, model)
            state.decide_far(model)
        processors = {name: attn.processor for name, attn in attention_layers(model).items()}
    for name, processor in processors.items():
        if not isinstance(processor, CLEARProcessor):
            raise ValueError(
                f"{who}: {name} has {type(processor).__name__}, not CLEARProcessor; "
                "call apply_clear first."
            )
    kinds = {
        (p.radius, p.down_factor, p.has_far_keys, p.pooled_weight) for p in processors.values()
    }
    if len(kinds) > 1:
        raise ValueError(
            f"{who}: the layers' processors differ in radius, down_factor, far or pooled_weight: "
            f"{sorted(kinds)}; call apply_clear."
        )
    first = next(iter(processors.values()))
    if not first.radii.is_plain:
        raise ValueError(
            f"{who}: the layers' radii are {first.radii}; give one radius, or weights= together "
            "with the radii to apply_clear."
        )
    if first.down_factor > 1:
        refuse_shared(model, f"{who}: with down_factor > 1")
    return first


@contextmanager
def _alone(model: nn.Module) -> Iterator[ClearState | None]:
    """Within it no other thread uses a model: its stage may have swapped layers and weights."""
    state = ClearState.on(model)
    with nullcontext() if state is None else state.access.exclusive():
        yield state


def load_clear_weights(
    pipe_or_model: Any,
    pretrained_model_name_or_path: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> None:
    """Load CLEAR weights into a model whose layers all have a `CLEARProcessor`.

    Values are copied into the model's own parameters and take their dtype and device. The
    parameters they replace are kept on the CPU until `remove_clear` puts them back (3.6 GB for
    FLUX.1-dev in bfloat16). Everything is checked before the first parameter changes. LoRAs that
    were fused since other CLEAR weights were loaded stay; `save_pretrained` writes into the model's
    configuration that its weights are CLEAR's.

    Processors whose `far` is None follow the weights: they take far keys if the weights were made
    for them, which their metadata says. Where a setting contradicts it, that is warned about.

    Args:
        pipe_or_model: a pipeline with a FLUX transformer, or the transformer itself. A pipeline's
            ControlNets keep their own weights.
        pretrained_model_name_or_path: a file, a folder, or a hub repository ("Huage001/CLEAR").
        weight_name: the file in the folder or repository; by default the name for the model's
            settings: "clear_local_16.safetensors" and "clear_local_8_down_4.safetensors", as
            published, or "clear_far_4.safetensors", which comes first where there are both, unless
            the processors say far=False.
        revision, token, cache_dir, local_files_only: for the hub, as everywhere in diffusers.

    Raises:
        ValueError: the model cannot take weights, its weights were trained or replaced since CLEAR
            weights were loaded, or the file is not safetensors, truncated, for
            another model or down_factor, or has names, shapes, dtypes or values that do not belong.
        OSError: the file cannot be found or fetched.
    """
    model = transformer_of(pipe_or_model, "load_clear_weights")
    settings = current_settings(model, "load_clear_weights")
    path = find_weights(
        pretrained_model_name_or_path,
        settings.radius,
        settings.down_factor,
        settings.far,
        weight_name=weight_name,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    with open_checked(model, path, settings) as file:
        if learned_of_far(file) and settings.far is not False:
            refuse_shared(model, f"load_clear_weights: {path.name} learned of far keys, for which")
        with changing(model, weights=True) as state:
            load_checked(model, state, file, path)


def save_clear_weights(
    pipe_or_model: Any, path: str | os.PathLike[str], base_model: str | None = None
) -> None:
    """Save the weights `load_clear_weights` reads, in the model's dtype.

    The header holds radius, down_factor, far, pooled_weight, base_model and the versions of
    clear_dit, torch and diffusers. The file appears whole or not at all.

    Args:
        pipe_or_model: a model whose layers all have a `CLEARProcessor`.
        path: ends in ".safetensors", in a folder that exists; a file there is replaced.
        base_model: the model these weights belong to, such as "black-forest-labs/FLUX.1-dev".

    Raises:
        ValueError: a wrong suffix, a model that is not ready, values that are not finite, or of
            another dtype than float32, float16 and bfloat16.
        FileNotFoundError: the folder does not exist.
    """
    who = "save_clear_weights"
    model = transformer_of(pipe_or_model, who)
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{who}: the file's name must end in {SUFFIX!r}, got {path.name!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{who}: there is no folder {str(path.parent)!r}; make it first.")
    with _alone(model) as state:
        settings = current_settings(model, who)
        refuse_unsuitable(model, who)
        # In a callback of this thread's own stage, the original weights may be there.
        with nullcontext() if state is None else state.own_weights(model):
            parameters = {**parameters_by_key(model), **pooling_by_key(model)}
            tensors = {
                key: parameter.detach().to("cpu", copy=True).contiguous()
                for key, parameter in parameters.items()
            }
    write_weights(tensors, path, settings, base_model, who)


def write_weights(
    tensors: dict[str, torch.Tensor],
    path: Path,
    settings: CLEARProcessor,
    base_model: str | None,
    who: str,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, by their names in a file, with the header that `save_clear_weights` describes.

    Args:
        more: of the header, in place of its own.

    Raises:
        ValueError: values that are not finite, or of a dtype that a file cannot have.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in FILE_DTYPES.values():
            raise ValueError(
                f"{who}: {key} is {tensor.dtype}; CLEAR weights are saved in "
                f"{', '.join(map(str, FILE_DTYPES.values()))}: save before they are cast."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{who}: {key} has values that are not finite.")
    header = {
        "format": FORMAT,
        "radius": str(settings.radius),
        "down_factor": str(settings.down_factor),
        "far": str(settings.has_far_keys).lower(),
        "pooled_weight": settings.pooled_weight,
        "clear_dit_version": __version__,
        "torch_version": torch.__version__,
        "diffusers_version": metadata.version("diffusers"),
    }
    if base_model is not None:
        header["base_model"] = base_model
    header |= more or {}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def published_name(radius: int, down_factor: int, far: bool = False) -> str:
    """The name of a file of weights for these settings; without far keys as the authors have it."""
    pooled = f"_down_{down_factor}" if down_factor > 1 else ""
    return f"clear_{'far' if far else 'local'}_{radius}{pooled}{SUFFIX}"


def _names(radius: int, down_factor: int, far: bool | None) -> list[str]:
    """The names of files that will do, the best first."""
    if down_factor > 1:
        return [published_name(radius, down_factor)]
    first = far is not False
    return [published_name(radius, down_factor, each) for each in (first, not first)]


def find_weights(
    name_or_path: str | os.PathLike[str],
    radius: int,
    down_factor: int,
    far: bool | None = None,
    *,
    weight_name: str | None = None,
    **hub_options: Any,
) -> Path:
    """A local path for a file, a folder or a hub repository; see `load_clear_weights`.

    Args:
        far: the setting: weights for far keys come first, or with False those for local attention.

    Raises:
        ValueError: `weight_name` is not safetensors.
        OSError: not found, or the hub cannot be reached.
    """
    who = "load_clear_weights"
    names = [weight_name] if weight_name else _names(radius, down_factor, far)
    if not names[0].endswith(SUFFIX):
        raise ValueError(f"{who}: weight_name must end in {SUFFIX!r}, got {names[0]!r}.")
    wanted = " or ".join(map(repr, names))
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            others = ", ".join(sorted(file.name for file in path.glob(f"*{SUFFIX}"))) or "none"
            raise FileNotFoundError(
                f"{who}: there is no {wanted} in {str(path)!r}; the {SUFFIX} files there: "
                f"{others}. Choose one with weight_name."
            )
        return found
    repository = os.fspath(name_or_path)
    if repository.count("/") != 1 or repository[0] in "./~" or path.suffix == SUFFIX:
        raise FileNotFoundError(f"{who}: there is no file or folder {repository!r}.")
    try:
        for name in names[:-1]:
            with suppress(EntryNotFoundError):  # nor in the cache, where the hub is not asked
                return Path(huggingface_hub.hf_hub_download(repository, name, **hub_options))
        return Path(huggingface_hub.hf_hub_download(repository, names[-1], **hub_options))
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise OSError(
            f"{who}: no local file or folder {repository!r}, and cannot get {wanted} from the hub "
            f"repository of that name: {(str(error).strip() or repr(error)).splitlines()[0]}"
        ) from error


@contextmanager
def open_checked(model: nn.Module, path: Path, settings: CLEARProcessor) -> Iterator[Any]:
    """A safetensors file all of whose contents fit the model. Leaves the model alone.

    Raises:
        ValueError: anything that does not fit, by name.
    """
    who = f"load_clear_weights: {path.name}"
    originals = originals_of(model)
    refuse_unsuitable(model, "load_clear_weights", merged_lora=bool(originals))
    with _alone(model):
        originals.check(model, "load_clear_weights")
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{who} is not a safetensors file, or is truncated: {error}.") from error
    with handle as file:
        parameters = parameters_by_key(model)
        shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
        learned = learned_of_far(file)
        shapes |= pooling_shapes(model, settings.down_factor, learned)
        check_header(who, file, shapes, settings)
        for key in shapes:
            tensor = file.get_tensor(key)
            # A finite value can overflow in a narrower dtype; float8 would hide it.
            dtype = parameters[key].dtype if key in parameters else tensor.dtype
            if not (tensor.float().abs() <= torch.finfo(dtype).max).all():
                raise ValueError(f"{who}: {key} has values that are not finite.")
        yield file


def load_checked(model: nn.Module, state: ClearState, file: Any, path: Path) -> None:
    """Copy the tensors of an `open_checked` file into the model, keeping what they replace.

    Args:
        state: the model's, within `changing`.
        path: the file's.
    """
    with torch.no_grad():
        now = state.originals.check(model, "load_clear_weights")
        state.originals.load(model, file, path, now)
        state.weights_far = made_for_far(file)
        state.learned = {key: file.get_tensor(key) for key in keys_of_far(file)}
        for name, attn in attention_layers(model).items():
            processor = attn.processor
            processor.far_weight, processor.far_offset = None, None
            processor.decide_far(state.weights_far)
            if processor.has_far_keys:
                give_learned(name, attn, state.learned, None)
                settle(model, attn)
        for key, parameter in pooling_by_key(model).items():
            parameter.copy_(file.get_tensor(key))
    settings = next(iter(attention_layers(model).values())).processor
    mark(
        model,
        radius=settings.radius,
        down_factor=settings.down_factor,
        far=state.weights_far,
        file=path.name,
        learned=bool(pooling_by_key(model)),
        fingerprints=state.originals.digests(),
    )
    made_for = "far keys" if state.weights_far else "local attention"
    logger.info("CLEAR weights loaded: %d tensors, made for %s", len(file.keys()), made_for)
    state.decide_far(model)
