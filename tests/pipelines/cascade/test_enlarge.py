"""Enlarging an image for the stage that repaints it: by a filter, a callable, a network."""

import pytest
import torch
from diffusers import FluxPipeline
from torch.nn.functional import interpolate

from clear_dit import CLEARFluxPipeline
from clear_dit.pipelines.cascade.enlarge import enlarge


def image():
    values = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return interpolate(values, (12, 20), mode="nearest") * 2 - 1


def twice(pixels):
    return interpolate(pixels, scale_factor=2)


class Twice(torch.nn.Module):
    """Twice as large, and as much lighter as its only weight says."""

    def __init__(self, light=0.0):
        super().__init__()
        self.light = torch.nn.Parameter(torch.tensor(light))

    def forward(self, pixels):
        return twice(pixels) + self.light


def test_an_upscaler_is_given_an_image_and_the_stage_gets_its_size():
    given = []

    def upscaler(pixels):
        given.append(pixels)
        return twice(pixels).double()

    pixels = image() * 1.5  # decoders overshoot
    assert pixels.abs().max() > 1
    made = enlarge(pixels, 24, 40, upscaler)
    assert given[0].dtype == torch.float32
    assert given[0].min() >= 0
    assert given[0].max() == 1
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, twice(pixels.clamp(-1, 1)))  # already of the stage's size
    # By too much or too little: what it made is brought to the size.
    for factor in (3, 4, 1.5):
        made = enlarge(pixels, 24, 40, lambda x, s=factor: interpolate(x, scale_factor=s))
        assert made.shape == (1, 3, 24, 40)
        assert (twice(pixels.clamp(-1, 1)) - made).abs().mean() < 0.1
    light = enlarge(pixels, 24, 40, lambda x: twice(x) + 5)
    torch.testing.assert_close(light, torch.ones_like(light))


def test_a_smooth_image_is_enlarged_without_one():
    def wave(height, width):
        y, x = (torch.arange(n) / n + 0.5 / n for n in (height, width))
        return 0.9 * torch.sin(6 * x + 4 * y[:, None]).expand(1, 3, height, width)

    inside = (..., slice(4, -4), slice(4, -4))
    made = enlarge(wave(30, 40).bfloat16(), 60, 80)
    torch.testing.assert_close(made[inside], wave(60, 80)[inside], atol=0.01, rtol=0)
    assert made.dtype == torch.float32
    assert enlarge(torch.sign(image()), 24, 40).abs().max() == 1  # no overshoot


REFUSED = {
    "a list": (lambda x: [x], "must return a float tensor, got list"),
    "integers": (lambda x: twice(x).to(torch.uint8), "a float tensor, got torch.uint8"),
    "no batch": (
        lambda x: twice(x)[0],
        r"must return \(1, 3, height, width\), got \(3, 24, 40\) for \(1, 3, 12, 20\)",
    ),
    "a batch": (lambda x: twice(x).repeat(2, 1, 1, 1), r"got \(2, 3, 24, 40\)"),
    "grey": (lambda x: twice(x)[:, :1], r"got \(1, 1, 24, 40\)"),
    "as it was": (lambda x: x, "must enlarge; it made 20x12 of 20x12 pixels"),
    "one side": (lambda x: interpolate(x, (24, 20)), "must enlarge; it made 20x24"),
    "aspect": (lambda x: interpolate(x, (24, 42)), "must keep the aspect ratio; it made 42x24"),
    "nan": (lambda x: twice(x) * torch.nan, "returned NaN or infinite values"),
    "inf": (lambda x: twice(x) / 0, "returned NaN or infinite values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_enlarged_image_is_refused_in_a_line(name):
    upscaler, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^CLEARPipeline: upscaler .*{message}") as refused:
        enlarge(image(), 24, 40, upscaler)
    assert "\n" not in str(refused.value)


@pytest.fixture
def pipe(tiny_pipeline):
    pipe = CLEARFluxPipeline.from_pipe(tiny_pipeline(FluxPipeline), native_size=16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **options):
    options = {"height": 48, "width": 64, **options}
    return pipe(
        "a red house",
        num_inference_steps=2,
        max_sequence_length=6,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).images


def test_every_stage_that_repaints_takes_the_upscaler(pipe):
    seen = []

    def upscaler(pixels):
        seen.append((pipe.stage.name, tuple(pixels.shape[-2:])))
        return twice(pixels)

    made = generate(pipe, upscaler=upscaler)
    assert seen == [("36x24", (12, 20)), ("64x48", (24, 36))]
    assert not torch.equal(made, generate(pipe))
    with pytest.raises(ValueError, match="upscaler must keep the aspect ratio; it made 24x24"):
        generate(pipe, upscaler=lambda x: interpolate(x, (24, 24)))
    with pytest.raises(ValueError, match=r"upscaler must be a callable.*got str; load_upscaler"):
        generate(pipe, upscaler="network.safetensors")


def test_kept_stages_are_those_of_one_upscaler(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"whether an upscaler that is a function is the same"):
        generate(pipe, upscaler=twice, stages_dir=tmp_path)
    made = generate(pipe, upscaler=Twice(), stages_dir=tmp_path)
    assert torch.equal(made, generate(pipe, upscaler=twice))
    last = tmp_path / "stage-3-64x48.safetensors"
    last.unlink()
    assert torch.equal(generate(pipe, upscaler=Twice(), stages_dir=tmp_path), made)
    for other in (None, Twice(0.01)):
        with pytest.raises(ValueError, match=r"of another request \(another upscaler\)"):
            generate(pipe, upscaler=other, stages_dir=tmp_path)
