"""The node "CLEAR weights"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
import huggingface_hub
from comfy_api.latest import io
from huggingface_hub.errors import HfHubHTTPError

from .adapter import WEIGHTS, WHO, read_adapter

FOLDER = "clear"
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))

# The authors' own, for FLUX.1-dev and schnell. Offered whether they are there or not: they are
# fetched when first used.
PUBLISHED = "Huage001/CLEAR"
KINDS = ("8", "16", "32", "8_down_4", "16_down_4")
FETCHED = {
    f"{PUBLISHED}/clear_local_{kind}.safetensors": f"clear_local_{kind}.safetensors"
    for kind in KINDS
}


class ClearWeights(io.ComfyNode):
    """MODEL -> MODEL: a FLUX.1 model's attention with weights tuned for local attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        local = [
            name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")
        ]
        return io.Schema(
            node_id="ClearWeights",
            display_name="CLEAR weights",
            category="model/CLEAR",
            description=(
                "Replaces the attention weights of FLUX.1 (or Chroma) by ones tuned for CLEAR "
                "attention. Put it right after the model's loader, before any LoRA."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.1 model, before any LoRA. It is copied."),
                io.Combo.Input(
                    "weights",
                    options=[*sorted(local), *FETCHED],
                    tooltip=(
                        "Your own files lie in models/clear. Those of Huage001/CLEAR are the "
                        "published ones for FLUX.1-dev and schnell; the number is the radius to "
                        "give CLEAR attention. Downloaded when first used (3.6 GB in bf16)."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, weights: str) -> io.NodeOutput:
        return io.NodeOutput(apply(model, _path(weights)))


def apply(model: Any, path: Path) -> Any:
    """A clone of a ComfyUI model with CLEAR weights; the model stays as it is.

    Raises:
        ValueError: weights that do not fit, or a model that has patches there already.
    """
    prefix = "diffusion_model."
    state = model.model_state_dict(prefix)
    shapes = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    diffusion = model.get_model_object("diffusion_model")
    adapter, values = read_adapter(path, diffusion, shapes)
    keys = {key if isinstance(key, str) else key[0] for key in values}
    taken = sorted(keys & model.patches.keys())
    if taken:
        raise ValueError(
            f"{WHO}: {len(taken)} of the weights they replace are patched already ({taken[0]}), by "
            "a LoRA or other CLEAR weights, which would be lost; put CLEAR weights before it."
        )
    clone = model.clone()
    added = clone.add_patches({key: ("set", (tensor,)) for key, tensor in values.items()})
    if len(added) != len(values):
        raise ValueError(f"{WHO}: {path.name}: ComfyUI took {len(added)} of {len(values)} tensors.")
    clone.model_options["transformer_options"][WEIGHTS] = adapter
    return clone


def _path(weights: str) -> Path:
    if weights not in FETCHED:
        return Path(folder_paths.get_full_path_or_raise(FOLDER, weights))
    try:
        return Path(huggingface_hub.hf_hub_download(PUBLISHED, FETCHED[weights]))
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"{WHO}: cannot get {FETCHED[weights]} from huggingface.co/{PUBLISHED} ({error}); "
            "download it yourself into models/clear."
        ) from error
