"""Prompts by their number: what stock diffusers takes gives the images that it gives there."""

import pytest
import torch
from conftest import make_components
from diffusers import FluxPipeline

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
    ],
)
def test_other_numbers_are_refused(pipes, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipes[1], **options)
