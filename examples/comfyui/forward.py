"""One forward of a ComfyUI diffusion model: where its image is in the sequence.

Models with position ids hand them to patches of the kind "post_input", together with the forward's
own `transformer_options`; of the others the latent's size and the text's length say it. What is
found lives in that forward's options and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from clear_dit.attention.grid import layout_from_ids
from clear_dit.attention.layout import Layout

# Under which a forward is in its `transformer_options`.
KEY = "clear_dit"


class Known(NamedTuple):
    """A kind of model.

    Attributes:
        title: its name for people.
        read: the layout from the model and a forward's arguments by name; None where the model
            hands out position ids.
    """

    title: str
    read: Callable[[Any, Mapping[str, Any]], Layout] | None = None


@dataclass
class Forward:
    """What the layers of one forward share.

    Attributes:
        model: the diffusion model.
        layout: where the tokens are; None until it is known.
        dense: whether all layers attend in full, at this noise level.
        attended: how many calls of attention came from its layers.
    """

    model: Any
    layout: Layout | None = None
    dense: bool = False
    attended: int = 0

    def of_layer(self, number: int | None, queries: int, keys: int) -> Layout | None:
        """The layout of a layer's attention; None where it is not the image's own.

        Args:
            number: of the layer; None outside of the model's blocks.
            queries, keys: lengths of the sequences, in tokens.

        Raises:
            ValueError: a block's attention over other tokens than were announced.
        """
        if number is None:
            return self._of_refiner(queries, keys)
        if self.layout is None:
            raise ValueError(
                "CLEAR attention: this ComfyUI does not tell where the image is (no "
                "transformer_options in its post_input patches); update ComfyUI."
            )
        if queries != keys:  # over an adapter's tokens, or with more keys than the sequence
            return None
        if queries != self.layout.sequence_length:
            raise ValueError(
                f"CLEAR attention: {queries} tokens came, but the model announced "
                f"{self.layout.text_length} text and {self.layout.rows} x {self.layout.columns} "
                f"image tokens{self.layout.and_references}: another node changes the sequence; use "
                "one of the two nodes."
            )
        return self.layout

    def _of_refiner(self, queries: int, keys: int) -> Layout | None:
        # Z-Image refines text and image apart, before its blocks.
        if self.layout is None or not hasattr(self.model, "noise_refiner"):
            return None
        image = self.layout.image_only
        # Of one length they cannot be told apart, and full attention is right for both.
        own = queries == keys == image.sequence_length != self.layout.text_length
        return image if own else None


def known(model: Any) -> Known:
    """The kind of a diffusion model.

    Raises:
        ValueError: none that these nodes know.
    """
    name = type(model).__name__
    if name not in MODELS:
        titles = ", ".join(dict.fromkeys(kind.title for kind in MODELS.values()))
        raise ValueError(
            f"CLEAR attention: does not know this model ({name}); it knows {titles}. Connect one "
            "of these to the node's model input."
        )
    return MODELS[name]


def read_ids(given: Mapping[str, Any]) -> Layout:
    """The layout from what a "post_input" patch gets.

    Raises:
        ValueError: the positions are not one raster.
    """
    if given.get("img_ids") is None:
        raise ValueError(
            "CLEAR attention: the model has no position ids in this forward, so that the image's "
            "rows and columns cannot be known; another node took them away."
        )
    try:
        layout = layout_from_ids(given["txt_ids"], given["img_ids"])
    except ValueError as error:
        raise ValueError(
            "CLEAR attention: the positions of the image tokens are not those of one image, with "
            "reference images apart from it; give the reference latents the method offset or index "
            "(not uxo)."
        ) from error
    return layout._replace(text_length=given["txt"].shape[1])


def _rows_and_columns(model: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    latent, patch = given["x"], int(model.patch_size)
    if latent.ndim > 5 or (latent.ndim == 5 and latent.shape[2] != 1):
        raise ValueError(
            "CLEAR attention: the latent must be one image, got one of shape "
            f"{tuple(latent.shape)} (frames or layers)."
        )
    rows, columns = (-(-side // patch) for side in latent.shape[-2:])
    return rows, columns


def check_latent(model: Any, given: Mapping[str, Any]) -> None:
    """Refuse latents of several frames or layers.

    Raises:
        ValueError: that.
    """
    _rows_and_columns(model, given)


def _chroma(model: Any, given: Mapping[str, Any]) -> Layout:
    return Layout(given["context"].shape[1], *_rows_and_columns(model, given))


def _z_image(model: Any, given: Mapping[str, Any]) -> Layout:
    for name in ("ref_latents", "ref_frames"):
        if len(given.get(name) or ()):
            raise ValueError(
                "CLEAR attention: Z-Image with reference images is not supported: they stand "
                "before the image. Take the references out, or this node."
            )
    rows, columns = _rows_and_columns(model, given)
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    text = given["context"].shape[1]
    padding = -(rows * columns) % multiple
    return Layout(text + -text % multiple, rows, columns, reference_length=padding)


# By the class of ComfyUI's diffusion model.
MODELS = {
    "Flux": Known("FLUX.1 and FLUX.2"),
    "Chroma": Known("Chroma", _chroma),
    "QwenImageTransformer2DModel": Known("Qwen-Image"),
    "NextDiT": Known("Z-Image", _z_image),
}
