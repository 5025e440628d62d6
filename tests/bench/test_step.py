"""What the benchmarks of a step have in common: the end of a result, and its report."""

import pytest
import torch

from clear_dit.bench.step import relative_error, step_report, verdict
from clear_dit.bench.timing import hardware

CPU = torch.device("cpu")
MEASURED = {"model": "demo", "height": 64, "width": 96, "radius": 3, "rows": [{"seconds": 0.5}]}


def test_a_right_result_says_what_was_measured_on_what():
    result = MEASURED | verdict(1e-6, torch.bfloat16, CPU)
    assert (result["dtype"], result["torch"]) == ("bfloat16", torch.__version__)
    head, *rows, last = step_report(result, "twice as fast").splitlines()
    assert head == f"demo, 64 x 96 px, radius 3 tokens, bfloat16, {hardware(CPU)}"
    assert [row.strip() for row in rows] == ["seconds", "0.5"]
    assert last == "twice as fast"


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_of_a_wrong_result_nothing_but_its_error_is_told(error):
    result = MEASURED | verdict(error, torch.float32, CPU)
    assert result["correct"] is False
    assert step_report(result, "fast") == f"WRONG results, relative error {error:.1e}"


def test_the_error_is_relative():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected * 1.5, expected) == pytest.approx(0.5)
