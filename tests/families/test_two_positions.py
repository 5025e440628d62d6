"""Every family with a rotary table: tables that hold several positions a token."""

import pytest
import torch
from support.families.models import FAMILIES, make_inputs, make_model, run, sized
from support.families.two_positions import EMBEDDERS, expected, give_positions
from support.slow import few

from clear_dit import apply_clear
from clear_dit.pipelines.cascade.two_position_processor import TwoPositionsInFullAttention
from clear_dit.weights.forward import changed_in_forwards
from clear_dit.weights.state import ClearState

NAMES = list(EMBEDDERS)
families = pytest.mark.parametrize("name", few(NAMES, "flux2", "krea2"))
ROWS, COLUMNS, RADIUS = 5, 7, 2
# Of the angles of the further positions, the least scaled first.
FACTORS = {"one": (0.3,), "three": (0.7, 0.5, 0.3)}
further = pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)


def size_of(name):
    return sized(name, ROWS, COLUMNS)


def cases(name):
    """Inputs besides rows and columns: padded text and references where there are any."""
    yield {"batch": 2}
    if FAMILIES[name].masks_text:
        yield {"batch": 2, "padded": True}
    if FAMILIES[name].takes_references:
        yield {"references": ((2, 3), (5, 1))}


def with_positions(name, factors):
    model = make_model(name)
    give_positions(model, name, factors)
    return model


def run_full(model, given, radius=RADIUS):
    """Forwards as in a stage of full attention with rope "two"."""
    ClearState.attach(model)
    with changed_in_forwards(model, TwoPositionsInFullAttention(radius)):
        return run(model, given)


def assert_same(value, other):
    torch.testing.assert_close(value, other, rtol=1e-4, atol=3e-6)


def assert_differs(value, other):
    assert not torch.allclose(value, other, rtol=1e-2, atol=1e-3)


@families
@further
@pytest.mark.parametrize("far", [False, True])
def test_local_attention_scores_by_them(name, factors, far):
    for inputs in cases(name):
        model, given = with_positions(name, factors), make_inputs(name, *size_of(name), **inputs)
        apply_clear(model, radius=RADIUS, far=far)
        with changed_in_forwards(model, TwoPositionsInFullAttention(RADIUS)):
            found = run(model, given)
        assert_same(found, expected(name, *size_of(name), RADIUS, factors, far=far, **inputs))
        plain = make_model(name)
        apply_clear(plain, radius=RADIUS, far=far)
        assert_differs(found, run(plain, given))


@families
def test_full_attention_scores_by_them(name):
    factors = FACTORS["one"]
    for inputs in cases(name):
        model, given = with_positions(name, factors), make_inputs(name, *size_of(name), **inputs)
        processors = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
        found = run_full(model, given)
        options = {"full": True, **inputs}
        assert_same(found, expected(name, *size_of(name), RADIUS, factors, **options))
        assert_differs(found, run(make_model(name), given))
        assert_differs(found, run_full(model, given, radius=4))
        after = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
        assert after == processors


@families
@further
@pytest.mark.parametrize("far", [False, True])
def test_equal_positions_are_one(name, factors, far):
    for inputs in cases(name):
        given = make_inputs(name, *size_of(name), **inputs)
        stock, model = make_model(name), with_positions(name, (1,) * len(factors))
        assert_same(run_full(model, given), run(stock, given))
        for each in (stock, model):
            apply_clear(each, radius=RADIUS, far=far)
        with changed_in_forwards(model, TwoPositionsInFullAttention(RADIUS)):
            assert_same(run(model, given), run(stock, given))


@pytest.mark.parametrize("name", ["sd3"])
def test_a_family_without_such_tables_is_refused(name):
    model, given = make_model(name), make_inputs(name, ROWS, COLUMNS)
    with pytest.raises(ValueError, match=r'rope "two" is for rotary embedding, which .* has not'):
        run_full(model, given)


@families
def test_gradients_are_refused(name):
    model, given = with_positions(name, FACTORS["one"]), make_inputs(name, *size_of(name))
    apply_clear(model, radius=RADIUS)
    with (
        pytest.raises(ValueError, match="two_position_attention: has no gradients"),
        changed_in_forwards(model, TwoPositionsInFullAttention(RADIUS)),
    ):
        model(**given)
