"""Original weights that come back after somebody else changed the model, or not at all.

Expected are fresh models on which the same was done without CLEAR.
"""

import copy
import pickle

import pytest
import torch
from conftest import make_components
from diffusers import FluxPipeline
from peft import LoraConfig
from support.models import run
from support.slow import slow

from clear_dit import CLEARFluxPipeline, apply_clear, load_clear_weights, remove_clear
from clear_dit.pipelines.cascade.stage_attention import can_run_full, full_attention
from clear_dit.weights.format import parameters_by_key

# peft's, of a second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]
STRANGER = "changed since CLEAR weights were loaded, and not by a LoRA"


def close(value, expected, tolerance=1e-6):
    value, expected = (parameters_by_key(model) for model in (value, expected))
    assert value.keys() == expected.keys()
    for key in value:
        torch.testing.assert_close(value[key], expected[key], rtol=tolerance, atol=tolerance)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def add_lora(pipe, seed=5, **config):
    torch.manual_seed(seed)
    options = {"r": 2, "lora_alpha": 1, "target_modules": TARGETS, "init_lora_weights": False}
    pipe.transformer.add_adapter(LoraConfig(**options | config), adapter_name=f"lora{seed}")


def fuse(pipe, **options):
    pipe.fuse_lora(components=["transformer"], **options)


def unfuse(pipe):
    pipe.unfuse_lora(components=["transformer"])


def one(pipe):
    add_lora(pipe)
    fuse(pipe)
    pipe.unload_lora_weights()


def scaled_with_bias(pipe):
    add_lora(pipe, r=3, lora_bias=True, target_modules=TARGETS[:3])
    fuse(pipe, lora_scale=0.4, safe_fusing=True)
    pipe.unload_lora_weights()


def several(pipe):
    add_lora(pipe, 5)
    add_lora(pipe, 6, r=4)
    pipe.set_adapters(["lora5", "lora6"], [0.7, 0.3])
    fuse(pipe)
    pipe.unload_lora_weights()


def in_and_out_and_in(pipe):
    add_lora(pipe)
    for _ in range(3):
        fuse(pipe)
        unfuse(pipe)
    fuse(pipe)
    pipe.unload_lora_weights()


def still_merged(pipe):
    add_lora(pipe)
    fuse(pipe)


def out_again(pipe):
    add_lora(pipe)
    fuse(pipe)
    unfuse(pipe)
    pipe.unload_lora_weights()


LORAS = [one, scaled_with_bias, several, in_and_out_and_in, still_merged, out_again]


@pytest.fixture
def pipes(tiny_pipeline, clear_file):
    """A pipeline with CLEAR weights, and one without."""
    pipe, stock = tiny_pipeline(FluxPipeline), tiny_pipeline(FluxPipeline)
    apply_clear(pipe, radius=2, weights=clear_file())
    return pipe, stock


@pytest.mark.parametrize("lora", LORAS)
def test_fused_loras_stay(pipes, tiny_inputs, lora):
    pipe, stock = pipes
    lora(pipe)
    lora(stock)
    before = snapshot(pipe.transformer)
    assert can_run_full(pipe.transformer)
    with full_attention(pipe.transformer):
        close(pipe.transformer, stock.transformer)
    unchanged(pipe.transformer, before)
    assert remove_clear(pipe)
    close(pipe.transformer, stock.transformer)
    inputs = tiny_inputs(4, 6)
    expected = run(stock.transformer, inputs)
    torch.testing.assert_close(run(pipe.transformer, inputs), expected, rtol=1e-4, atol=1e-5)
    if lora is still_merged:
        unfuse(pipe)
        unfuse(stock)
        close(pipe.transformer, stock.transformer)


def test_a_lora_that_comes_after_a_stage_of_full_attention(pipes):
    """Swapping weights there and back is no change."""
    pipe, stock = pipes
    with full_attention(pipe.transformer):
        pass
    one(pipe)
    one(stock)
    assert remove_clear(pipe)
    close(pipe.transformer, stock.transformer)


@slow
@pytest.mark.parametrize("lora", LORAS)
def test_other_weights_get_them_too(pipes, tiny_pipeline, clear_file, lora):
    pipe, stock = pipes
    other, fresh = clear_file(2), tiny_pipeline(FluxPipeline)
    apply_clear(fresh, radius=2, weights=other)
    for each in (pipe, stock, fresh):
        lora(each)
    load_clear_weights(pipe, other)
    close(pipe.transformer, fresh.transformer)
    remove_clear(pipe)
    close(pipe.transformer, stock.transformer)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_models(pipes, again):
    pipe, stock = pipes
    one(pipe)
    one(stock)
    copied = again(pipe.transformer)
    assert remove_clear(copied)
    close(copied, stock.transformer)
    assert remove_clear(pipe)


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.bfloat16],
        [torch.float16],
        [torch.bfloat16, torch.float32],
        [torch.float16, torch.bfloat16, torch.float32],
        [torch.float8_e4m3fn],
        [torch.float8_e5m2, torch.float32],
        [torch.bfloat16, torch.float8_e4m3fn],
        [torch.float16, torch.float8_e4m3fn, torch.bfloat16, torch.float32],
    ],
    ids=str,
)
def test_casts_are_no_changes(pipes, dtypes):
    pipe, stock = pipes
    for dtype in dtypes:
        pipe.transformer.to(dtype)
        stock.transformer.to(dtype)
    assert remove_clear(pipe)
    unchanged(pipe.transformer, snapshot(stock.transformer))


@pytest.mark.parametrize("first", ["cast", "fuse"])
def test_loras_and_casts(pipes, first):
    pipe, stock = pipes
    for each in (pipe, stock):
        if first == "fuse":
            one(each)
        each.transformer.to(torch.bfloat16)
        if first == "cast":
            one(each)
    assert remove_clear(pipe)
    close(pipe.transformer, stock.transformer, tolerance=0.02)


def load_other(model, tiny_transformer):
    model.load_state_dict(tiny_transformer(seed=7).state_dict())


def assign_other(model, tiny_transformer):
    model.load_state_dict(tiny_transformer(seed=7).state_dict(), assign=True)


def one_step(optimizer):
    def train(model, tiny_transformer):
        steps = optimizer(model.parameters(), lr=1e-2)
        sum(p.square().sum() for p in parameters_by_key(model).values()).backward()
        steps.step()

    return train


def average(model, tiny_transformer):
    for parameter, other in zip(
        model.parameters(), tiny_transformer(seed=7).parameters(), strict=True
    ):
        parameter.data.copy_(0.9 * parameter.data + 0.1 * other.data)


def shift_in_place(model, tiny_transformer):
    with torch.no_grad():
        for key, parameter in parameters_by_key(model).items():
            parameter.add_(0.01 if key.endswith("weight") else 0)  # of rank 1


def a_bias_alone(model, tiny_transformer):
    model.transformer_blocks[0].attn.to_k.bias.data.add_(0.1)


STRANGERS = {
    "load_state_dict": load_other,
    "load_state_dict(assign)": assign_other,
    "AdamW": one_step(torch.optim.AdamW),
    "SGD": one_step(torch.optim.SGD),
    "average": average,
    "in place": shift_in_place,
    "a bias": a_bias_alone,
}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_changes_are_refused(pipes, tiny_transformer, clear_file, name):
    model, other = pipes[0].transformer, clear_file(2)
    STRANGERS[name](model, tiny_transformer)
    before, processors = snapshot(model), model.attn_processors
    for call in (
        remove_clear,
        lambda model: load_clear_weights(model, other),
        lambda model: apply_clear(model, radius=3, weights=other),
        can_run_full,
    ):
        with pytest.raises(ValueError, match=rf"transformer_blocks\.0\.attn\.\S+.* {STRANGER}"):
            call(model)
        unchanged(model, before)
        assert model.attn_processors == processors


def test_a_cascade_says_so_before_its_first_stage(tiny_transformer, clear_file):
    pipe = CLEARFluxPipeline(**make_components(), native_size=32)
    apply_clear(pipe, radius=2, weights=clear_file())
    load_other(pipe.transformer, tiny_transformer)
    with pytest.raises(ValueError, match=f"CLEARPipeline: .*{STRANGER}"):
        pipe("red", height=64, width=64, num_inference_steps=2)


def test_the_same_values_are_no_change(pipes):
    pipe, stock = pipes
    model = pipe.transformer
    model.load_state_dict(snapshot(model))
    model.load_state_dict(snapshot(model), assign=True)
    assert remove_clear(pipe)
    unchanged(model, snapshot(stock.transformer))


def test_originals_that_came_back_by_themselves(pipes):
    pipe, stock = pipes
    pipe.transformer.load_state_dict(snapshot(stock.transformer))
    assert remove_clear(pipe)
    unchanged(pipe.transformer, snapshot(stock.transformer))


@pytest.mark.parametrize("becomes", ["gone", "another"])
def test_files_that_are_needed_and_not_there(pipes, clear_file, tmp_path, becomes):
    pipe, _ = pipes
    path = tmp_path / "1.safetensors"
    one(pipe)
    path.unlink()
    if becomes == "another":
        clear_file(3).rename(path)
    before = snapshot(pipe.transformer)
    happened = {"gone": "cannot be read any more", "another": "is another file now"}[becomes]
    with pytest.raises(ValueError, match=f"remove_clear: transformer_blocks.*{happened}"):
        remove_clear(pipe)
    unchanged(pipe.transformer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_not_needed_for_what_nobody_changed(pipes, tmp_path, dtype):
    pipe, stock = pipes
    for each in pipes:
        each.transformer.to(dtype)
    (tmp_path / "1.safetensors").unlink()
    assert remove_clear(pipe)
    unchanged(pipe.transformer, snapshot(stock.transformer))
