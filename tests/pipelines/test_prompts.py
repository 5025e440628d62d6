"""Prompts by their number: what stock diffusers takes gives the images that it gives there."""

import contextlib
import random

import pytest
import torch
from conftest import make_components
from diffusers import FluxPipeline
from support.families.models import TEXT_CHANNELS
from support.ip_adapter import load_ip_adapters
from support.slow import slow

from clear_dit import CLEARFluxPipeline, apply_clear

A, B = "a house", "the red sea"


@pytest.fixture(scope="module")
def pipes():
    stock = FluxPipeline(**make_components())
    ours = CLEARFluxPipeline(**make_components(), native_size=32)
    apply_clear(ours, radius=32)
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
    return stock, ours


def draw(pipe, seeds=0, **options):
    if isinstance(seeds, int):
        generator = torch.Generator().manual_seed(seeds)
    else:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8}
    return pipe(**size | options, generator=generator, output_type="pt").images


GUIDED = {"true_cfg_scale": 2.0}
TAKEN = {
    "one prompt_2": {"prompt": [A, B], "prompt_2": A},
    "one prompt_2 in a list": {"prompt": [A, B], "prompt_2": [B]},
    "one prompt_2, generators": {"prompt": [A, B], "prompt_2": A, "seeds": [0, 1]},
    "a list of one": {"prompt": [A], "prompt_2": B},
    "one negative": {"prompt": [A, B], "negative_prompt": B, **GUIDED},
    "one negative in a list": {"prompt": [A, B], "negative_prompt": [B], **GUIDED},
    "one negative_2": {
        "prompt": [A, B], "negative_prompt": [B, A], "negative_prompt_2": A, **GUIDED,
    },
    "copies": {"prompt": [A, B], "num_images_per_prompt": 2},
    "negative without guidance": {"prompt": [A, B], "negative_prompt": B},
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_as_stock(pipes, case):
    expected, found = (draw(pipe, **TAKEN[case]) for pipe in pipes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if len(found) > 1:
        assert (found[0] - found[1]).abs().mean() > 0.05  # noise of their own


@pytest.mark.parametrize("negative", [B, [B], [B, A]])
@pytest.mark.parametrize("seeds", [0, [0, 1]])
def test_embeddings_with_a_negative_text(pipes, negative, seeds):
    embeds, pooled, _ = pipes[0].encode_prompt([A, B], None, max_sequence_length=8)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, **GUIDED}
    expected, found = (draw(p, seeds, negative_prompt=negative, **given) for p in pipes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("copies", [1, 2])
def test_copies_are_of_their_prompt(pipes, copies):
    """Stock fails here: it does not repeat embeddings that are given, nor one prompt_2."""
    embeds, pooled, _ = pipes[0].encode_prompt([A, B], [A, A], max_sequence_length=8)
    seeds = list(range(2 * copies))
    found = draw(pipes[1], seeds, prompt=[A, B], prompt_2=A, num_images_per_prompt=copies)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    again = draw(pipes[1], seeds, num_images_per_prompt=copies, **given)
    torch.testing.assert_close(found, again, rtol=0, atol=1e-5)
    for index in range(2 * copies):
        alone = {name: x[index // copies, None] for name, x in given.items()}
        expected = draw(pipes[0], index, **alone)
        torch.testing.assert_close(found[index, None], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [A, B, A], "prompt_2": [A, B]}, "prompt_2: 2 for 3 prompts; give one"),
        ({"prompt": A, "prompt_2": [A, B]}, "prompt_2: 2 for 1 prompts"),
        (
            {"prompt": [A, B], "negative_prompt": [B, A, A], **GUIDED},
            "negative_prompt: 3 for 2 prompts",
        ),
        (
            {"prompt": [], "prompt_2": [A], "latents": torch.zeros(1, 64, 4)},
            "prompt: 0 for 0 prompts",
        ),
        (
            {"prompt": A, "image": torch.zeros(2, 3, 16, 16), "num_images_per_prompt": 3},
            "image: 2 images to make 3 of; give one, or one for each prompt",
        ),
    ],
)
def test_other_numbers_are_refused(pipes, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipes[1], **options)


TEXTS = (None, A, B, [A], [A, B], [B, A, A])


def any_call(seed):
    """A random call: every argument that says how many images there are, of any number and type."""
    choose = random.Random(seed).choice
    options = {"prompt": choose(TEXTS[1:]), "prompt_2": choose(TEXTS)}
    embeds = {}
    for rows in (1, 2, 4):
        made = torch.Generator().manual_seed(rows)
        words = torch.randn(rows, choose((5, 8)), TEXT_CHANNELS, generator=made)
        embeds[rows] = words, torch.randn(rows, TEXT_CHANNELS, generator=made)
    if choose((True, False)):
        rows = choose((1, 2))
        pooled = embeds[choose((rows, rows, 1, 2))][1]
        options = {"prompt_embeds": embeds[rows][0], "pooled_prompt_embeds": pooled}
    if choose((True, True, False)):
        options["negative_prompt"] = choose(TEXTS[1:])
        options["negative_prompt_2"] = choose((None, None, *TEXTS))
    elif choose((True, False)):
        words, pooled = embeds[choose((1, 2, 4))]
        options |= {"negative_prompt_embeds": words, "negative_pooled_prompt_embeds": pooled}
    options |= {"true_cfg_scale": choose((1.0, 2.0, 2.0)), "num_images_per_prompt": choose((1, 2))}
    options["seeds"] = choose((0, 0, [0], [0, 1], [3, 1, 2, 0]))
    rows = choose((None, None, None, 1, 2))
    if rows is not None:
        made = torch.Generator().manual_seed(5)
        options["latents"] = torch.randn(rows, 64, 4, generator=made)
    return options


@slow
@pytest.mark.parametrize("part", range(8))
def test_any_call_that_stock_takes(pipes, part):
    taken = 0
    for seed in range(60 * part, 60 * (part + 1)):
        options = any_call(seed)
        try:
            expected = draw(pipes[0], **options)
        except (RuntimeError, ValueError):
            with contextlib.suppress(ValueError):  # of ours: it takes more than stock, or refuses
                draw(pipes[1], **options)
            continue
        torch.testing.assert_close(draw(pipes[1], **options), expected, rtol=0, atol=1e-5)
        taken += 1
    assert taken >= 10


def test_one_prompt_and_two_negative_ones(pipes):
    """Stock makes two images of one noise; in a cascade they part where noise is drawn again."""
    options = {"prompt": A, "negative_prompt": [A, B], **GUIDED}
    expected, found = (draw(pipe, **options) for pipe in pipes)
    assert len(expected) == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    large = draw(pipes[1], height=64, width=64, **options)
    assert large.shape == (2, 3, 64, 64)
    assert torch.equal(draw(pipes[1], height=64, width=64, **options), large)


@pytest.mark.parametrize("lengths", [(5, 8), (8, 5)])
def test_texts_of_two_lengths_in_a_cascade(pipes, lengths):
    """The pass of each is as long as its own text; the second stage has them too."""
    with torch.no_grad():
        embeds, pooled, _ = pipes[1].encode_prompt(A, None, max_sequence_length=lengths[0])
        words, negative, _ = pipes[1].encode_prompt(B, None, max_sequence_length=lengths[1])
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, **GUIDED}
    size = {"height": 64, "width": 64}
    of_text = draw(
        pipes[1], negative_prompt=B, **given, **size | {"max_sequence_length": lengths[1]}
    )
    of_embeddings = draw(
        pipes[1],
        negative_prompt_embeds=words,
        negative_pooled_prompt_embeds=negative,
        **given,
        **size,
    )
    torch.testing.assert_close(of_text, of_embeddings, rtol=0, atol=1e-5)


def test_latents_need_no_generators(pipes):
    """As in stock, which draws nothing then; a cascade does."""
    latents = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(2))
    expected, found = (draw(p, [0, 1, 2], prompt=A, latents=latents) for p in pipes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 generators for 2 images; give one, or one for each"):
        draw(pipes[1], [0, 1, 2], prompt=A, latents=latents, height=64, width=64)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("copies", [1, 2])
def test_image_prompts_of_several_prompts(rows, copies):
    """Stock gives every image all of them, where there is one for each."""
    pipes = FluxPipeline(**make_components()), CLEARFluxPipeline(**make_components())
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        load_ip_adapters(pipe)
    apply_clear(pipes[1], radius=32)
    made = torch.Generator().manual_seed(3)
    embeds = [torch.randn(rows, 1, 6, generator=made)]
    options = {"prompt": [A, B], "num_images_per_prompt": copies, "ip_adapter_image_embeds": embeds}
    options |= {
        "negative_prompt": [B, A],
        "negative_ip_adapter_image_embeds": [-embeds[0]],
        **GUIDED,
    }
    expected, found = (draw(pipe, **options) for pipe in pipes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("generator", [(torch.Generator(),), 5, [5]])
def test_what_is_no_generator_is_refused(pipes, generator):
    latents = torch.zeros(1, 64, 4)
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator or a list of them"):
        pipes[1](A, height=32, width=32, generator=generator, latents=latents)


def test_images_given_for_prompts_with_copies(pipes):
    """Each is for the copies of its own prompt."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    size = {"height": 64, "width": 64}
    found = draw(
        pipes[1], [0, 1, 2, 3], prompt=[A, B], image=images, num_images_per_prompt=2, **size
    )
    for index in range(4):
        prompt, image = (A, B)[index // 2], images[index // 2]
        expected = draw(pipes[1], index, prompt=prompt, image=image, **size)
        torch.testing.assert_close(found[index, None], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [32, 64])
def test_text_as_long_as_the_tokenizer_pads_it(pipes, side):
    """Stock takes None for that."""
    longest = pipes[1].tokenizer_2.model_max_length
    expected, found = (
        draw(pipes[1], prompt=A, height=side, width=side, max_sequence_length=length)
        for length in (longest, None)
    )
    assert torch.equal(found, expected)
    if side == 32:
        expected = draw(pipes[0], prompt=A, max_sequence_length=None)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
