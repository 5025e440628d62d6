"""LoRA of peft: on top of CLEAR, merged into the weights and not."""

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from support.models import FAR, assert_differs, assert_same, dense_masks, image_mask, run

from clear_dit import CLEARProcessor, apply_clear, remove_clear

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]
ROUTES = {"bare": lambda m, **settings: m.set_attn_processor(CLEARProcessor(**settings))}
ROUTES["apply_clear"] = apply_clear


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_lora(tiny_pipeline, tiny_inputs, route, merged):
    pipe, inputs = tiny_pipeline(FluxPipeline), tiny_inputs(4, 6)
    model = pipe.transformer
    plain = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    if merged:
        pipe.fuse_lora(components=["transformer"])
    full = run(model, inputs)
    assert_differs(full, plain)
    with dense_masks(image_mask(4, 6, radius=2)):
        expected = run(model, inputs)
    assert_differs(expected, full)
    route(model, radius=FAR)
    assert_same(run(model, inputs), full)
    remove_clear(model)
    route(model, radius=2, far=False)
    assert_same(run(model, inputs), expected)
    if merged:  # and out again, while CLEAR is there
        pipe.unfuse_lora(components=["transformer"])
        assert_same(run(model, inputs), expected)
    model.disable_adapters()
    remove_clear(model)
    assert_same(run(model, inputs), plain)


def test_files_in_pipelines(tiny_pipeline, tiny_inputs, tmp_path):
    """Saved by one pipeline, loaded into another that has CLEAR, with a scale; unloaded."""
    pipe, inputs = tiny_pipeline(FluxPipeline), tiny_inputs(4, 6)
    model = pipe.transformer
    apply_clear(pipe, radius=2, far=False)
    plain = run(model, inputs)
    other = tiny_pipeline(FluxPipeline).transformer
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
    other.add_adapter(config)
    FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(other))
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    other.set_adapters("default", 0.5)
    with dense_masks(image_mask(4, 6, radius=2)):
        assert_same(run(model, inputs), run(other, inputs))
    assert_differs(run(model, inputs), plain)
    pipe.unload_lora_weights()
    assert torch.equal(run(model, inputs), plain)
