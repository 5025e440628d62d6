"""How time and memory of local attention grow with the picture: linearly, or something is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import RequestError
from ..kernels.attention import local_attention, select_impl
from ..memory import peak_mb, reset_peak
from .attention import Problem
from .timing import hardware, table, time_in_turn


def bench_growth(problem: Problem, sizes: Sequence[int], impl: str, repeats: int) -> dict[str, Any]:
    """Time one layer at square pictures of the given sizes.

    Args:
        problem: the layer; its height and width are replaced.
        sizes: sides in pixels, at least two, growing.

    Returns:
        rows with size, tokens, ms, peak_mb (memory beyond query, key and value), mb_per_ktoken;
        and `exponent`: time grows as tokens^exponent from the first size to the last.
    """
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)):
        raise RequestError(f"--sizes must be two or more growing sizes in pixels, got {sizes}.")
    rows: list[dict[str, Any]] = []
    for size in sizes:
        sized = replace(problem, height=size, width=size)
        query, key, value = sized.tensors()
        name = select_impl(impl, query)
        run = partial(local_attention, query, key, value, sized.window, impl=name)

        run()
        reset_peak(problem.device)
        before = peak_mb(problem.device)
        run()
        extra = peak_mb(problem.device) - before
        seconds = time_in_turn({"local": run}, repeats, problem.device)["local"]
        tokens = sized.window.sequence_length
        rows.append(
            {
                "size": size,
                "tokens": tokens,
                "impl": name,
                "ms": seconds * 1e3,
                "peak_mb": extra,
                "mb_per_ktoken": extra / tokens * 1e3,
            }
        )
    ratio = rows[-1]["tokens"] / rows[0]["tokens"]
    return {
        "rows": rows,
        "exponent": math.log(rows[-1]["ms"] / rows[0]["ms"]) / math.log(ratio),
        "hardware": hardware(problem.device),
    }


def report(result: dict[str, Any]) -> str:
    return (
        f"{result['hardware']}\n{table(result['rows'])}\n"
        f"time grows as tokens^{result['exponent']:.2f}"
    )
