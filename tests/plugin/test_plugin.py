"""apply_clear and remove_clear on a model that other things happen to as well."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from support.models import assert_same, run

from clear_dit import CLEARProcessor, Window, apply_clear, remove_clear
from clear_dit.weights.state import ClearState


def local(rows, columns, radius):
    """What the stock model computes under the mask of a window over 3 text tokens."""
    return {"joint_attention_kwargs": {"attention_mask": Window(rows, columns, 3, radius).mask()}}


def test_every_layer_and_back(tiny_transformer, tiny_inputs, caplog):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    originals, expected = model.attn_processors, run(model, inputs)
    with caplog.at_level(logging.INFO, logger="clear_dit.plugin"):
        (applied,) = apply_clear(model, radius=2)
    assert "CLEAR applied to 4 attention layers: radius=2, down_factor=1" in caplog.text
    assert applied.far
    assert str(applied) == f"{applied.family}: 4 attention layers run CLEAR with far keys"
    assert len({id(processor) for processor in model.attn_processors.values()}) == 4
    assert not torch.allclose(run(model, inputs), expected)
    assert remove_clear(model) is True
    assert model.attn_processors == originals
    assert not model._forward_pre_hooks
    assert torch.equal(run(model, inputs), expected)
    assert remove_clear(model) is False


def test_bare_processors_are_removed_too(tiny_transformer):
    model = tiny_transformer()
    model.set_attn_processor(CLEARProcessor())
    assert remove_clear(model) is True
    assert {type(p) for p in model.attn_processors.values()} == {FluxAttnProcessor}


def test_a_second_call_replaces_settings_and_keeps_the_originals(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    originals, stock = model.attn_processors, tiny_transformer()
    apply_clear(model, radius=9)
    apply_clear(model, radius=2, far=False)
    assert_same(run(model, inputs), run(stock, inputs, **local(4, 6, 2)))
    apply_clear(model, down_factor=2)
    layer = model.single_transformer_blocks[0].attn
    layer.processor.spatial_weight.data.fill_(0.5)
    apply_clear(model, down_factor=2, radius=3)
    assert (layer.processor.spatial_weight == 0.5).all()
    apply_clear(model, down_factor=3)
    assert (layer.processor.spatial_weight == 1 / 9).all()
    remove_clear(model)
    assert model.attn_processors == originals


def test_pooling_weights_follow_the_model(tiny_transformer):
    model = tiny_transformer().to(torch.bfloat16)
    apply_clear(model, down_factor=2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum("spatial_weight" in name for name, _ in model.named_parameters()) == 4


def test_pipelines(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    apply_clear(pipe, radius=3)
    assert all(p.radius == 3 for p in pipe.transformer.attn_processors.values())
    assert remove_clear(pipe)


@pytest.mark.parametrize("call", [apply_clear, remove_clear])
def test_unsupported_models(call):
    with pytest.raises(
        ValueError, match=r"are FluxTransformer2DModel, FluxControlNetModel, .* got Linear"
    ):
        call(torch.nn.Linear(1, 1))


def test_bad_settings_change_nothing(tiny_transformer):
    model = tiny_transformer()
    originals = model.attn_processors
    with pytest.raises(ValueError, match="radius must be"):
        apply_clear(model, radius=0)
    assert model.attn_processors == originals
    assert ClearState.on(model) is None


def test_latents_that_contradict_the_ids(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    inputs["hidden_states"] = inputs["hidden_states"][:, :-2]
    apply_clear(model)
    with pytest.raises(ValueError, match=r"img_ids means 4 x 6 = 24 image tokens, but .* has 22"):
        run(model, inputs)


def test_positional_arguments_and_ids_with_a_batch(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6, batch=2)
    expected = run(model, inputs)
    apply_clear(model, radius=50)
    with torch.no_grad():
        order = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        positional = [inputs[name] for name in (*order, "img_ids", "txt_ids")]
        assert_same(model(*positional).sample, expected)
        inputs["img_ids"] = inputs["img_ids"].expand(2, -1, -1)
        inputs["txt_ids"] = inputs["txt_ids"].expand(2, -1, -1)
        assert_same(model(**inputs).sample, expected)


def test_copies_are_independent(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs), expected)
    assert ClearState.on(twin).installed["transformer_blocks.0.attn"] is (
        twin.transformer_blocks[0].attn.processor
    )
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not run(twin, inputs).any()
    assert torch.equal(run(model, inputs), expected)
    assert remove_clear(twin)
    assert not twin._forward_pre_hooks
    assert torch.equal(run(model, inputs), expected)


def test_a_model_goes_when_it_is_dropped(tiny_transformer, tiny_inputs):
    model = tiny_transformer()
    apply_clear(model)
    run(model, tiny_inputs(4, 6))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_hooks_that_came_later_outlive_clear(tiny_transformer, tiny_inputs):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = tiny_transformer(), Counting()
    apply_clear(model)
    add_hook_to_module(model, hook)
    remove_clear(model)
    run(model, tiny_inputs(4, 6))
    assert hook.calls == 1


def test_settings_survive_processors_made_again(tiny_transformer, tiny_inputs):
    """What diffusers does to single blocks when it loads or unloads an IP-adapter."""
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2, down_factor=2)
    expected = run(model, inputs)
    for block in model.single_transformer_blocks:
        block.attn.set_processor(block.attn.processor.__class__())
    assert torch.equal(run(model, inputs), expected)


def test_layers_taken_over_by_others(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2)
    foreign = FluxAttnProcessor()
    model.transformer_blocks[0].attn.set_processor(foreign)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"1 of 4 attention layers .*\(transformer_blocks.0.attn has diffusers.*"
            r"FluxAttnProcessor\); call remove_clear for full attention, or apply_clear again",
        ):
            run(model, inputs)
    remove_clear(model)
    assert model.transformer_blocks[0].attn.processor is foreign
    # One processor for all layers is what the user asked for.
    apply_clear(model, radius=2)
    model.set_attn_processor(CLEARProcessor(radius=50))
    assert_same(run(model, inputs), run(tiny_transformer(), inputs))


def test_an_explicit_choice_of_default_processors_is_respected(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2)
    model.set_attn_processor({name: CLEARProcessor() for name in model.attn_processors})
    expected = run(tiny_transformer(), inputs)  # radius 16 sees all of 4 x 6
    assert_same(run(model, inputs), expected)
    assert {p.radius for p in model.attn_processors.values()} == {16}


def test_rounded_position_ids_are_put_right(tiny_transformer, tiny_inputs, position_ids):
    """Above 256 tokens a side bfloat16 ids merge neighbours: the stock model's image is wrong."""
    inputs = tiny_inputs(2, 300)
    exact = run(tiny_transformer(), inputs)
    rounded = inputs | {"img_ids": position_ids(2, 300, torch.bfloat16)}
    assert not torch.allclose(run(tiny_transformer(), rounded), exact, atol=1e-3)
    model = tiny_transformer()
    apply_clear(model, radius=400)
    assert_same(run(model, rounded), exact)
    # So are those in other steps.
    doubled = inputs | {"img_ids": position_ids(2, 300, torch.float32) * 2}
    rounded = inputs | {"img_ids": position_ids(2, 300, torch.bfloat16) * 2}
    assert_same(run(model, rounded), run(tiny_transformer(), doubled))
