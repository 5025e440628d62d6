"""Text encoders and tokenizers that pipelines share, in two threads and after an error."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_components
from diffusers import FluxPipeline
from peft import LoraConfig
from support.slow import slow
from support.threads import Middle

from clear_dit import CLEARFluxPipeline


def pipelines(cls=CLEARFluxPipeline):
    """Two of the same models and tokenizers."""
    parts = make_components()
    return [cls(**parts) for _ in range(2)]


def add_loras(pipe):
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        torch.manual_seed(1)
        targets = ["q_proj", "v_proj", "q", "v"]
        encoder.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        # No whole number: what is multiplied and divided is not always the same again.
        for layer in lora_layers(pipe):
            layer.scaling["default"] = 0.1


def lora_layers(pipe):
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    return [m for encoder in encoders for m in encoder.modules() if hasattr(m, "scale_layer")]


def encode(pipe, length=8, scale=None, prompt="a red house"):
    return pipe.encode_prompt(prompt, max_sequence_length=length, lora_scale=scale)[:2]


def assert_equal(found, expected):
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize(
    ("prompt", "encoders"),
    [
        ("a house", "shared"),
        ("a small red house by the sea by the sea", "shared"),
        ("a house", "each its own"),
    ],
)
def test_tokenizers_pad_and_cut_as_each_thread_asked(monkeypatch, name, prompt, encoders):
    first, second = pipelines()
    if encoders == "each its own":
        second.text_encoder = copy.deepcopy(second.text_encoder)
        second.text_encoder_2 = copy.deepcopy(second.text_encoder_2)
    works = lambda: encode(first, 8, prompt=prompt), lambda: encode(second, 5)
    expected = [work() for work in works]
    middle, tokenizer = Middle(), getattr(first, name)
    own = tokenizer.set_truncation_and_padding

    def set_and_wait(**options):
        own(**options)
        if options["padding_strategy"] == "max_length":
            middle.reached()

    monkeypatch.setattr(tokenizer, "set_truncation_and_padding", set_and_wait)
    for texts, right in zip(middle.run(*works), expected, strict=True):
        assert_equal(texts, right)


@slow
@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("scales", [(0.5, None), (None, 0.5), (0.0, 2.0)])
def test_loras_act_as_strongly_as_each_thread_asked(encoder, scales):
    (stock, _), (first, second) = pipelines(FluxPipeline), pipelines()
    for pipe in (stock, first):
        add_loras(pipe)
    expected = []
    for scale in scales:
        expected.append(encode(stock, scale=scale))
        for layer in lora_layers(stock):
            layer.scaling["default"] = 0.1
    middle = Middle()
    getattr(first, encoder).register_forward_pre_hook(middle.reached)
    found = middle.run(
        lambda: encode(first, scale=scales[0]), lambda: encode(second, scale=scales[1])
    )
    for texts, right in zip(found, expected, strict=True):
        assert_equal(texts, right)
    assert {layer.scaling["default"] for layer in lora_layers(first)} == {0.1}


def test_loras_act_as_strongly_as_a_call_asks():
    def draw(cls, scale):
        pipe = cls(**make_components())
        pipe.set_progress_bar_config(disable=True)
        add_loras(pipe)
        size = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 8}
        generator, joint = torch.Generator().manual_seed(0), {"scale": scale}
        more = {"joint_attention_kwargs": joint, "output_type": "pt"}
        return pipe("a red house", generator=generator, **size, **more).images

    expected = draw(FluxPipeline, 40.0)
    assert (draw(FluxPipeline, 1.0) - expected).abs().max() > 1e-3
    torch.testing.assert_close(draw(CLEARFluxPipeline, 40.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_after_an_error_loras_act_as_before(error):
    first, second = pipelines()
    add_loras(first)
    expected = encode(first)

    def fail(*_):
        raise error

    handle = first.text_encoder_2.register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        encode(first, scale=0.3)
    handle.remove()
    with ThreadPoolExecutor(1) as pool:  # nobody else has the encoders any more
        assert_equal(pool.submit(encode, second).result(30), expected)
