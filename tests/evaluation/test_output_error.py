import pytest
import torch

from clear_dit import Window
from clear_dit.evaluation.images import fingerprint
from clear_dit.evaluation.output_error import (
    LEVELS,
    Point,
    mean_squared_error,
    predict,
    predict_all,
)
from clear_dit.evaluation.request import TEACHER, Variant, make_evaluate_request
from clear_dit.evaluation.variants import TextCache, attention_of, check_weights

PROMPT = "a pink tower in the desert at night"


@pytest.fixture(scope="module")
def request_():
    return make_evaluate_request("demo", "demo", 2, radii=[2], height=64, width=96, batch=2)


@pytest.fixture(scope="module")
def points():
    generator = torch.Generator().manual_seed(0)
    return [
        Point(PROMPT, torch.randn(24, 64, generator=generator), seed=index + 7)
        for index in range(2)
    ]


def test_noise_is_mixed_linearly_and_the_same_every_time(points):
    noisy = points[0].noisy()
    assert noisy.shape == (len(LEVELS), 24, 64)
    assert torch.equal(noisy, points[0].noisy())
    noise = [(x - (1 - s) * points[0].latents) / s for x, s in zip(noisy, LEVELS, strict=True)]
    assert all(abs(one.std() - 1) < 0.05 for one in noise)
    assert (noise[0] - noise[1]).abs().max() > 1
    assert (points[1].noisy() - noisy).abs().max() > 1


def test_predictions_are_the_transformers(pipe, request_, points):
    """One level at a time, written out, against batches of levels."""
    embeds, pooled, text_ids = pipe.encode_prompt(PROMPT, None, max_sequence_length=64)
    ids = pipe._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    found = predict(pipe, request_, points[0], TextCache(pipe.device))
    for index, level in enumerate(LEVELS):
        with torch.no_grad():
            expected = pipe.transformer(
                hidden_states=points[0].noisy()[index : index + 1],
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=torch.tensor([level]),
                img_ids=ids,
                txt_ids=text_ids,
            ).sample[0]
        assert torch.allclose(found[index], expected, atol=1e-4)


def test_error_is_zero_for_the_teacher_and_falls_with_the_radius(pipe, request_, points):
    found = {}
    for radius in (None, 1, 2, Window(4, 6, 0, 8).radius):
        variant = TEACHER if radius is None else Variant("", "", radius)
        with attention_of(pipe, variant):
            found[radius] = predict_all(
                pipe, request_, points, TextCache(pipe.device), progress=False
            )
    errors = {radius: mean_squared_error(found[None], found[radius]) for radius in found}
    assert errors[None] == 0
    assert errors[8] < 1e-8 < errors[2] < errors[1]
    expected = torch.stack([(a - b) ** 2 for a, b in zip(found[None], found[1], strict=True)])
    assert errors[1] == pytest.approx(float(expected.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_the_pipeline_is_as_before(request, pipe, kind, points):
    weights = request.getfixturevalue(kind)
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    untuned = fingerprint(pipe)
    evaluation = make_evaluate_request("demo", "demo", 1, radii=[2], height=64, width=96)
    texts, found = TextCache(pipe.device), []
    check_weights(pipe, (Variant("", "", 2, weights=weights),))
    for path in (weights, None):
        with attention_of(pipe, Variant("", "", 2, weights=path)) as impl:
            assert impl == "tiled"
            assert (fingerprint(pipe) == untuned) is (path is None)
            found.append(predict(pipe, evaluation, points[0], texts))
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert fingerprint(pipe) == untuned
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
