"""Threads that share models: each image is that of one thread alone, the models stay the same."""

import copy
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_components
from diffusers import FluxPipeline
from support.families.models import make_inputs, make_model, run
from support.slow import slow

from clear_dit import CLEARFluxPipeline, apply_clear, remove_clear


@pytest.fixture(autouse=True)
def impatient_threads():
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def pipelines(count, weights=None, cls=CLEARFluxPipeline, scheduler_too=False):
    """Pipelines with the same models, under CLEAR."""
    parts, made = make_components(), []
    more = {"native_size": 32} if cls is CLEARFluxPipeline else {}
    for _ in range(count):
        own = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        shared = parts | ({} if scheduler_too else {"scheduler": own})
        if cls is FluxPipeline:  # which does not take turns at a tokenizer's settings
            shared |= {name: copy.deepcopy(parts[name]) for name in ("tokenizer", "tokenizer_2")}
        pipe = cls(**shared, **more)
        pipe.set_progress_bar_config(disable=True)
        made.append(pipe)
    apply_clear(made[0], radius=2, far=False, weights=weights)
    return made


def draw(pipe, seed=0, height=64, width=64, **more):
    options = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"} | more
    generator = torch.Generator().manual_seed(seed)
    return pipe("a house", height=height, width=width, generator=generator, **options).images


def in_threads(*works):
    """Run functions at once, and return what they return; each waits for all to begin."""
    barrier = threading.Barrier(len(works))

    def begin(work):
        barrier.wait(30)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(300) for future in [pool.submit(begin, work) for work in works]]


def assert_same(image, other):
    """But for rounding, which depends on where tensors happen to lie in memory."""
    torch.testing.assert_close(image, other, rtol=0, atol=1e-5)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@slow
@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("kind", ["two", "one scheduler", "one pipeline"])
def test_cascades_at_once(weights, kind, count):
    first, second = pipelines(2, weights, scheduler_too=kind == "one scheduler")
    second = first if kind == "one pipeline" else second
    model, before = first.transformer, state_of(first.transformer)
    processors, positions = model.attn_processors, model.pos_embed
    expected = {seed: draw(first, seed) for seed in range(2)}

    def images(pipe, seed):
        return [draw(pipe, seed) for _ in range(count)]

    found = in_threads(lambda: images(first, 0), lambda: images(second, 1))
    for seed, made in enumerate(found):
        for image in made:
            assert_same(image, expected[seed])
    assert_same(draw(first, 0), expected[0])
    assert model.attn_processors == processors
    assert model.pos_embed is positions
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("count", [2, pytest.param(16, marks=slow)])
@pytest.mark.parametrize("sizes", [((64, 32), (32, 64)), ((64, 64), (48, 80))])
def test_stock_pipelines_of_two_sizes(sizes, count):
    pipes = pipelines(2, cls=FluxPipeline)
    expected = [draw(pipe, 0, *size) for pipe, size in zip(pipes, sizes, strict=True)]
    works = [
        lambda pipe=pipe, size=size: [draw(pipe, 0, *size) for _ in range(count)]
        for pipe, size in zip(pipes, sizes, strict=True)
    ]
    for made, image in zip(in_threads(*works), expected, strict=True):
        for each in made:
            assert_same(each, image)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen-image", "z-image"])
def test_a_forward_in_the_middle_of_another(name):
    """One waits in the middle until another of the same number of tokens has gone by."""
    model = make_model(name)
    apply_clear(model, radius=2, far=False)
    wide, tall = make_inputs(name, 4, 8), make_inputs(name, 8, 4)
    expected = run(model, wide), run(model, tall)
    inside, over, first = threading.Event(), threading.Event(), []

    def pause(*_):
        if not first:
            first.append(threading.get_ident())
        if threading.get_ident() == first[0] and not inside.is_set():
            inside.set()
            assert over.wait(30)

    layer = next(module for module in model.modules() if hasattr(module, "set_processor"))
    handle = layer.register_forward_pre_hook(pause)

    def second():
        assert inside.wait(30)
        out = run(model, tall)
        over.set()
        return out

    found = in_threads(lambda: run(model, wide), second)
    handle.remove()
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


def test_who_changes_a_model_waits_for_its_forward():
    model, inputs = make_model("sd3"), make_inputs("sd3", 4, 8)
    stock = run(model, inputs)
    apply_clear(model, radius=2, far=False)
    expected = run(model, inputs)
    remover = threading.Thread(target=remove_clear, args=(model,))

    def remove(*_):
        if not remover.is_alive():
            remover.start()
            remover.join(0.2)
            assert remover.is_alive()  # it waits

    handle = model.transformer_blocks[0].register_forward_pre_hook(remove)
    assert torch.equal(run(model, inputs), expected)
    handle.remove()
    remover.join(30)
    assert torch.equal(run(model, inputs), stock)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["callback", "layer"])
def test_an_error_in_the_middle_leaves_all_as_it_was(weights, error, place):
    (pipe,) = pipelines(1, weights)
    expected, model = draw(pipe), pipe.transformer
    before, processors = state_of(model), model.attn_processors
    for number in range(3):  # of steps, over both stages
        calls = []

        def fail(*_, number=number, calls=calls):
            calls.append(None)
            if len(calls) == number + 1:
                raise error
            return {}

        more = {"callback_on_step_end": fail} if place == "callback" else {}
        layer = model.transformer_blocks[1].norm1
        handle = layer.register_forward_pre_hook(lambda *_, fail=fail: (fail(), None)[1])
        if place == "callback":
            handle.remove()
        with pytest.raises(type(error)):
            draw(pipe, **more)
        handle.remove()
        assert model.attn_processors == processors
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert pipe.stage is None
    # Nobody has the model for himself any more.
    assert_same(in_threads(lambda: draw(pipe))[0], expected)


@slow
def test_two_hundred_images(weights):
    """Sizes, pipelines and threads at random."""
    pipes = pipelines(4, weights)
    sizes = [(64, 64), (32, 64), (64, 32), (32, 32), (48, 96)]
    expected = {size: draw(pipes[0], 0, *size) for size in sizes}

    def images(seed):
        choose = random.Random(seed)
        found = []
        for _ in range(50):
            size = choose.choice(sizes)
            found.append((size, draw(choose.choice(pipes), 0, *size)))
        return found

    for made in in_threads(*(lambda seed=seed: images(seed) for seed in range(4))):
        for size, image in made:
            assert_same(image, expected[size])
