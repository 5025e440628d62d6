"""What one thread does in the middle of another's forward, and what an interruption leaves."""

import copy
import threading
import time

import accelerate
import pytest
import torch
from conftest import make_components, make_inputs, make_transformer
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from safetensors.torch import load_file
from support.families.models import FAMILIES, make_model, run
from support.families.models import make_inputs as make_family_inputs
from support.slow import few, slow
from support.threads import Middle
from torch.overrides import TorchFunctionMode

from clear_dit import (
    CLEARFluxPipeline,
    CLEARProcessor,
    apply_clear,
    load_clear_weights,
    remove_clear,
    save_clear_weights,
)
from clear_dit.access import Access
from clear_dit.chunking import chunk_feed_forward
from clear_dit.pipelines.cascade.stage_attention import can_run_full

LOCAL = {"radius": 2, "far": False}


def prepared(kind, weights):
    """A fresh model: stock, under CLEAR, with weights too, or without CLEAR again."""
    model = make_transformer()
    if kind != "stock":
        apply_clear(model, **LOCAL, weights=weights if kind == "weights" else None)
    if kind == "removed":
        remove_clear(model)
    return model


def pipelines(count, weights=None):
    """Of the same models and scheduler, under CLEAR."""
    parts = make_components()
    made = [CLEARFluxPipeline(**parts, native_size=32) for _ in range(count)]
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    apply_clear(made[0], **LOCAL, weights=weights)
    return made


def draw(pipe, seed=0, size=64, **more):
    options = {"height": size, "width": size, "max_sequence_length": 8, "output_type": "pt"}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        "a house", generator=generator, **{"num_inference_steps": 2} | options | more
    ).images


def add_lora(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))


# From which state a call leads to which.
CHANGES = {
    "apply": ("stock", "clear", lambda model, path: apply_clear(model, **LOCAL)),
    "apply again": ("removed", "clear", lambda model, path: apply_clear(model, **LOCAL)),
    "apply with weights": (
        "stock",
        "weights",
        lambda model, path: apply_clear(model, **LOCAL, weights=path),
    ),
    "load": ("clear", "weights", load_clear_weights),
    "remove": ("weights", "stock", lambda model, path: remove_clear(model)),
}


@slow
@pytest.mark.parametrize("change", ["load", "remove", "apply again"])
@pytest.mark.parametrize("place", ["transformer_blocks.0.attn", "single_transformer_blocks.1"])
def test_a_change_in_the_middle_of_a_forward(weights, change, place):
    before, after, act = CHANGES[change]
    inputs, middle = make_inputs(6, 9), Middle()
    model = prepared(before, weights)
    handle = model.get_submodule(place).register_forward_pre_hook(middle.reached)
    found, _ = middle.run(lambda: run(model, inputs), lambda: act(model, weights))
    handle.remove()
    assert torch.equal(found, run(prepared(before, weights), inputs))
    assert torch.equal(run(model, inputs), run(prepared(after, weights), inputs))


def test_other_processors_in_the_middle_of_a_forward():
    (pipe,), inputs, middle = pipelines(1), make_inputs(6, 9), Middle()
    model = pipe.transformer
    expected = run(model, inputs)
    handle = model.transformer_blocks[0].register_forward_pre_hook(middle.reached)
    found, _ = middle.run(
        lambda: run(model, inputs), lambda: pipe.set_attn_processor(FluxAttnProcessor())
    )
    handle.remove()
    assert torch.equal(found, expected)
    assert torch.equal(run(model, inputs), run(make_transformer(), inputs))


def test_who_waits_to_change_a_model_comes_before_later_forwards():
    """Else forwards that overlap one another would keep it waiting for ever."""
    access, order = Access(), []

    def begin(use, name):
        def work():
            with use():
                order.append(name)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    with access.shared():
        change = begin(access.exclusive, "change")
        while not access._waiting:
            time.sleep(0.001)
        forward = begin(access.shared, "forward")
        forward.join(0.1)
        with access.shared():  # who has it already does not wait
            order.append("nested")
    for thread in (change, forward):
        thread.join(30)
    assert order == ["nested", "change", "forward"]


def test_a_change_within_the_models_own_forward_is_refused():
    """It would wait for itself."""
    model, inputs = prepared("clear", None), make_inputs(6, 9)
    expected = run(model, inputs)

    def change(*_):
        with pytest.raises(RuntimeError, match="from within its own forward pass; do it before"):
            remove_clear(model)

    handle = model.transformer_blocks[1].register_forward_pre_hook(change)
    assert torch.equal(run(model, inputs), expected)
    handle.remove()
    assert remove_clear(model)


class Interrupted(TorchFunctionMode):
    """Raises at the nth tensor that is copied into another."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", [1, 5, 14])
@pytest.mark.parametrize("change", ["apply with weights", "load", "remove"])
def test_an_interrupted_change_leaves_the_model_as_it_was(weights, change, number):
    before, after, act = CHANGES[change]
    inputs, model = make_inputs(6, 9), prepared(before, weights)
    with pytest.raises(KeyboardInterrupt), Interrupted(number):
        act(model, weights)
    assert torch.equal(run(model, inputs), run(prepared(before, weights), inputs))
    act(model, weights)
    assert torch.equal(run(model, inputs), run(prepared(after, weights), inputs))
    remove_clear(model)
    assert torch.equal(run(model, inputs), run(make_transformer(), inputs))


@pytest.mark.parametrize("number", [1, 3])
def test_an_interrupted_swap_of_a_stages_weights(weights, number):
    """The first stage of a cascade runs with the original weights."""

    pipe, expected = (pipelines(1, weights)[0] for _ in range(2))
    expected = draw(expected)
    before = copy.deepcopy(pipe.transformer.state_dict())
    with pytest.raises(KeyboardInterrupt), Interrupted(number):
        draw(pipe)
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", few(FAMILIES))
def test_two_models_of_two_families(name):
    other = "flux" if name != "flux" else "sd3"
    models = [make_model(name), make_model(other)]
    inputs = [make_family_inputs(name, 4, 8), make_family_inputs(other, 8, 4)]
    for model in models:
        apply_clear(model, radius=2)
    expected = [run(model, given) for model, given in zip(models, inputs, strict=True)]
    middle = Middle()
    layer = next(one for one in models[0].modules() if hasattr(one, "set_processor"))
    layer.register_forward_pre_hook(middle.reached)
    found = middle.run(lambda: run(models[0], inputs[0]), lambda: run(models[1], inputs[1]))
    for value, right in zip(found, expected, strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen-image", "z-image"])
def test_checkpoints_that_run_again_while_another_forward_goes_by(name):
    """In the backward pass, where their own forward is over."""

    def gradients(model, act):
        model.enable_gradient_checkpointing()
        model.train()
        loss = model(**make_family_inputs(name, 4, 8), return_dict=False)[0]
        loss = loss[0] if isinstance(loss, list) else loss
        act(lambda: loss.square().sum().backward())
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    models = [make_model(name) for _ in range(2)]
    for model in models:
        apply_clear(model, **LOCAL)
    expected = gradients(models[0], lambda backward: backward())
    middle = Middle()
    layer = next(one for one in models[1].modules() if hasattr(one, "set_processor"))

    def overlapped(backward):
        layer.register_forward_pre_hook(middle.reached)
        middle.run(backward, lambda: run(models[1], make_family_inputs(name, 8, 4)))

    found = gradients(models[1], overlapped)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


def test_a_model_within_the_forward_of_another():
    """With a bare processor, which finds the layout of its own forward."""
    outer, inner = make_transformer(), make_transformer(seed=1)
    apply_clear(outer, **LOCAL)
    inner.set_attn_processor(CLEARProcessor(**LOCAL))
    given, other = make_inputs(4, 8), make_inputs(8, 4)
    expected, found = [run(outer, given), run(inner, other)], []
    handle = outer.transformer_blocks[1].register_forward_pre_hook(
        lambda *_: found.append(run(inner, other))
    )
    assert torch.equal(run(outer, given), expected[0])
    handle.remove()
    assert torch.equal(found[0], expected[1])


def test_loras_act_as_strongly_as_each_forward_asks():
    """diffusers scales them in place, for a forward."""
    model, given = make_transformer(), make_inputs(4, 6)
    add_lora(model)
    apply_clear(model, **LOCAL)
    scaled = given | {"joint_attention_kwargs": {"scale": 0.25}}
    expected = [run(model, scaled), run(model, given)]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    middle = Middle()
    model.transformer_blocks[0].register_forward_pre_hook(middle.reached)
    found = middle.run(lambda: run(model, scaled), lambda: run(model, given))
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right)


@slow
def test_compiled_blocks_know_the_forward_of_their_own_thread():
    plain, model = (make_transformer(num_layers=1, num_single_layers=0) for _ in range(2))
    given = [make_inputs(4, 8), make_inputs(8, 4)]
    for one in (plain, model):
        apply_clear(one, **LOCAL)
    expected = [run(plain, inputs) for inputs in given]
    model.transformer_blocks[0].compile(fullgraph=True, backend="eager")
    for inputs in given:
        run(model, inputs)  # to compile takes longer than a thread waits
    middle = Middle()
    model.context_embedder.register_forward_pre_hook(middle.reached)
    try:
        found = middle.run(lambda: run(model, given[0]), lambda: run(model, given[1]))
    finally:
        torch.compiler.reset()
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_two_images_of_one_scheduler_and_model(cached):
    """diffusers' caches keep what belongs to one image from step to step."""
    pipes, middle = pipelines(2), Middle()

    def seen(*_):
        middle.reached()
        return {}

    def drawn(pipe, steps, **more):
        return draw(pipe, steps, size=32, num_inference_steps=steps, **more)

    if cached:
        pipes[0].transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    expected = [drawn(pipe, steps) for pipe, steps in zip(pipes, (2, 3), strict=True)]
    found = middle.run(
        lambda: drawn(pipes[0], 2, callback_on_step_end=seen), lambda: drawn(pipes[1], 3)
    )
    for image, right in zip(found, expected, strict=True):
        torch.testing.assert_close(image, right, rtol=0, atol=1e-5)


def test_the_end_of_a_call_in_the_middle_of_another_with_a_cache():
    """There diffusers empties caches, and takes offloaded models away."""
    (first, second), middle = pipelines(2), Middle()
    exact = draw(first, size=32)
    first.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    expected = draw(first, size=32)
    assert not torch.equal(expected, exact)

    def seen(*_):
        middle.reached()
        return {}

    found, _ = middle.run(
        lambda: draw(first, size=32, callback_on_step_end=seen), second.maybe_free_model_hooks
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@slow
@pytest.mark.parametrize("kind", ["own weights", "CLEAR weights", "a fused LoRA", "kept stages"])
def test_a_call_that_begins_in_the_middle_of_the_first_stage_of_another(weights, kind, tmp_path):
    """Which for its forwards has other processors, or weights."""
    first, second = pipelines(2, None if kind == "own weights" else weights)
    model, middle = first.transformer, Middle()
    if kind == "a fused LoRA":
        add_lora(model)
        model.fuse_lora()
        model.unload_lora()
    more = {"stages_dir": tmp_path} if kind == "kept stages" else {}
    expected = [draw(first), draw(second, 1, **more)]
    model.transformer_blocks[1].register_forward_pre_hook(middle.reached)
    found = middle.run(lambda: draw(first), lambda: draw(second, 1, **more))
    for image, right in zip(found, expected, strict=True):
        torch.testing.assert_close(image, right, rtol=0, atol=1e-5)


@slow
@pytest.mark.parametrize("act", ["ask", "load", "save"])
def test_weights_in_the_middle_of_a_stage_with_the_original_ones(weights, act, tmp_path):
    """They are loaded and saved after it, and a LoRA stays."""
    (pipe,), middle = pipelines(1, weights), Middle()
    model = pipe.transformer
    add_lora(model)
    model.fuse_lora()
    model.unload_lora()
    before = copy.deepcopy(model.state_dict())
    model.transformer_blocks[1].register_forward_pre_hook(middle.reached)
    path = tmp_path / "saved.safetensors"
    if act == "ask":
        assert middle.run(lambda: draw(pipe), lambda: can_run_full(model))[1]
    elif act == "load":
        middle.run(lambda: draw(pipe), lambda: load_clear_weights(model, weights))
    else:
        middle.run(lambda: draw(pipe), lambda: save_clear_weights(model, path))
    for key, value in (load_file(path) if act == "save" else model.state_dict()).items():
        torch.testing.assert_close(value, before[key])


def test_more_sizes_than_are_remembered():
    model = make_transformer()
    apply_clear(model, **LOCAL)
    sizes = [(rows, 3) for rows in range(2, 14)]
    expected = {size: run(model, make_inputs(*size)) for size in sizes}
    middle = Middle()

    def several(order):
        found = {}
        for size in order:
            found[size] = run(model, make_inputs(*size))
            middle.reached()
        return found

    for found in middle.run(lambda: several(sizes), lambda: several(sizes[::-1])):
        for size, value in found.items():
            assert torch.equal(value, expected[size])


@pytest.mark.parametrize("tokens", [None, 9])
def test_offloaded_weights_are_one_threads(tokens):
    """accelerate brings them for each call of a layer, and for all chunks of one."""
    model, inputs = make_transformer(), [make_inputs(4, 6), make_inputs(6, 5)]
    apply_clear(model, **LOCAL)
    chunk_feed_forward(model, tokens)
    expected = [run(model, given) for given in inputs]
    accelerate.cpu_offload(model, torch.device("cpu"))
    middle = Middle()
    layer = model.transformer_blocks[1].ff.net[0].proj
    own = layer._old_forward

    def pause(*args, **options):
        middle.reached()
        return own(*args, **options)

    layer._old_forward = pause
    found = middle.run(lambda: run(model, inputs[0]), lambda: run(model, inputs[1]))
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
    layer._old_forward = own
    torch.testing.assert_close(run(model, inputs[0]), expected[0], rtol=1e-5, atol=1e-6)
