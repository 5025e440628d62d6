"""benchmarks/model_sm90.py: its arithmetic, on loops that are typed in; nothing is compiled."""

import json
import sys
from pathlib import Path

import pytest
from support.triton_mode import interpreted

if not interpreted:
    pytest.skip("needs Triton", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import model_sm90
from model_sm90 import Cost, Kernel

from clear_dit.kernels.triton.geometry import Tiling

SQUARE = Tiling(8, 8, 8, 8)


def loop(instructions, mufu=34):
    return {
        "instructions": instructions,
        "classes": {"mufu": mufu},
        "products": {"64x64x16": 8, "64x128x16": 4},
    }


def kernel(text, whole, border, groups=1, programs=2, overlapped=False):
    loops = {"text": loop(text), "whole": loop(whole), "border": loop(border)}
    return Kernel("one", loops, groups, programs, overlapped)


FIRST = kernel(457, 382, 624)


def rate(image, radius, dependent_loads=5, text=403):
    """Useful TFLOP/s of a layer; text: instructions of the text queries' loop."""
    seconds = sum(model_sm90.text_seconds(Kernel("text", {"text": loop(text)}, 2, 1), 128))
    visits = model_sm90.visits_of(image, radius, SQUARE)
    seconds += model_sm90.image_seconds(image, visits, dependent_loads)
    return model_sm90.useful_flop(radius) / seconds / 1e12


def test_cost_of_a_tile():
    cost = model_sm90.cost_of(loop(335), 1.0)
    assert (cost.tensor, cost.issue, cost.mufu, cost.shared) == (512, 335, 272, 640)
    assert cost.l2 == pytest.approx(816, abs=1)  # 32 KB at 9.7 TB/s of 132 multiprocessors
    assert cost.bound == "l2"
    assert model_sm90.cost_of(loop(335), 0.5).bound == "tensor"
    assert (cost + cost).tensor == cost.times(2).tensor == 1024


def test_customers_of_a_queueing_network():
    cost = Cost(tensor=100, issue=60, mufu=80, shared=0, l2=40)
    # Alone: one station after the other, MUFU for the issue; with a delay; many: the busiest.
    assert model_sm90.cycles_of(cost, 1, 0) == 220
    assert model_sm90.cycles_of(cost, 1, 30) == 250
    assert model_sm90.cycles_of(cost, 200, 30) == pytest.approx(100, rel=1e-3)
    # Two of two alike stations: the other one is in the way every third time.
    alike = Cost(tensor=100, issue=100, mufu=0, shared=0, l2=0)
    assert model_sm90.cycles_of(alike, 2, 0) == pytest.approx(150)
    assert model_sm90.cycles_of(Cost(10, 10, 0, shared=500, l2=0), 9, 0) == 500


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(187, 115712, 4, 2), (187, 115713, 4, 1), (168, 36864, 4, 3), (190, 98320, 8, 1)],
)
def test_programs_of_a_multiprocessor(registers, shared, warps, programs):
    assert model_sm90.programs_of(registers, shared, warps) == programs


def test_customers_are_groups():
    assert FIRST.customers == 2
    assert kernel(1, 1, 1, groups=2, programs=1).customers == 2
    assert kernel(1, 1, 1, groups=2, programs=1, overlapped=True).customers == 3


@pytest.mark.parametrize(
    ("radius", "tiles", "shared"),
    [(8, (0, 8.8), 0.59), (16, (1.0, 22.2), 0.58), (32, (23.1, 45.5), 0.55)],
)
def test_visits_are_those_of_the_lists(radius, tiles, shared):
    visits = model_sm90.visits_of(FIRST, radius, SQUARE)
    assert visits.tiles == pytest.approx(
        {"text": 8, "whole": tiles[0], "border": tiles[1]}, abs=0.05
    )
    assert visits.copied == 1
    # Two groups with lists of their own, and one copy of what either needs.
    both = model_sm90.visits_of(kernel(1, 1, 1, 2, 1, overlapped=True), radius, SQUARE)
    assert both.tiles == visits.tiles
    assert both.copied == pytest.approx(shared, abs=0.01)


@pytest.mark.parametrize(("radius", "before"), [(8, 320), (16, 305), (32, 325)])
def test_the_first_version_is_as_fast_as_the_model_before_had_it(radius, before):
    # Its ranges were loaded after the text: two more loads that wait for others.
    assert rate(FIRST, radius, dependent_loads=7) == pytest.approx(before, rel=0.06)


def test_dense_attention_is_about_as_fast_as_it_is_known_to_be():
    cost = model_sm90.cost_of(loop(292), 0.5)
    peak = 2 * 132 * model_sm90.MULTIPLY_ADDS * model_sm90.CLOCK / 1e12
    assert 600 < peak * cost.tensor / model_sm90.cycles_of(cost, 3, 0) < 750


def test_fewer_instructions_and_overlap_are_faster():
    for radius in model_sm90.RADII:
        quicker = rate(kernel(335, 358, 594), radius, text=328)
        overlapped = rate(kernel(292, 292, 534, 2, 1, overlapped=True), radius, text=328)
        assert rate(FIRST, radius, 7) < quicker < overlapped


def test_what_was_measured_is_kept(tmp_path):
    path = tmp_path / "model.json"
    row = {"entry": "one", "radius": 8, "measured": None}
    model_sm90.keep_measured([row], path)
    path.write_text(json.dumps({"rows": [row | {"measured": 9.5}]}))
    other = row | {"radius": 16}
    model_sm90.keep_measured([row, other], path)
    assert (row["measured"], other["measured"]) == (9.5, None)


def test_loops_have_names():
    waits = loop(2) | {"products": {}}

    def names(found, overlapped):
        named = model_sm90.named_loops(found, overlapped)
        return {name: one["instructions"] for name, one in named.items()}

    assert names([loop(1), waits, loop(3), loop(4)], False) == {"text": 1, "whole": 3, "border": 4}
    groups = [waits, loop(1), loop(3), waits, loop(5), loop(6), waits]
    assert names(groups, True) == {"text": 1, "whole": 3, "border": 3}
    with pytest.raises(AssertionError, match="4 loops with products"):
        names([loop(1)] * 4, False)


def test_a_turn_of_two_tiles():
    both = {name: 2 * count for name, count in loop(0)["products"].items()}
    twice = loop(670, mufu=68) | {"products": both}
    assert model_sm90.cost_of(twice, 1.0) == model_sm90.cost_of(loop(335), 1.0)
