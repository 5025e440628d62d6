"""Seeds for generators and text for numbers: one line, before any work, of every pipeline."""

import pytest
import torch
from support.families.pipelines import call_options, make_pipeline

from clear_dit import CLEARPipeline

A_SEED = "got 0; of a seed it is torch.Generator().manual_seed(0)."
NO_NUMBER = "must be a whole number of pixels, a multiple of 4; got "
ARGUMENTS = [
    ({"generator": 0}, f"generator must be a torch.Generator or a list of them, {A_SEED}"),
    (
        {"generator": [torch.Generator(), 7]},
        "generator must be a torch.Generator or a list of them, got a list with 7; of a seed it is "
        "torch.Generator().manual_seed(7).",
    ),
    (
        {"generator": "0"},
        "generator must be a torch.Generator or a list of them, got str.",
    ),
    (
        {"generator": (torch.Generator(),)},
        "generator must be a torch.Generator or a list of them, got tuple.",
    ),
    (
        {"generator": [torch.Generator(), torch.Generator()]},
        "2 generators for 1 images; give one, or one for each.",
    ),
    ({"generator": []}, "0 generators for 1 images; give one, or one for each."),
    ({"height": "512"}, f"height {NO_NUMBER}'512'."),
    ({"width": 16.5}, f"width {NO_NUMBER}16.5."),
    ({"width": [16]}, f"width {NO_NUMBER}[16]."),
    ({"height": True}, f"height {NO_NUMBER}True."),
    ({"height": 18}, "height must be a multiple of 4 pixels, got 18; the nearest are 16 and 20."),
    (
        {"num_inference_steps": "4"},
        "num_inference_steps must be an integer of at least 1, got '4'.",
    ),
]


@pytest.fixture(scope="module", params=["flux", "sd3", "flux3"])
def call(request):
    """A function of arguments that calls a pipeline whose models do nothing."""
    pipe = CLEARPipeline(make_pipeline(request.param), native_size=16)
    for part in ("transformer", "text_encoder"):
        getattr(pipe, part).forward = None
    options = call_options(request.param) | {"num_inference_steps": 1, "height": 16, "width": 16}
    return lambda **given: pipe(prompt="a red house", **options | given)


@pytest.mark.parametrize(("given", "told"), ARGUMENTS)
def test_refused_in_one_line(call, given, told):
    with pytest.raises(ValueError, match=r"^CLEARPipeline: ") as error:
        call(**given)
    assert str(error.value) == f"CLEARPipeline: {told}"


def test_what_is_right_gets_to_work(call):
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        call(generator=torch.Generator())
