"""The cascade's plan."""

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clear_dit.pipelines.cascade.presets import FURTHER, PRESETS, REPAINT
from clear_dit.pipelines.cascade.stages import NATIVE_SLACK, plan_stages


def sizes(*args, **options):
    return [(stage.height, stage.width) for stage in plan_stages(*args, **options)]


@pytest.mark.parametrize(
    ("height", "width", "native", "expected"),
    [
        (512, 512, 512, [(512, 512)]),
        (1024, 1024, 512, [(512, 512), (1024, 1024)]),
        (1024, 1024, 1024, [(1024, 1024)]),
        (1024, 1280, 1024, [(1024, 1280)]),  # 1.25 times the native pixels
        (1344, 768, 512, [(672, 384), (1344, 768)]),
        (1024, 2048, 512, [(368, 720), (608, 1216), (1024, 2048)]),
        (8192, 8192, 1024, [(1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192)]),
        (8192, 512, 512, [(2048, 128), (4096, 256), (8192, 512)]),
        (8192, 8192, 512, [(512,) * 2, (1024,) * 2, (2896,) * 2, (8192,) * 2]),
    ],
)
def test_sizes(height, width, native, expected):
    assert sizes(height, width, native_size=native) == expected


def test_sizes_of_presets():
    assert sizes(16384, 16384, native_size=512, preset="repaint") == [
        (512 * 2**k,) * 2 for k in range(6)
    ]
    assert sizes(4096, 4096, native_size=512, preset="refine") == [
        (512, 512),
        (1456, 1456),
        (4096, 4096),
    ]


side = st.integers(1, 1024).map(lambda tokens: 16 * tokens)


cascades = st.sampled_from([None, True, False])
presets = st.sampled_from(PRESETS)


@given(side, side, st.sampled_from([512, 1024]), cascades, presets)
@example(16384, 16, 512, None, "auto")
@example(512, 8192, 512, True, "auto")
@example(1072, 1072, 512, None, "auto")
@example(1088, 1088, 512, None, "auto")
def test_no_stage_enlarges_too_much_and_the_first_is_native(height, width, native, cascade, preset):
    stages = plan_stages(height, width, native_size=native, cascade=cascade, preset=preset)
    assert (stages[-1].height, stages[-1].width) == (height, width)
    for stage in stages:
        assert stage.height % 16 == 0
        assert stage.width % 16 == 0
    for smaller, larger in itertools.pairwise(stages):
        most = 2 if larger.guided else 3
        assert smaller.height <= larger.height <= most * smaller.height
        assert smaller.width <= larger.width <= most * smaller.width
    assert [stage.strength is None for stage in stages] == [True] + [False] * (len(stages) - 1)
    excess = height * width / native**2
    if cascade is False or excess <= 1 or (cascade is None and excess <= NATIVE_SLACK):
        assert len(stages) == 1
        return
    scale = math.sqrt(excess / NATIVE_SLACK)
    by, doublings = (3 if preset == "refine" else 2), 0
    if preset == "auto" and excess > 2.1**2:
        by, doublings = 3, 1
    number = doublings + math.ceil(math.log(scale / 2**doublings, by) - 1e-9)
    assert len(stages) == 1 + max(number, 1)
    first = stages[0]
    # A long, thin image cannot be rounded to whole tokens as closely.
    for own, target in ((first.height, height), (first.width, width)):
        exact = target / math.sqrt(excess)
        assert exact - 8 <= own <= max(exact * math.sqrt(NATIVE_SLACK), exact) + 16


@given(side, side, st.floats(1, 20))
def test_an_image_is_enlarged_by_at_most_doubling(height, width, scale):
    image = (max(1, math.ceil(height / scale)), max(1, math.ceil(width / scale)))
    stages = plan_stages(height, width, native_size=512, image_size=image, preset="repaint")
    assert (stages[-1].height, stages[-1].width) == (height, width)
    assert all(stage.strength == REPAINT.strength for stage in stages)
    largest = max(height / image[0], width / image[1])
    assert len(stages) == max(1, math.ceil(math.log2(largest) - 1e-9))
    before = image
    for stage in stages:  # half a token is what rounding adds
        assert stage.height <= 2 * before[0] + 16
        assert stage.width <= 2 * before[1] + 16
        before = (stage.height, stage.width)


def test_strength():
    def strengths(*size, **options):
        return [stage.strength for stage in plan_stages(*size, native_size=512, **options)]

    assert strengths(2048, 2048) == [None, REPAINT.strength, FURTHER.strength]
    assert strengths(2048, 2048, preset="repaint") == [None, REPAINT.strength, REPAINT.strength]
    assert strengths(2048, 2048, strength=(0.55, 0.3)) == [None, 0.55, 0.3]
    assert strengths(1024, 1024, strength=0) == [None, 0]
    assert strengths(1024, 1024, strength=1, image_size=(300, 300)) == [1, 1]


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (1.5, "strength must be from 0 to 1, got 1.5"),
        (-0.1, "strength must be from 0 to 1, got -0.1"),
        (float("nan"), "strength must be from 0 to 1, got nan"),
        ([0.5, 2.0], "strength must be from 0 to 1, got 2.0"),
        ([0.5], "strength has 1 values, but 2 stages enlarge an image; give one number, or one"),
    ],
)
def test_strength_is_refused(strength, message):
    with pytest.raises(ValueError, match=message):
        plan_stages(2048, 2048, native_size=512, strength=strength)


def test_strength_is_refused_even_without_a_use():
    with pytest.raises(ValueError, match="from 0 to 1, got 3"):
        plan_stages(512, 512, native_size=512, strength=3)


def starts(**options):
    stages = plan_stages(2048, 2048, native_size=512, **options)[1:]
    return [
        (one.strength, one.most_steps if one.steps is None else one.steps, one.guided)
        for one in stages
    ]


def test_steps_go_with_the_strength():
    repaint = (REPAINT.strength, None, True)
    assert starts() == [repaint, (FURTHER.strength, FURTHER.most_steps, False)]
    # A strength that is given takes its share of the schedule, and guidance.
    assert starts(strength=0.3) == [(0.3, None, True)] * 2
    assert starts(stage_steps=4) == [(REPAINT.strength, 4, True), (FURTHER.strength, 4, False)]
    assert starts(strength=(0.5, 0.1), stage_steps=(6, 1)) == [(0.5, 6, True), (0.1, 1, True)]
    # One number is for those that are denoised.
    assert starts(strength=(0.5, 0), stage_steps=2) == [(0.5, 2, True), (0, 0, True)]
    assert starts(strength=(0.5, 0), stage_steps=(2, 0)) == [(0.5, 2, True), (0, 0, True)]


def test_fewer_steps_than_the_share_are_of_second_order():
    def taken(steps, **options):
        def levels(strength, taken=None):
            return [strength] * (taken or steps)

        stage = plan_stages(2048, 2048, native_size=512, **options)[-1]
        sigmas, second_order = stage.sigmas(levels)
        return len(sigmas), second_order

    assert taken(6) == (3, True)
    assert taken(3) == (3, False)
    assert taken(2) == (2, False)  # a model of few steps
    assert taken(6, preset="repaint") == (6, False)
    assert taken(6, preset="refine") == (2, True)
    assert taken(6, stage_steps=4) == (4, True)
    assert taken(2, stage_steps=4) == (4, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "sharpen"}, "preset must be one of auto, repaint, refine; got 'sharpen'"),
        ({"stage_steps": 0}, "enlargement 1 of 2 cannot have 0 steps from strength 0.55"),
        ({"stage_steps": (2, 0)}, "enlargement 2 of 2 cannot have 0 steps from strength"),
        (
            {"strength": (0.5, 0), "stage_steps": (2, 2)},
            "enlargement 2 of 2 cannot have 2 steps from strength 0; a strength of 0 has 0 steps",
        ),
        ({"stage_steps": 1.5}, "stage_steps must be an integer from 0 to 1000, got 1.5"),
        ({"stage_steps": 1001}, "stage_steps must be from 0 to 1000, got 1001"),
        ({"stage_steps": (1, 2, 3)}, "stage_steps has 3 values, but 2 stages enlarge an image"),
    ],
)
def test_steps_that_a_stage_cannot_have(options, message):
    with pytest.raises(ValueError, match=message):
        starts(**options)


def test_full_attention_up_to_the_native_size_of_a_cascade():
    def attention(height, width=None, **options):
        stages = plan_stages(height, width or height, native_size=512, attention="clear", **options)
        return [stage.attention for stage in stages]

    assert attention(2048) == ["full", "clear", "clear"]
    assert attention(1024, 2048) == ["full", "clear", "clear"]  # 368x720, rounded up
    assert attention(2048, native_attention="clear") == ["clear"] * 3
    assert attention(512) == ["clear"]  # what the pipeline is set to
    assert attention(1024, image_size=(256, 256)) == ["full", "clear"]


def test_positions_fit_the_attention():
    def rope(**options):
        stages = plan_stages(1024, 2048, native_size=512, **options)
        return [stage.resolution.rope for stage in stages]

    assert rope(attention="clear") == ["two"] * 3
    assert rope(attention="clear", pooled=True) == ["two", "yarn", "yarn"]
    assert rope() == ["two", "yarn", "yarn"]
