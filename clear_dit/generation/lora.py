"""The LoRA of a request: whether it can be had, and a pipeline with it and without."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import RequestError, first_line, is_out_of_memory
from .models import Model, quiet_libraries

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline

SUFFIX = ".safetensors"
_NAME = "request"  # of the adapter, for peft
# Part of the pipeline, its layer, and which of the two matrices; as diffusers has and had it.
_KEY = re.compile(
    r"(?P<part>\w+)\.(?P<layer>.+)\.lora(?:_linear_layer)?"
    r"(?:(?P<down>_A|\.down)|_B|\.up)\.(?:weight|(?P<bias>bias))"
)


def check_lora(path: str, model: Model, window: tuple[int, int, bool] | None) -> None:
    """Refuse a LoRA as far as it can be told without reading its tensors.

    Args:
        window: radius, down_factor and far of local attention with the model's own weights; None
            for anything else.

    Raises:
        RequestError: peft is missing, the family's pipeline takes none, there is no such file, it
            is not safetensors, or it was distilled for another window.
    """
    if not _takes_lora(model):
        raise RequestError(
            f"--lora: diffusers loads none for {model.family.title}; leave it out, or take a model "
            "of another family."
        )
    if find_spec("peft") is None:
        raise RequestError("--lora needs peft; run: pip install 'clear-dit[lora]'.")
    file = Path(path)
    if file.suffix != SUFFIX:
        raise RequestError(f"--lora must be a {SUFFIX} file, got {path!r}; others can run code.")
    if not file.is_file():
        raise RequestError(f"--lora: there is no file {path}.")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            said, names = opened.metadata() or {}, list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise RequestError(f"--lora: {path} is not a safetensors file, or truncated.") from error
    if any("dora_scale" in name for name in names):
        raise RequestError(
            f"--lora: {path} is a DoRA, of which diffusers would load a part; take a LoRA."
        )
    if "radius" in said:  # of `clear-dit distill --lora`
        made = said["radius"], said.get("down_factor", "1"), said.get("far") == "true"
        if window is None or made != (str(window[0]), str(window[1]), window[2]):
            raise RequestError(
                f"--lora: {path} was distilled for --radius {made[0]} --down-factor {made[1]} "
                f"--{'far' if made[2] else 'no-far'} --weights none; say so, or take another."
            )


def _takes_lora(model: Model) -> bool:
    with quiet_libraries():
        import diffusers

        pipeline = getattr(diffusers, model.index.pipeline.removeprefix("CLEAR"))
    return hasattr(pipeline, "load_lora_weights")


def load_lora(pipe: CLEARPipeline, path: Path, scale: float) -> None:
    """Give a pipeline without one a LoRA, by peft: its own weights stay what they are.

    Args:
        path: of a safetensors file, in any format that diffusers knows.
        scale: how strongly it acts.

    Raises:
        RequestError: it does not fit, or cannot be read; the pipeline is as it was.
    """
    path = path.resolve()
    where: dict[str, Any] = {"weight_name": path.name, "use_safetensors": True}
    where["local_files_only"] = True
    try:
        # What is passed over in translating a format is said by diffusers, and stays to be heard.
        _check_fit(pipe, pipe.lora_state_dict(str(path.parent), **where))
        with quiet_libraries():
            pipe.load_lora_weights(str(path.parent), adapter_name=_NAME, **where)
            pipe.set_adapters([_NAME], adapter_weights=[scale])
    except Exception as error:
        unload_lora(pipe)
        if is_out_of_memory(error):
            raise
        raise RequestError(f"--lora {path.name}: {first_line(error)}") from error


def unload_lora(pipe: CLEARPipeline) -> None:
    """Take a pipeline's LoRA away, be it only half there; it may be without one."""
    with quiet_libraries():
        pipe.unload_lora_weights()


def _check_fit(pipe: CLEARPipeline, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse what is no LoRA, or one whose layers are not the pipeline's.

    Args:
        state: as diffusers names it: "transformer.transformer_blocks.0.attn.to_q.lora_A.weight".

    Raises:
        ValueError: the first layer that is not there or has other sizes.
    """
    if not state:
        raise ValueError("holds no LoRA.")
    for key, tensor in state.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"holds {key}, which is no LoRA's; only LoRAs are loaded.")
        part, layer = getattr(pipe, found["part"], None), found["layer"]
        if not hasattr(part, "text_model"):  # as transformers had it, and diffusers translates
            layer = layer.removeprefix("text_model.")
        try:
            weight = part.get_submodule(layer).weight  # type: ignore[union-attr]
        except AttributeError:
            weight = None
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            raise ValueError(
                f"is for another model: {pipe.family.title} here has no layer "
                f"{found['part']}.{found['layer']}."
            )
        side = 1 if found["down"] else 0
        wanted = weight.shape[side]
        if tensor.ndim == 0 or tensor.shape[0 if found["bias"] else side] != wanted:
            raise ValueError(
                f"is for another model: {key} is {tuple(tensor.shape)}, and the layer here is "
                f"{tuple(weight.shape)}."
            )
