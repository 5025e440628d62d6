"""What became of a model since CLEAR weights were loaded: kept where it is a LoRA, else refused."""

import copy
import pickle

import pytest
import torch
from conftest import make_components, make_inputs, make_transformer
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from support.families.models import run

from clear_dit import (
    CLEARFluxPipeline,
    apply_clear,
    load_clear_weights,
    remove_clear,
    save_clear_weights,
)
from clear_dit.evaluation.request import Variant
from clear_dit.evaluation.variants import attention_of
from clear_dit.weights.format import parameters_by_key

INPUTS = make_inputs(4, 6)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """CLEAR weights of two other models."""
    folder, made = tmp_path_factory.mktemp("weights"), []
    for seed in (1, 2):
        model = make_transformer(seed=seed)
        apply_clear(model, radius=2, far=False)
        made.append(folder / f"{seed}.safetensors")
        save_clear_weights(model, made[-1])
    return made


def add_lora(model, seed=0, name="style"):
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(seed)
    model.add_adapter(config, adapter_name=name)


def fused(model, seed=0):
    """The model with a LoRA in its weights, and nothing left of it besides."""
    add_lora(model, seed)
    model.fuse_lora()
    model.unload_lora()
    return model


def tuned(files, **settings):
    model = make_transformer()
    apply_clear(model, radius=2, far=False, weights=files[0], **settings)
    return model


def assert_same(value, other):
    torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_bit_for_bit(files):
    model, before = make_transformer(), values(make_transformer())
    apply_clear(model, radius=2, far=False, weights=files[0])
    load_clear_weights(model, files[1])
    remove_clear(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("merged", [False, True])
def test_a_fused_lora_stays(files, merged):
    expected = run(fused(make_transformer()), INPUTS)
    model = tuned(files)
    add_lora(model)
    model.fuse_lora()
    if not merged:
        model.unload_lora()
    remove_clear(model)
    assert_same(run(model, INPUTS), expected)
    if merged:  # and comes off again
        model.unfuse_lora()
        model.unload_lora()
        assert_same(run(model, INPUTS), run(make_transformer(), INPUTS))


def test_two_loras_one_after_the_other(files):
    expected = run(fused(fused(make_transformer()), seed=1), INPUTS)
    model = fused(fused(tuned(files)), seed=1)
    remove_clear(model)
    assert_same(run(model, INPUTS), expected)


def test_other_clear_weights_keep_it(files):
    model = fused(tuned(files))
    load_clear_weights(model, files[1])
    other = make_transformer()
    apply_clear(other, radius=2, far=False, weights=files[1])
    assert_same(run(model, INPUTS), run(fused(other), INPUTS))
    remove_clear(model)
    assert_same(run(model, INPUTS), run(fused(make_transformer()), INPUTS))


def test_the_stage_of_full_attention_has_it(files):
    def draw(pipe, **more):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"}
        return pipe("a house", height=64, width=64, generator=generator, **options, **more).images

    stock = CLEARFluxPipeline(**make_components(), native_size=32)
    fused(stock.transformer)
    pipe = CLEARFluxPipeline(**make_components(), native_size=32)
    apply_clear(pipe, radius=2, far=False, weights=files[0])
    fused(pipe.transformer)
    before = values(pipe.transformer)
    # Strength 0: the first stage alone, enlarged.
    assert_same(draw(pipe, strength=0.0), draw(stock, strength=0.0))
    draw(pipe)
    assert all(torch.equal(value, before[key]) for key, value in values(pipe.transformer).items())


@pytest.mark.parametrize("how", ["load_state_dict", "assign", "training", "data"])
def test_other_weights_are_refused(files, how):
    model, other = tuned(files), make_transformer(seed=7)
    strangers = {key: value for key, value in other.state_dict().items()}
    if how == "training":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**INPUTS, return_dict=False)[0].square().sum().backward()
        optimizer.step()
    elif how == "data":
        for key, parameter in model.named_parameters():
            parameter.data.copy_(strangers[key])
    else:
        model.load_state_dict(strangers, assign=how == "assign")
    before, processors = values(model), model.attn_processors
    for who, act in {
        "remove_clear": lambda: remove_clear(model),
        "load_clear_weights": lambda: load_clear_weights(model, files[1]),
    }.items():
        with pytest.raises(ValueError, match=rf"{who}: .*transformer_blocks.* changed since CLEAR"):
            act()
        assert model.attn_processors == processors
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_same_weights_again_are_no_change(files):
    model = tuned(files)
    model.load_state_dict(values(model))
    remove_clear(model)
    assert torch.equal(run(model, INPUTS), run(make_transformer(), INPUTS))


def test_one_parameter_is_enough(files):
    model = tuned(files)
    with torch.no_grad():
        model.transformer_blocks[1].attn.to_k.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"1 tensors \(transformer_blocks.1.attn.to_k.weight\)"):
        remove_clear(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_know_their_originals(files, copied):
    model = fused(tuned(files))
    twin = copied(model)
    remove_clear(twin)
    expected = run(fused(make_transformer()), INPUTS)
    assert_same(run(twin, INPUTS), expected)
    assert (run(model, INPUTS) - expected).abs().max() > 1e-3
    remove_clear(model)
    assert_same(run(model, INPUTS), expected)


@pytest.mark.parametrize("fuse", [False, True])
def test_casts_are_no_change(files, fuse):
    model, other = tuned(files).bfloat16(), make_transformer().bfloat16()
    if fuse:
        fused(model)
        fused(other)
    model, other = model.float(), other.float()
    remove_clear(model)
    expected = run(other, INPUTS)
    assert (run(model, INPUTS) - expected).norm() < 0.02 * expected.norm()


def test_a_file_that_is_gone_is_said(files, tmp_path):
    path = tmp_path / "clear_local_2.safetensors"
    path.write_bytes(files[0].read_bytes())
    model = make_transformer()
    apply_clear(model, radius=2, far=False, weights=path)
    path.unlink()
    fused(model)
    with pytest.raises(ValueError, match=r"cannot be read any more; put it back there"):
        remove_clear(model)
    path.write_bytes(files[0].read_bytes())
    remove_clear(model)
    assert_same(run(model, INPUTS), run(fused(make_transformer()), INPUTS))


def test_saved_models_say_so(files, tmp_path):
    model = tuned(files)
    model.save_pretrained(tmp_path / "tuned")
    remove_clear(model)
    model.save_pretrained(tmp_path / "stock")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"remove_clear: .* its original weights are not there"):
        remove_clear(again)
    apply_clear(again, radius=2)  # far keys or not, as the weights were made for
    assert_same(run(again, INPUTS), run(tuned(files), INPUTS))
    load_clear_weights(again, files[1])
    other = make_transformer()
    apply_clear(other, radius=2, far=False, weights=files[1])
    assert_same(run(again, INPUTS), run(other, INPUTS))
    stock = FluxTransformer2DModel.from_pretrained(tmp_path / "stock")
    assert not remove_clear(stock)
    weights, expected = stock.state_dict(), make_transformer().state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # Where safetensors puts weights in memory, products may be summed in another order.
    assert_same(run(stock, INPUTS), run(make_transformer(), INPUTS))


def test_saved_models_that_a_lora_had_changed_take_no_other_weights(files, tmp_path):
    fused(tuned(files)).save_pretrained(tmp_path)
    model = FluxTransformer2DModel.from_pretrained(tmp_path)
    apply_clear(model, radius=2)
    before = values(model)
    with pytest.raises(ValueError, match=r"that a LoRA, training or a cast .* start from"):
        load_clear_weights(model, files[1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_saved_model_is_not_evaluated(files, tmp_path):
    """Its full attention would not be that of the original model."""
    tuned(files).save_pretrained(tmp_path)
    parts = make_components()
    parts["transformer"] = FluxTransformer2DModel.from_pretrained(tmp_path)
    for radius in (None, 2):
        with (
            pytest.raises(ValueError, match=r"^evaluate: the model was saved by save_pretrained"),
            attention_of(FluxPipeline(**parts), Variant("any", radius)),
        ):
            pass


def test_a_cascade_of_a_saved_model_has_no_full_attention(files, tmp_path):
    tuned(files).save_pretrained(tmp_path)
    parts = make_components()
    parts["transformer"] = FluxTransformer2DModel.from_pretrained(tmp_path)
    pipe = CLEARFluxPipeline(**parts, native_size=32)
    apply_clear(pipe, radius=2)
    seen = []

    def look(pipe, *_):
        seen.append(pipe.stage.attention)
        return {}

    pipe(
        "a house", height=64, width=64, num_inference_steps=2, max_sequence_length=8,
        output_type="latent", callback_on_step_end=look,
    )  # fmt: skip
    assert set(seen) == {"clear"}


def test_keys_are_all_there(files):
    model = tuned(files)
    loaded = parameters_by_key(model)
    other = make_transformer(seed=1)
    for key, parameter in parameters_by_key(other).items():
        assert torch.equal(parameter, loaded[key])
