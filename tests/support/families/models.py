"""A tiny random transformer of each family's real class, and inputs for it.

Two heads of 16 channels and two blocks of each kind. Images are given in tokens; text in tokens
of a sample, of which the padded part is masked.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)

HEADS, HEAD_DIM, TEXT_CHANNELS = 2, 16, 8
# Z-Image pads images and captions to a multiple of this. Captions are longer than is asked for,
# one of them still longer where they differ: so that no length is that of an image, too.
Z_IMAGE_MULTIPLE = 32
Z_IMAGE_LONGER, Z_IMAGE_LONGEST = 2 * Z_IMAGE_MULTIPLE, 5 * Z_IMAGE_MULTIPLE

# Parameters that are zero or small at first, and the deviation they get instead: no test could tell
# them from none, or attention would have no effect that can be told from rounding.
BOLD = {
    "pad_token": 1.0,
    "scale_shift_table": 1.0,
    "stream_modulations": 4.0,
    "adaLN_modulation.1": 0.3,
    "final_linear": 0.2,
}

# Whether a block of `TinyFamily.apart` is running, which the oracle leaves alone.
without_masks = ContextVar("without_masks", default=False)


class TinyFamily(NamedTuple):
    """How to make and call a tiny model of a family.

    Attributes:
        model_class: of diffusers.
        config: of the tiny model.
        inputs: the keyword arguments of a forward, see `make_inputs`.
        image_sequences: (length, start) of every sequence with the image that a layer attends
            over, in tokens, from the number of the image's tokens, of text and of the references'.
        masks_text: whether padded text can be told.
        takes_references: whether a sequence can hold reference images.
        guided: changes to `config` for a model with a guidance embedding; None: there are none.
        apart: where blocks are that attend over other images alone, maybe of the image's length.
        multiple: rows and columns must be multiples of it.
    """

    model_class: type
    config: dict[str, Any]
    inputs: Callable[..., dict[str, Any]]
    image_sequences: Callable[[int, int, int], list[tuple[int, int]]]
    masks_text: bool = False
    takes_references: bool = False
    guided: dict[str, Any] | None = None
    apart: str | None = None
    multiple: int = 1


def make_model(name: str, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A tiny model of a family of `FAMILIES`, with changes to its configuration."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = family.model_class(**family.config | config).eval()
    for parameter_name, parameter in model.named_parameters():
        for kind, deviation in BOLD.items():
            if kind in parameter_name:
                torch.nn.init.normal_(parameter, std=deviation)
    for block in () if family.apart is None else model.get_submodule(family.apart):
        block.register_forward_pre_hook(_leave_alone)
        block.register_forward_hook(_leave_alone_no_more)
    return model


def _leave_alone(*_: Any) -> None:
    without_masks.set(True)


def _leave_alone_no_more(*_: Any) -> None:
    without_masks.set(False)


def sized(name: str, rows: int, columns: int) -> tuple[int, int]:
    """The next larger size that a family can have."""
    multiple = FAMILIES[name].multiple
    return padded_to(multiple, rows), padded_to(multiple, columns)


def make_inputs(
    name: str,
    rows: int,
    columns: int,
    text: int = 5,
    batch: int = 1,
    padded: bool = False,
    guidance: bool = False,
    references: tuple[tuple[int, int], ...] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs of a forward.

    Args:
        rows, columns: of the image, in tokens.
        text: tokens of text in every sample.
        padded: all samples but the first have two tokens fewer, and padding in their place.
        guidance: with a guidance scale, for models with an embedding for it.
        references: (rows, columns) of reference images.
    """
    family = FAMILIES[name]
    assert not padded or (family.masks_text and batch > 1)
    assert not references or family.takes_references
    randn = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=randn)

    options: dict[str, Any] = {}
    if padded:
        options["padding"] = 2
    if references:
        options["references"] = references
    inputs = family.inputs(random, rows, columns, text, batch, **options)
    if guidance:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's prediction, (batch, ...)."""
    return prediction(model, inputs)


def prediction(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """`run`, with gradients where they are enabled."""
    return stacked(model(**inputs, return_dict=False)[0])


def stacked(out: Any) -> torch.Tensor:
    """Images, (batch, ...), of which Z-Image returns a list."""
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The blocks of one kind in which image and text meet."""
    names = ("layers", "transformer_blocks", "single_transformer_blocks")
    return next(getattr(model, name) for name in names if hasattr(model, name))


def text_mask(batch: int, text: int, padding: int, dtype: torch.dtype) -> torch.Tensor:
    """(batch, text): 0 for padding, at the end of all samples but the first."""
    mask = torch.ones(batch, text, dtype=dtype)
    mask[1:, text - padding :] = 0
    return mask


def raster_ids(rows: int, columns: int, group: int, channels: int) -> torch.Tensor:
    """(rows * columns, channels): group, row, column of every token; zeros behind."""
    ids = torch.zeros(rows, columns, channels)
    ids[..., 0] = group
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    return ids.reshape(-1, channels)


def flux_inputs(random, rows, columns, text, batch, references=()):
    sizes = [(rows, columns), *references]
    return {
        "hidden_states": random(batch, sum(h * w for h, w in sizes), 4),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 0.5),
        # Kontext: all reference images are one group.
        "img_ids": torch.cat([raster_ids(h, w, min(i, 1), 3) for i, (h, w) in enumerate(sizes)]),
        "txt_ids": torch.zeros(text, 3),
    }


def chroma_inputs(random, rows, columns, text, batch, padding=0):
    inputs = flux_inputs(random, rows, columns, text, batch)
    del inputs["pooled_projections"]
    image = torch.ones(batch, rows * columns, dtype=torch.bool)
    # Of text and image together. The pipeline has it in the dtype of the prompt; diffusers then
    # adds ones and zeros to the scores, which hides nothing.
    inputs["attention_mask"] = torch.cat(
        [text_mask(batch, text, padding, torch.bool), image], dim=1
    )
    return inputs


def flux2_inputs(random, rows, columns, text, batch, references=()):
    sizes = [(rows, columns), *references]
    txt_ids = torch.zeros(text, 4)
    txt_ids[:, 3] = torch.arange(text)
    return {
        "hidden_states": random(batch, sum(h * w for h, w in sizes), 4),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cat([raster_ids(h, w, 10 * i, 4) for i, (h, w) in enumerate(sizes)]),
        "txt_ids": txt_ids,
    }


def sd3_inputs(random, rows, columns, text, batch):
    return {
        "hidden_states": random(batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "pooled_projections": random(batch, 8),
        "timestep": torch.full((batch,), 500.0),
    }


def qwen_image_inputs(random, rows, columns, text, batch, padding=0, references=()):
    sizes = [(rows, columns), *references]
    mask = text_mask(batch, text, padding, torch.int64) if padding else None
    return {
        "hidden_states": random(batch, sum(h * w for h, w in sizes), 4),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, h, w) for h, w in sizes]] * batch,
    }


def z_image_inputs(random, rows, columns, text, batch, padding=0):
    # A caption is padded with tokens everybody sees; only a shorter sequence of a batch is masked.
    extra = [Z_IMAGE_LONGEST if padding and i == 0 else Z_IMAGE_LONGER for i in range(batch)]
    return {
        "x": [random(4, 1, 2 * rows, 2 * columns) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [random(text + more, TEXT_CHANNELS) for more in extra],
    }


def hunyuan_image_inputs(random, rows, columns, text, batch, padding=0):
    # The second encoder's text is 3 tokens, of which every sample but the first has none.
    second = torch.ones(batch, 3, dtype=torch.int64)
    second[1:] = 0
    return {
        "hidden_states": random(batch, 4, rows, columns),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "encoder_attention_mask": text_mask(batch, text, padding, torch.int64),
        "encoder_hidden_states_2": random(batch, 3, TEXT_CHANNELS),
        "encoder_attention_mask_2": second if padding else torch.ones_like(second),
    }


def cogview4_inputs(random, rows, columns, text, batch):
    size = torch.tensor([[rows * 16.0, columns * 16.0]] * batch)
    return {
        "hidden_states": random(batch, 4, 2 * rows, 2 * columns),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 500.0),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def krea2_inputs(random, rows, columns, text, batch, padding=0, references=()):
    sizes = [(rows, columns), *references]
    mask = text_mask(batch, text, padding, torch.bool) if padding else None
    ids = [raster_ids(h, w, i, 3) for i, (h, w) in enumerate(sizes)]
    return {
        "hidden_states": random(batch, sum(h * w for h, w in sizes), 4),
        "encoder_hidden_states": random(batch, text, 2, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": torch.cat([torch.zeros(text, 3), *ids]),
        "encoder_attention_mask": mask,
    }


def flux3_inputs(random, rows, columns, text, batch, references=()):
    ids = [raster_ids(h, w, 0, 4) / 2 for h, w in [(rows, columns), *references]]
    for index, each in enumerate(ids):
        each[:, 3] = -index
    inputs = flux2_inputs(random, rows, columns, text, batch) | {"img_ids": ids[0]}
    if references:
        inputs["image_cond_ids"] = torch.cat(ids[1:])
        inputs["image_cond_hidden_states"] = random(batch, len(inputs["image_cond_ids"]), 4)
    return inputs


def qwen_image21_inputs(random, rows, columns, text, batch, padding=0):
    assert rows % 2 == columns % 2 == 0
    slots = torch.arange(text + rows * columns // 4) >= text
    return {
        "hidden_states": random(batch, rows * columns, 4),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "encoder_hidden_states_mask": text_mask(batch, text, padding, torch.bool)
        if padding
        else None,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, rows, columns)]] * batch,
        "img_mask": slots.expand(batch, -1),
    }


def longcat_image_inputs(random, rows, columns, text, batch, references=()):
    sizes = [(rows, columns), *references]
    ids = torch.cat([raster_ids(h, w, i + 1, 3) for i, (h, w) in enumerate(sizes)])
    ids[:, 1:] += text
    return {
        "hidden_states": random(batch, len(ids), 4),
        "encoder_hidden_states": random(batch, text, TEXT_CHANNELS),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.arange(text)[:, None] * torch.tensor([0.0, 1.0, 1.0]),
    }


def ernie_image_inputs(random, rows, columns, text, batch, padding=0):
    return {
        "hidden_states": random(batch, 4, rows, columns),
        "timestep": torch.full((batch,), 500.0),
        "text_bth": random(batch, text, TEXT_CHANNELS),
        "text_lens": text_mask(batch, text, padding, torch.int64).sum(dim=1),
    }


def text_first(image: int, text: int, references: int) -> list[tuple[int, int]]:
    return [(text + image + references, text)]


def image_first(image: int, text: int, references: int) -> list[tuple[int, int]]:
    return [(image + text, 0)]


def padded_to(multiple: int, length: int) -> int:
    return -(-length // multiple) * multiple


def z_image_sequences(image: int, text: int, references: int) -> list[tuple[int, int]]:
    # In the noise refiner alone; with the longest caption of a batch, padded or not.
    alone = padded_to(Z_IMAGE_MULTIPLE, image)
    captions = [
        padded_to(Z_IMAGE_MULTIPLE, text + extra) for extra in (Z_IMAGE_LONGER, Z_IMAGE_LONGEST)
    ]
    found = [(alone, 0), *((alone + caption, 0) for caption in captions)]
    # Captions alone are attended over too, and are told apart by their length.
    assert not {length for length, _ in found} & set(captions), "choose another size"
    return found


SIZES = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
FLUX_CONFIG = SIZES | {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_CHANNELS,
    "axes_dims_rope": (4, 6, 6),
}

FAMILIES = {
    "flux": TinyFamily(
        FluxTransformer2DModel,
        FLUX_CONFIG | {"pooled_projection_dim": 8},
        flux_inputs,
        text_first,
        takes_references=True,
        guided={"guidance_embeds": True},
    ),
    "chroma": TinyFamily(
        ChromaTransformer2DModel,
        FLUX_CONFIG
        | {
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        chroma_inputs,
        text_first,
        masks_text=True,
    ),
    "flux2": TinyFamily(
        Flux2Transformer2DModel,
        FLUX_CONFIG
        | {
            "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 8,
            "guidance_embeds": False,
        },
        flux2_inputs,
        text_first,
        takes_references=True,
        guided={"guidance_embeds": True},
    ),
    "sd3": TinyFamily(
        SD3Transformer2DModel,
        SIZES
        | {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": TEXT_CHANNELS,
            "caption_projection_dim": HEADS * HEAD_DIM,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 12,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        sd3_inputs,
        # The second attention of a block with two is over the image alone.
        lambda image, text, references: [(image + text, 0), (image, 0)],
    ),
    "qwen-image": TinyFamily(
        QwenImageTransformer2DModel,
        SIZES
        | {
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 2,
            "joint_attention_dim": TEXT_CHANNELS,
            "axes_dims_rope": (4, 6, 6),
        },
        qwen_image_inputs,
        text_first,
        masks_text=True,
        takes_references=True,
    ),
    "z-image": TinyFamily(
        ZImageTransformer2DModel,
        {
            "in_channels": 4,
            "dim": HEADS * HEAD_DIM,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT_CHANNELS,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 16, 16],
        },
        z_image_inputs,
        z_image_sequences,
        masks_text=True,
    ),
    "hunyuan-image": TinyFamily(
        HunyuanImageTransformer2DModel,
        SIZES
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "text_embed_dim": TEXT_CHANNELS,
            "text_embed_2_dim": TEXT_CHANNELS,
            "rope_axes_dim": (8, 8),
        },
        hunyuan_image_inputs,
        lambda image, text, references: [(image + text + 3, 0)],
        masks_text=True,
        guided={"guidance_embeds": True},
    ),
    "cogview4": TinyFamily(
        CogView4Transformer2DModel,
        SIZES
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": TEXT_CHANNELS,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "sample_size": 16,
            "rope_axes_dim": (16, 16),
        },
        cogview4_inputs,
        text_first,
    ),
    "krea2": TinyFamily(
        Krea2Transformer2DModel,
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": 2 * HEADS,
            "num_key_value_heads": HEADS,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": TEXT_CHANNELS,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        krea2_inputs,
        text_first,
        masks_text=True,
        takes_references=True,
    ),
    "flux3": TinyFamily(
        Flux3Transformer2DModel,
        SIZES
        | {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": TEXT_CHANNELS,
            "timestep_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        flux3_inputs,
        # First over the image alone.
        lambda image, text, references: [(text + image + references, text), (image, 0)],
        takes_references=True,
        apart="mode_blocks.image_cond",
    ),
    "qwen-image-2.1": TinyFamily(
        QwenImage21Transformer2DModel,
        SIZES
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "context_in_dim": TEXT_CHANNELS,
            "axes_dims_rope": (4, 6, 6),
        },
        qwen_image21_inputs,
        text_first,
        masks_text=True,
        multiple=2,
    ),
    "longcat-image": TinyFamily(
        LongCatImageTransformer2DModel,
        FLUX_CONFIG | {"pooled_projection_dim": 8},
        longcat_image_inputs,
        text_first,
        takes_references=True,
    ),
    "ernie-image": TinyFamily(
        ErnieImageTransformer2DModel,
        {
            "hidden_size": HEADS * HEAD_DIM,
            "num_attention_heads": HEADS,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": TEXT_CHANNELS,
            "rope_axes_dim": (4, 6, 6),
        },
        ernie_image_inputs,
        image_first,
        masks_text=True,
    ),
}
