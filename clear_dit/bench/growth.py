"""How time and memory of local attention grow with the image: linearly, or something is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..errors import RequestError
from ..generation.checks import find_impl
from ..kernels.attention import local_attention
from ..kernels.triton.device import kernels_of
from ..memory import peak_mb, reset_peak
from ..tables import table
from .attention import Problem, errors_of, local_lse, sampled_errors
from .timing import time_in_turn


def bench_growth(problems: Sequence[Problem], impl: str, repeats: int) -> dict[str, Any]:
    """Check, then time one layer at growing images.

    Args:
        problems: the same layer at two or more sizes, the smallest first.

    Returns:
        rows with height and width (pixels), tokens, ms, peak_mb (memory beyond query, key and
        value), mb_per_ktoken, text_error, image_error and lse_error; `exponent`: time grows as
        tokens^exponent from the first size to the last; `correct`.

    Raises:
        RequestError: sizes that do not grow, or an implementation that cannot run here.
    """
    lengths = [problem.window.sequence_length for problem in problems]
    if len(problems) < 2 or lengths != sorted(set(lengths)):
        raise RequestError("--sizes must be two or more growing sizes in pixels.")
    rows: list[dict[str, Any]] = []
    for problem, tokens in zip(problems, lengths, strict=True):
        far, pooled = problem.window.far_levels > 0, problem.window.down_factor > 1
        kernels = kernels_of(far, pooled, needs_grad=False)
        name = find_impl(impl, problem.dtype, problem.device, problem.head_dim, kernels)
        query, key, value = tensors = problem.tensors()
        run = partial(local_attention, query, key, value, problem.window, impl=name)
        out = run()
        assert isinstance(out, torch.Tensor)
        lse = local_lse(name, query, key, value, problem.window)
        errors = sampled_errors(out, tensors, problem.window, lse=lse)
        reset_peak(problem.device)
        before = peak_mb(problem.device)
        run()
        extra = peak_mb(problem.device) - before
        seconds = time_in_turn({name: run}, repeats, problem.device)[name]
        rows.append(
            {
                "height": problem.setting["height"],
                "width": problem.setting["width"],
                "tokens": tokens,
                "impl": name,
                "ms": seconds * 1e3,
                "peak_mb": extra,
                "mb_per_ktoken": extra / tokens * 1e3,
                **errors._asdict(),
            }
        )
    ratio = rows[-1]["tokens"] / rows[0]["tokens"]
    return {
        "rows": rows,
        "exponent": math.log(rows[-1]["ms"] / rows[0]["ms"]) / math.log(ratio),
        "correct": all(
            errors_of(row).right(problem.dtype, problem.window.pooled_length > 0)
            for problem, row in zip(problems, rows, strict=True)
        ),
        **{
            name: value
            for name, value in problems[0].setting.items()
            if name not in ("height", "width")
        },
    }


def report(result: dict[str, Any]) -> str:
    """The table of a result and the exponent."""
    if not result["correct"]:
        sizes = (f"{row['height']} px: {errors_of(row)}" for row in result["rows"])
        return f"WRONG results, errors at {'; '.join(sizes)}"
    return (
        f"radius {result['radius']} tokens{', far keys' if result['far'] else ''}, "
        f"{result['heads']} x {result['head_dim']}, "
        f"{result['text_length']} text tokens, {result['dtype']}, {result['hardware']}\n"
        f"{table(result['rows'])}\n"
        f"time grows as tokens^{result['exponent']:.2f}"
    )
