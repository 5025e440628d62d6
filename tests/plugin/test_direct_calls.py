"""Forwards that do not come by the usual way: each has the layout of its own arguments."""

import accelerate
import diffusers
import pytest
import torch
from support.families.models import FAMILIES, make_inputs, make_model, prediction, run, stacked
from support.slow import few

from clear_dit import apply_clear, remove_clear
from clear_dit.attention.processor import CLEARProcessor


def local(name):
    model = make_model(name)
    apply_clear(model, radius=2, far=False)
    return model


@pytest.fixture(params=few(FAMILIES))
def name(request):
    return request.param


def direct(model, inputs):
    with torch.no_grad():
        return stacked(model.forward(**inputs, return_dict=False)[0])


def test_forward_called_directly(name):
    tall, wide = make_inputs(name, 8, 4), make_inputs(name, 4, 8)
    expected = run(local(name), tall)
    model = local(name)
    run(model, wide)
    torch.testing.assert_close(direct(model, tall), expected)
    torch.testing.assert_close(run(model, wide), run(local(name), wide))


@pytest.mark.parametrize("before", [False, True])
def test_a_class_whose_forward_was_replaced(name, before, monkeypatch):
    tall, wide = make_inputs(name, 8, 4), make_inputs(name, 4, 8)
    expected = run(local(name), tall)
    cls, calls = type(make_model(name)), []
    own = cls.forward

    def theirs(self, *args, **options):
        calls.append(self)
        return own(self, *args, **options)

    def replace():
        monkeypatch.setattr(cls, "forward", lambda *a, **k: theirs(*a, **k))

    if before:
        replace()
    model = local(name)
    run(model, wide)
    replace()
    calls.clear()
    torch.testing.assert_close(run(model, tall), expected)
    assert calls == [model]


def accelerate_hook(model, inputs):
    """A hook that gives the model other arguments; what removes it."""

    class Other(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (), inputs | {"return_dict": False}

    accelerate.hooks.add_hook_to_module(model, Other())
    return lambda: accelerate.hooks.remove_hook_from_module(model)


def diffusers_hook(model, inputs):
    class Other(diffusers.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (), inputs | {"return_dict": False}

    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Other(), "other")
    return lambda: registry.remove_hook("other")


@pytest.mark.parametrize("set_hook", [accelerate_hook, diffusers_hook])
@pytest.mark.parametrize("before", [False, True])
def test_a_hook_that_changes_arguments(name, set_hook, before):
    """CLEAR stands below it, whichever came first, and stays when it goes."""
    tall, wide = make_inputs(name, 8, 4), make_inputs(name, 4, 8)
    expected, full = run(local(name), tall), run(make_model(name), tall)
    model = make_model(name) if before else local(name)
    remove = set_hook(model, tall)
    if before:
        apply_clear(model, radius=2, far=False)
    torch.testing.assert_close(run(model, wide), expected)
    remove()
    torch.testing.assert_close(run(model, tall), expected)
    remove_clear(model)
    torch.testing.assert_close(run(model, tall), full)


def test_arguments_without_names(tiny_transformer, tiny_inputs, monkeypatch):
    cls = type(tiny_transformer())
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *a, **k: own(self, *a, **k))
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2)
    latents = inputs.pop("hidden_states")
    with pytest.raises(ValueError, match=r"1 arguments by position, .* Pass them by name"):
        model(latents, **inputs)


def test_arguments_by_position(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, radius=2)
    expected = run(model, inputs)
    latents, text = inputs.pop("hidden_states"), inputs.pop("encoder_hidden_states")
    with torch.no_grad():
        found = model(latents, text, **inputs, return_dict=False)[0]
    assert torch.equal(found, expected)


def test_a_layer_called_outside_of_its_model():
    model = local("sd3")
    run(model, make_inputs("sd3", 4, 8))
    layer, channels = model.transformer_blocks[0].attn, model.inner_dim
    with pytest.raises(ValueError, match="called outside of a forward of its model"):
        layer(torch.randn(1, 32, channels), torch.randn(1, 3, channels))


def test_a_forward_that_goes_past_clear():
    model, inputs = local("sd3"), make_inputs("sd3", 4, 8)
    model.forward = lambda **given: type(model).forward(model, **given)
    with pytest.raises(ValueError, match="by a forward that was put in the place of the model's"):
        run(model, inputs)
    del model.forward
    apply_clear(model, radius=2, far=False)
    assert torch.equal(run(model, inputs), run(local("sd3"), inputs))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_forward_that_ended_early(error):
    model = local("sd3")
    wide, tall = make_inputs("sd3", 4, 8), make_inputs("sd3", 8, 4)
    expected = run(local("sd3"), tall)

    def fail(*_):
        raise error

    handle = model.transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        run(model, wide)
    handle.remove()
    assert model.transformer_blocks[0].attn.processor.tracker.current is None
    torch.testing.assert_close(run(model, tall), expected)


def test_checkpointed_layers_keep_their_forward(name):
    """Gradients of one forward, computed when another has gone by."""
    tall, wide = make_inputs(name, 8, 4), make_inputs(name, 4, 8)

    def gradient(checkpointed):
        model = local(name)
        if checkpointed:
            model.enable_gradient_checkpointing()
        loss = prediction(model, tall).square().sum()
        if checkpointed:
            prediction(model, wide)
        loss.backward()
        linear = next(p for n, p in model.named_parameters() if n.endswith("to_v.weight"))
        return linear.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_stock_processor_is_named(name):
    model = local(name)
    layers = [
        m for m in model.modules() if isinstance(getattr(m, "processor", None), CLEARProcessor)
    ]
    stock = next(m.processor for m in make_model(name).modules() if type(m) is type(layers[0]))
    layers[-1].set_processor(stock)
    with pytest.raises(ValueError, match=r"1 of \d+ attention layers no longer have"):
        run(model, make_inputs(name, 4, 6))
