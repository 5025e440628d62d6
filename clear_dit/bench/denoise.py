"""A whole denoising step of a model, full attention against CLEAR, and what the FLOPs allow."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..kernels.window import Window
from ..models import TOKEN_PIXELS, load_pipeline, model_defaults
from ..plugin import apply_clear, remove_clear
from .timing import hardware, table, time_in_turn


def bench_denoise(
    model: str,
    height: int,
    width: int,
    radius: int,
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Time one forward pass of the transformer (one pass of guidance) at a size in pixels.

    Returns:
        rows with attention, seconds, tflop; `speedup`; `flops_allow`, the ratio of the FLOPs of
        both: linear layers (counted by PyTorch) and attention (4 per attended pair and channel).
    """
    pipe = load_pipeline(model, dtype, device)
    transformer = pipe.transformer
    config = transformer.config
    rows, columns = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    text_length = min(model_defaults(model).text_length, pipe.tokenizer_2.model_max_length)
    inputs = _inputs(pipe, rows, columns, text_length)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return transformer(**inputs, return_dict=False)[0]

    def full() -> torch.Tensor:
        remove_clear(pipe)
        return step()

    def clear() -> torch.Tensor:
        apply_clear(pipe, radius=radius, impl=impl)
        return step()

    window = Window(rows, columns, text_length, radius)
    layers = config.num_layers + config.num_single_layers
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    linear = _linear_flops(transformer, window.sequence_length, text_length)
    dense_pairs = window.sequence_length**2
    flops = {
        "full": linear + layers * 4 * dense_pairs * heads * head_dim,
        "clear": linear + layers * window.attention_flops(heads, head_dim),
    }
    seconds = time_in_turn({"full": full, "clear": clear}, repeats, device)
    return {
        "rows": [
            {"attention": name, "seconds": seconds[name], "tflop": flops[name] / 1e12}
            for name in ("full", "clear")
        ],
        "speedup": seconds["full"] / seconds["clear"],
        "flops_allow": flops["full"] / flops["clear"],
        "model": model,
        "height": height,
        "width": width,
        "radius": radius,
        "text_length": text_length,
        "dtype": str(dtype).removeprefix("torch."),
        "hardware": hardware(device),
        "torch": torch.__version__,
    }


def _inputs(pipe: Any, rows: int, columns: int, text_length: int) -> dict[str, torch.Tensor | None]:
    config, dtype, device = pipe.transformer.config, pipe.transformer.dtype, pipe.device
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": noise(1, rows * columns, config.in_channels),
        "encoder_hidden_states": noise(1, text_length, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=device) if config.guidance_embeds else None,
        "img_ids": pipe._prepare_latent_image_ids(1, rows, columns, device, dtype),
        "txt_ids": torch.zeros(text_length, 3, device=device),
    }


def _linear_flops(transformer: Any, sequence: int, text_length: int) -> int:
    """FLOPs outside attention, counted on the meta device: they are linear in the tokens."""
    with torch.device("meta"):
        meta = type(transformer).from_config(transformer.config)
    config = meta.config
    tokens = sequence - text_length
    inputs = {
        "hidden_states": torch.empty(1, tokens, config.in_channels, device="meta"),
        "encoder_hidden_states": torch.empty(
            1, text_length, config.joint_attention_dim, device="meta"
        ),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "guidance": torch.empty(1, device="meta") if config.guidance_embeds else None,
        "img_ids": torch.empty(tokens, 3, device="meta"),
        "txt_ids": torch.empty(text_length, 3, device="meta"),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(**inputs)
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op in products)


def report(result: dict[str, Any]) -> str:
    return (
        f"{result['model']}, {result['height']} x {result['width']} px, radius {result['radius']} "
        f"tokens, {result['dtype']}, {result['hardware']}\n{table(result['rows'])}\n"
        f"CLEAR is {result['speedup']:.2f} times faster a step; "
        f"the FLOPs allow {result['flops_allow']:.2f}"
    )
