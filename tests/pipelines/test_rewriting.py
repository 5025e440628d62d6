"""Prompts that a pipeline's language model rewrites: the same text for all stages, ranks, calls."""

import pytest
import torch
from support.families.pipelines import PIPELINES, call_options, make_pipeline, make_tokenizer
from transformers import PreTrainedTokenizerFast

from clear_dit import CLEARPipeline, apply_clear
from clear_dit.pipelines.pipeline import _made

PROMPTS = ["a red house", "the small house by the sea"]
REWRITING = {
    "longcat-image": {"enable_prompt_rewrite": True},
    "flux2": {"caption_upsample_temperature": 1.0},
}


class Holder(PreTrainedTokenizerFast):
    """In the place of FLUX.2's, one of text and images, which holds a tokenizer."""

    tokenizer = property(lambda self: self)


def clear(name):
    pipe = CLEARPipeline(make_pipeline(name), native_size=5 * PIPELINES[name][2])
    pipe.tokenizer = make_tokenizer(Holder)
    apply_clear(pipe, radius=3)
    return pipe


@pytest.fixture(params=REWRITING)
def name(request):
    return request.param


@pytest.fixture
def generated(name, monkeypatch):
    """What the language model was asked, and the texts that were encoded."""
    asked, encoded = [], []
    pipe = make_pipeline(name)
    model, stock = type(pipe.text_encoder), PIPELINES[name][0]
    generate, encode = model.generate, stock.encode_prompt

    def sampled(self, **inputs):
        asked.append(inputs["input_ids"])
        return generate(self, **inputs | {"do_sample": True, "max_new_tokens": 5})

    def told(self, prompt, *args, **kwargs):
        encoded.append(prompt)
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(model, "generate", sampled)
    monkeypatch.setattr(stock, "encode_prompt", told)
    return asked, encoded


def draw(name, tokens, pipe=None, **options):
    side = PIPELINES[name][2]
    options = call_options(name) | REWRITING[name] | options
    return (pipe or clear(name))(
        prompt=list(PROMPTS), height=tokens * side, width=tokens * side, num_inference_steps=2,
        generator=torch.Generator().manual_seed(0), output_type="pt", **options,
    ).images  # fmt: skip


def test_all_stages_get_the_same_text(name, generated):
    asked, encoded = generated
    images = draw(name, 8)
    assert images.isfinite().all()
    assert len(asked) == 1
    rewritten = [one for one in encoded if one != ["a house", "sea"]]
    assert len(rewritten) == 1
    assert rewritten[0] != PROMPTS


def test_texts_follow_from_prompts_alone(name, generated):
    """Of a call that is resumed, and of other ranks; nobody else's numbers change."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    _, encoded = generated
    images = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        images.append(draw(name, 4, pipe=clear(name)))
    assert torch.equal(*images)
    pipe = clear(name)
    torch.manual_seed(1)
    draw(name, 4, pipe=pipe)
    assert torch.equal(torch.rand(3), expected)
    rewritten = [one for one in encoded if one != ["a house", "sea"]]
    assert rewritten[0] == rewritten[1] == rewritten[2]


def test_outside_of_a_call_as_stock(name, generated):
    method = {"longcat-image": "rewire_prompt", "flux2": "upsample_prompt"}[name]
    texts = []
    for seed in (1, 2):
        pipe = clear(name)
        torch.manual_seed(seed)
        texts.append(getattr(pipe, method)(list(PROMPTS), device=torch.device("cpu")))
    assert texts[0] != texts[1]


class Rewriter(torch.nn.Module):
    """In the place of ERNIE-Image's "pe": answers with any words."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.asked, self.answered = [], []

    def generate(self, input_ids, **options):
        self.asked.append(input_ids)
        answer = torch.randint(3, 10, (1, 4))
        self.answered.append(answer)
        return torch.cat([input_ids, answer], dim=1)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_ernie_image_rewrites_for_the_first_stage(monkeypatch):
    """So that its size, of which it tells the model, is the same for all, resumed calls too."""
    told, stock = [], PIPELINES["ernie-image"][0]
    enhance = stock._enhance_prompt_with_pe

    def noted(self, prompt, device, width, height):
        told.append((prompt, width, height))
        return enhance(self, prompt, device, width=width, height=height)

    monkeypatch.setattr(stock, "_enhance_prompt_with_pe", noted)
    _made.cache_clear()  # a class holds the method
    texts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pipe = clear("ernie-image")
        pipe.pe, pipe.pe_tokenizer = Rewriter(), make_tokenizer()
        size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
        images = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **size).images
        assert images.isfinite().all()
        assert len(pipe.pe.asked) == len(PROMPTS)
        texts.append(torch.cat(pipe.pe.answered))
    assert torch.equal(*texts)
    assert not torch.equal(*texts[0])
    assert told == 2 * [(prompt, 20, 20) for prompt in PROMPTS]
    _made.cache_clear()
