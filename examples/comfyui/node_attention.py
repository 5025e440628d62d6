"""The node "CLEAR attention"."""

from __future__ import annotations

import logging
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from .adapter import WEIGHTS
from .attention import Attention, Settings
from .forward import KEY, known
from .layers import layer_count, parse_layers

logger = logging.getLogger("clear_dit.comfyui")

FAR = {"auto": None, "on": True, "off": False}
OVERRIDE = "optimized_attention_override"


class ClearAttention(io.ComfyNode):
    """MODEL -> MODEL: image tokens attend to a disc around them, and to pooled far tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ClearAttention",
            display_name="CLEAR attention",
            category="model/CLEAR",
            description=(
                "Attention that takes time linear in the pixels, for large images: each part of "
                "the image looks closely at what is near and coarsely at what is far. For FLUX.1, "
                "FLUX.2, Chroma, Qwen-Image and Z-Image. Put it last before the sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. It is copied."),
                io.Int.Input(
                    "radius",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip=(
                        "How far each part of the image looks closely, in steps of 16 pixels. "
                        "Smaller is faster; larger is nearer to the stock model. With CLEAR "
                        "weights take the radius they were made for."
                    ),
                ),
                io.Combo.Input(
                    "far",
                    options=list(FAR),
                    default="auto",
                    tooltip=(
                        "Whether each part also sees the rest of the image, coarsely. auto: as the "
                        "CLEAR weights were made for; on without weights, where off would change "
                        "the image."
                    ),
                ),
                io.Float.Input(
                    "dense_until",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Full attention for this first share of the sampling (as start_percent of "
                        "other nodes): 0.2 lays the picture out as the stock model does, and is "
                        "fast from there on. 0 is fast from the first step."
                    ),
                ),
                io.String.Input(
                    "dense_layers",
                    default="",
                    tooltip=(
                        "Layers that always have full attention, such as '0-1, 56'. Double blocks "
                        "count first: FLUX.1 has 0-18 double and 19-56 single. Empty: none."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, radius: int, far: str, dense_until: float, dense_layers: str
    ) -> io.NodeOutput:
        return io.NodeOutput(apply(model, radius, far, dense_until, dense_layers))


def apply(
    model: Any,
    radius: int = 16,
    far: str = "auto",
    dense_until: float = 0.0,
    dense_layers: str = "",
) -> Any:
    """A clone of a ComfyUI model with CLEAR's attention; the model stays as it is.

    Raises:
        ValueError: a model the nodes do not know or that has it already, or a setting out of range.
    """
    diffusion = model.get_model_object("diffusion_model")
    kind = known(diffusion)
    layers = parse_layers(dense_layers, layer_count(diffusion), kind.title)
    if far not in FAR or not 0 <= dense_until <= 1 or radius < 1:
        raise ValueError(
            f"CLEAR attention: far must be one of {', '.join(FAR)}, dense_until 0 to 1 and radius "
            f"1 or more, got {far!r}, {dense_until} and {radius}."
        )
    if FAR[far] and radius == 1:
        raise ValueError(
            "CLEAR attention: far keys need a radius of at least 2, got 1; set far to off."
        )
    above = float("inf")
    if dense_until > 0:
        sampling = model.get_model_object("model_sampling")
        above = float(sampling.percent_to_sigma(dense_until))
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    previous = options.get(OVERRIDE)
    if clone.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(KEY):
        raise ValueError(
            "CLEAR attention: this model has it already; use one such node for a model."
        )
    if previous is not None:
        logger.warning(
            "CLEAR attention: another node chose the model's attention; it gets what stays full "
            "(text, dense steps and layers), and CLEAR's own does without it"
        )
    weights = options.get(WEIGHTS)
    if weights is not None and weights.radius not in (None, radius):
        logger.warning(
            "CLEAR attention: %s was made for radius %d, the node has %d",
            weights.name, weights.radius, radius,
        )  # fmt: skip
    attention = Attention(Settings(radius, FAR[far], above, layers), previous)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, attention.wrapper)
    clone.set_model_patch(attention.post_input, "post_input")
    options[OVERRIDE] = attention.override
    return clone
