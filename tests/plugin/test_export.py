"""torch.export at a fixed size: the program is the model, or an error says what to do."""

import pytest
import torch
from support.families.models import FAMILIES, make_inputs, make_model, run, stacked
from support.slow import few, slow

from clear_dit import CLEARProcessor, apply_clear, remove_clear

LOCAL = {"radius": 2, "far": False}
# Their rows and columns are in position ids, whose values export hides.
BY_IDS = ("flux", "chroma", "flux2", "krea2", "flux3", "longcat-image")
# Their masks tell text from padding.
MASKED = ("chroma", "hunyuan-image")


@pytest.fixture(params=few(FAMILIES))
def name(request):
    return request.param


@torch.no_grad()
def exported(model, given, **options):
    return torch.export.export(model, (), given | {"return_dict": False}, **options).module()


@torch.no_grad()
def image(program, given):
    return stacked(program(**given, return_dict=False)[0])


def other(given):
    """Other latents, of the same sizes."""
    latents = "x" if "x" in given else "hidden_states"
    value = given[latents]
    turned = [one.flip(-1) for one in value] if isinstance(value, list) else value.flip(-1)
    return given | {latents: turned}


# The stock models cannot be exported; ERNIE-Image cannot do without the lengths of its prompts.
NOT_EXPORTED = ("hunyuan-image", "qwen-image-2.1", "ernie-image")
PROGRAMS = [(name, far) for name in FAMILIES if name not in NOT_EXPORTED for far in (False, True)]


@slow
@pytest.mark.parametrize(("name", "far"), PROGRAMS)
def test_the_program_is_the_model(name, far):
    model, given = make_model(name), make_inputs(name, 4, 6)
    if name in MASKED:
        del given["attention_mask"]
    apply_clear(model, radius=2, far=far, grid=(4, 6) if name in BY_IDS else None)
    expected, again = run(model, given), run(model, other(given))
    program = exported(model, given)
    assert torch.equal(image(program, given), expected)
    assert torch.equal(image(program, other(given)), again)
    assert torch.equal(run(model, given), expected)
    remove_clear(model)
    assert torch.equal(image(program, given), expected)


@pytest.mark.parametrize("name", BY_IDS)
def test_ids_are_hidden(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, **LOCAL)
    expected = run(model, given)
    message = (
        r"^CLEAR: torch.export hides .*; name it: apply_clear\(\.\.\., grid=\(rows, columns\)\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        exported(model, given)
    assert torch.equal(run(model, given), expected)


@pytest.mark.parametrize("name", [*MASKED, "ernie-image"])
def test_masks_are_hidden(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, **LOCAL, grid=(4, 6))
    with pytest.raises(ValueError, match=r"^CLEAR: torch.export hides .* masks too, .*; leave the"):
        exported(model, given)


def test_strict(tiny_transformer, tiny_inputs):
    model, given = tiny_transformer(), tiny_inputs(4, 6)
    apply_clear(model, **LOCAL, grid=(4, 6))
    with pytest.raises(Exception, match=r"CLEAR: torch.export with strict=True .* leave strict=Fa"):
        exported(model, given, strict=True)


@pytest.mark.parametrize("grid", [pytest.param((4, 6), marks=slow), None])
def test_a_processor_alone(tiny_transformer, tiny_inputs, grid):
    model, given = tiny_transformer(), tiny_inputs(4, 6)
    model.set_attn_processor(CLEARProcessor(**LOCAL, grid=grid))
    if grid is None:
        with pytest.raises(RuntimeError, match=r"must be known beforehand; .* apply_clear"):
            exported(model, given)
        return
    assert torch.equal(image(exported(model, given), given), run(model, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=slow)])
def test_ids_that_dtypes_merge(tiny_transformer, tiny_inputs, dtype):
    model, given = tiny_transformer(), tiny_inputs(2, 260)
    apply_clear(model, **LOCAL, grid=(2, 260))
    expected = run(model, given)
    given["img_ids"] = given["img_ids"].to(dtype)
    if dtype == torch.float32:
        assert torch.equal(image(exported(model, given), given), expected)
        return
    with pytest.raises(ValueError, match=r"img_ids in torch.bfloat16 cannot tell .* in float32"):
        exported(model, given)


def test_another_grid_is_refused(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, **LOCAL, grid=(4, 7))
    with pytest.raises(ValueError, match=r"grid.*4"):
        run(model, given)
    apply_clear(model, **LOCAL, grid=(4, 6))
    expected = run(model, given)
    apply_clear(model, **LOCAL)
    assert torch.equal(run(model, given), expected)
