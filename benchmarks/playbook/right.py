"""Is attention right at a size that counts? A sample of queries, and all rows against a twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from clear_dit.bench.attention import LSE_TOLERANCE, TOLERANCE, SampledErrors, sampled_errors
from clear_dit.kernels.window import Window

from .check_kinds import poisoned

Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]
# Either of two results may be off by the tolerance.
TWO = 2


def checked(
    run: Run, tensors: Sequence[torch.Tensor], window: Window
) -> tuple[torch.Tensor, torch.Tensor, SampledErrors, str | None]:
    """Output and log-sum-exp of a call, how far they are from float64, and what is wrong."""
    with poisoned():
        out, lse = run()
    errors = sampled_errors(out, tensors, window, lse=lse)
    wrong = None
    if not errors.right(out.dtype, window.pooled_length > 0):
        wrong = f"wrong: {errors}"
    elif not (out.isfinite().all() and lse.isfinite().all()):
        wrong = "wrong: some results are not written, or not finite"
    return out, lse, errors, wrong


def differences(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: tuple[torch.Tensor, torch.Tensor],
    window: Window,
) -> tuple[dict[str, float], str | None]:
    """The largest difference of all rows to those of other tiles, and what is wrong with it.

    Of an output's row and head the norm, over the root mean square of the norms, of text and image
    the larger; of the log-sum-exp as it is.
    """
    found = []
    for rows in (slice(None, window.text_length), slice(window.text_length, None)):
        ours, theirs = out[:, rows].float(), other[0][:, rows].float()
        if ours.numel():
            norm = theirs.norm(dim=-1).square().mean().sqrt()
            found.append((ours - theirs).norm(dim=-1).max() / norm)
    row = {
        "row_difference": float(torch.stack(found).max()),
        "lse_difference": float((lse - other[1]).abs().max()),
    }
    right = row["row_difference"] <= TWO * TOLERANCE[out.dtype]
    right = right and row["lse_difference"] <= TWO * LSE_TOLERANCE
    return row, None if right else f"wrong: other tiles give other results: {row}"
