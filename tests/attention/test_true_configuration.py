"""The real FLUX.1-dev, 12 billion parameters at 8192 px, without its weights: FakeTensorMode."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from support.slow import slow
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from clear_dit import CLEARProcessor, Window
from clear_dit.kernels.cells import FAR_LEVELS

FLUX_DEV = {"guidance_embeds": True}  # the class's defaults are FLUX.1-dev but for this
LAYERS = 19 + 38


@slow
@pytest.mark.parametrize("far", [False, True])
def test_flux_dev_at_8192_pixels(far):
    side, text_length = 8192 // 16, 512
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = FluxTransformer2DModel(**FLUX_DEV)
        finally:
            torch.set_default_dtype(torch.float32)
        assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
        model.set_attn_processor(CLEARProcessor(radius=8, grid=(side, side), far=far))
        (out,) = model(
            hidden_states=torch.empty(1, side * side, 64, dtype=torch.bfloat16),
            encoder_hidden_states=torch.empty(1, text_length, 4096, dtype=torch.bfloat16),
            pooled_projections=torch.empty(1, 768, dtype=torch.bfloat16),
            timestep=torch.empty(1, dtype=torch.bfloat16),
            guidance=torch.empty(1),
            img_ids=torch.empty(side * side, 3),
            txt_ids=torch.empty(text_length, 3),
            return_dict=False,
        )
    assert out.shape == (1, side * side, 64)
    flops = counter.get_flop_counts()["Global"]
    attention = flops.pop(torch.ops.clear_dit.tiled_attention)
    window = Window(side, side, text_length, 8, far_levels=FAR_LEVELS if far else 0)
    assert attention == LAYERS * window.attention_flops(24, 128)
    if not far:
        assert round(attention / LAYERS / 1e9, 1) == 3915.4  # the paper's table 2
    assert abs(sum(flops.values()) / 1e12 - 3391) < 5  # linear layers, TFLOP a step
