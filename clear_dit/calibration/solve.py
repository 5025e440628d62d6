"""The least error at a given cost: one choice in every group (the multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Units the budget is counted in: a choice's cost is rounded up by at most one of them.
UNITS = 100_000


def least_error(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int] | None:
    """Which choice of every group together cost at most the budget, and err least in sum.

    By dynamic programming over the budget, exact but for the rounding of costs to `UNITS`.

    Args:
        errors: of every choice in every group; infinite where it is not allowed.
        costs: likewise, positive; at most 256 choices.
        budget: for all groups together.

    Returns:
        A choice for each group; None if the cheapest that are allowed cost more.
    """
    best = np.zeros(UNITS + 1)  # least error of the groups so far, by what may be spent
    taken = []
    for error, cost in zip(errors, costs, strict=True):
        units = [int(np.ceil(each / budget * UNITS)) for each in cost]
        options = np.full((len(error), UNITS + 1), np.inf)
        for option, of, spent in zip(options, error, units, strict=True):
            if spent <= UNITS:
                option[spent:] = best[: UNITS + 1 - spent] + of
        taken.append((options.argmin(axis=0).astype(np.uint8), units))
        best = options.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    left, choices = UNITS, list[int]()
    for choice, units in reversed(taken):
        choices.append(int(choice[left]))
        left -= units[choices[-1]]
    return choices[::-1]
