"""`clear-dit bench plan` of every family's true configuration at 4096 px."""

from functools import cache
from pathlib import Path

import pytest
import torch
from support.slow import slow

from clear_dit import Window
from clear_dit.bench.plan import plan, report
from clear_dit.bench.published import CONFIGURATIONS
from clear_dit.counting.fake import build, defaults
from clear_dit.counting.flops import count_flops
from clear_dit.counting.inputs import INPUTS
from clear_dit.counting.memory import TransformerMemory
from clear_dit.errors import RequestError
from clear_dit.families.table import CONTROLNETS, MODELS

# Parameters of the transformer in millions; layers, heads and head_dim of attention over the
# image; layers over the image alone.
MODELS_AT_4096 = {
    "chroma": (8_900, 57, 24, 128, 0),
    "flux2-dev": (32_223, 56, 48, 128, 0),
    "flux2-klein-4b": (3_876, 25, 24, 128, 0),
    "sd35-medium": (2_243, 37, 24, 64, 13),
    "qwen-image": (20_430, 60, 24, 128, 0),
    "z-image": (6_155, 32, 30, 128, 2),
    "hunyuanimage-2.1": (17_426, 60, 28, 128, 0),
    "cogview4": (6_369, 28, 32, 128, 0),
    "krea-2": (12_820, 28, 48, 128, 0),
    "flux3": (5_538, 33, 24, 128, 5),
    "qwen-image-2.1": (7_115, 32, 32, 128, 0),
    "longcat-image": (11_878, 57, 24, 128, 0),
    "ernie-image": (8_033, 36, 32, 128, 0),
}


# FLOPs of attention over text alone, from the tokens of text, which stays as it is.
KEPT = {
    "z-image": lambda text: 2 * 4 * text**2 * 30 * 128,
    "hunyuanimage-2.1": lambda text: 2 * 4 * text**2 * 28 * 128,
    # Over the text of each of 12 layers' tokens together, and of the tokens.
    "krea-2": lambda text: 2 * 4 * (text * 12**2 + text**2) * 20 * 128,
    "flux3": lambda text: 5 * 4 * text**2 * 24 * 128,
    "qwen-image-2.1": lambda text: 32 * 4 * text**2 * 32 * 128,
}


def test_every_family_can_be_planned():
    assert set(INPUTS) == set(MODELS) - set(CONTROLNETS)
    planned = {c.transformer["_class_name"] for c in CONFIGURATIONS.values()}
    assert planned == set(INPUTS)


@slow
@pytest.mark.parametrize("name", MODELS_AT_4096)
def test_flops_are_the_windows(name):
    millions, layers, heads, head_dim, alone = MODELS_AT_4096[name]
    configuration = CONFIGURATIONS[name]
    with defaults(torch.bfloat16, "meta"):
        model = build(configuration.transformer)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    side, text = 4096 // configuration.token_pixels, configuration.text_length
    window = Window(side, side, text, 16)
    result = count_flops(configuration.transformer, window)
    assert (result["layers"], result["heads"], result["head_dim"]) == (layers, heads, head_dim)
    channels = heads * head_dim
    joint = (layers - alone) * window.attention_flops(heads, head_dim)
    joint += alone * Window(side, side, 0, 16).attention_flops(heads, head_dim)
    kept = KEPT.get(name, lambda text: 0)(text)
    if name == "qwen-image-2.1":  # what stands before the image does not see it
        joint -= layers * 4 * channels * text * window.sequence_length
    full, local = result["rows"]
    assert local["attention_tflop"] == pytest.approx((joint + kept) / 1e12, rel=1e-12)
    dense = (
        4
        * channels
        * ((layers - alone) * window.sequence_length**2 + alone * window.image_length**2)
    )
    if name == "qwen-image-2.1":
        dense -= layers * 4 * channels * text * window.sequence_length
    assert full["attention_tflop"] == pytest.approx((dense + kept) / 1e12, rel=1e-12)
    # Two products for each parameter of a linear layer and token; some see text or nothing only.
    products = 2 * millions * 1e6 * window.sequence_length / 1e12
    assert 0.3 * products < full["linear_tflop"] < 1.02 * products


@pytest.fixture(scope="module")
def planned():
    """A function of a name: its plan at 4096 px."""
    return cache(lambda name: plan(name, 4096, 4096, 8, 1, False, None, torch.bfloat16))


@slow
@pytest.mark.parametrize("name", ["hunyuanimage-2.1", "sd35-medium", "krea-2"])
def test_the_documented_table(planned, name):
    result = planned(name)
    full, clear = (row["total_tflop"] for row in result["rows"])
    text, first, *_, last, tile = (row["activations_gib"] for row in result["memory"])
    numbers = (
        *(f"{full:,.0f}", f"{clear:,.0f}", f"{result['bound']:.1f}"),
        *(f"{result['memory'][0]['weights_gib']:.1f}", f"{text:.2f}", f"{first:.2f}"),
        *(f"{number:.1f}" for number in (last, tile, result["peak_gib"])),
    )
    row = " | ".join((f"| `{name}`", *numbers))
    assert row in (Path(__file__).parents[2] / "docs" / "families.md").read_text()


@slow
def test_memory_and_the_report(planned):
    result = planned("hunyuanimage-2.1")
    assert (result["token_rows"], result["token_columns"]) == (128, 128)
    stages = {row["stage"]: row for row in result["memory"]}
    assert list(stages) == [
        "text encoding",
        "denoising 2048 x 2048",
        "denoising 4096 x 4096",
        "decoding a tile of 1152 x 1152",
    ]
    weights = 2 * (17_425_795_520 + 405_575_491 + 8_292_166_656 + 219_314_944) / 2**30
    for row in stages.values():
        assert row["weights_gib"] == pytest.approx(weights, rel=1e-3)
    sequence = (128 * 128 + 1128) * 28 * 128 * 2 / 2**30
    denoising = stages["denoising 4096 x 4096"]["activations_gib"]
    assert 5 * sequence < denoising < 30 * sequence
    text = report(result)
    assert "feed-forward layers whole" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_positions_that_end_are_extended_as_in_a_cascade():
    """Stable Diffusion 3.5 Large's are 192 x 192."""
    window = Window(256, 256, 333, 8)
    few = CONFIGURATIONS["sd35-large"].transformer | {"num_layers": 1}
    counted = count_flops(few, window)["rows"][1]["attention_tflop"]
    assert counted == pytest.approx(window.attention_flops(38, 64) / 1e12, rel=1e-12)
    assert TransformerMemory(few, torch.bfloat16, None).activations(window) > 0


def test_a_size_of_no_whole_tokens():
    with pytest.raises(RequestError, match=r"--height must be a multiple of 32 .* got 1040"):
        plan("hunyuanimage-2.1", 1040, 1024, 8, 1, False, None, torch.bfloat16)
