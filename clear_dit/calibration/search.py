"""The search: radii whose measured errors are least in sum, at the budget, and again about those.

Errors of layers add up only about: with far keys to within a few percent of all layers' together,
without them to twice that (demo, radius 4). So their sum about full attention is only the start:
errors are then measured of one layer's change in the best schedule so far. They also differ from
prompt to prompt: of every sum several schedules are solved for, bolder and more careful ones, and
all are measured as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..attention.radii import Radii
from ..kernels.window import EVERYTHING
from ..progress import bar_options
from .forwards import Trajectory
from .measure import Measure
from .solve import least_error

# How many times the uniform radius a layer's may be, or what part of it.
SPREADS = (np.inf, 2.0, 1.5)
# By how many of the radii that are tried a layer's may change in a round.
MOVES = (2, 1)
ROUNDS = 3  # at most, after the first


@dataclass(frozen=True)
class Search:
    """A search for radii.

    Attributes:
        measure: of errors.
        trajectories: that are measured.
        radii: that are tried, in tokens, rising; the last is `EVERYTHING`.
        costs: of every radius, in one layer and step.
        budget: for a layer and step, in the mean.
        base: the uniform window's radius, one of those that are tried.
        progress: show bars on standard error.
    """

    measure: Measure
    trajectories: Sequence[Trajectory]
    radii: Sequence[int]
    costs: Sequence[float]
    budget: float
    base: int
    progress: bool

    def find(self) -> Radii:
        """The best of all that were measured as a whole.

        Raises:
            ValueError: the budget is below the cheapest radii's.
        """
        uniform = self.measure.whole(Radii(self.base), self.trajectories)
        weights = 1 / uniform.mean(axis=1)  # every trajectory counts the same
        shares = np.array(self.trajectories[0].shares)
        everywhere = Radii(self.base, (), tuple((name, (self.base,)) for name in self._names))
        affordable = self.budget >= self.costs[self.radii.index(self.base)]
        sums = {everywhere: float(weights @ uniform @ shares)} if affordable else {}
        found: Radii | None = None
        for _ in range(1 + ROUNDS):
            for one in self._candidates(found, weights):
                if one not in sums:
                    whole = self.measure.whole(one, self.trajectories)
                    sums[one] = float(weights @ whole @ shares)
            if not sums:
                raise ValueError("the budget is below the cheapest radii's.")
            before, found = found, min(sums, key=lambda one: sums[one])
            if found == before:
                break
        assert found is not None
        return found

    @property
    def _names(self) -> list[str]:
        return self.measure.names

    def _candidates(self, about: Radii | None, weights: np.ndarray) -> Iterator[Radii]:
        """Schedules of least sum: about full attention (None), or about a schedule."""
        first = self.trajectories[0]
        shape = (len(self._names), len(first.intervals), len(self.radii))
        if about is None:
            now = np.full(shape[:2], self.radii.index(EVERYTHING))
            away = np.abs(np.log(np.array(self.radii) / self.base))
            masks = [np.broadcast_to(away <= np.log(spread), shape) for spread in SPREADS]
        else:
            rows = [about.of_layer(name) for name in self._names]
            now = np.array([[self.radii.index(radius) for radius in row] for row in rows])
            now = np.broadcast_to(now, shape[:2])  # a schedule without levels has one column
            away = np.abs(np.arange(shape[2]) - now[..., None])
            masks = [away <= moves for moves in MOVES]
        errors = self._errors(now, masks[0], weights)
        for mask in masks:
            allowed = np.where(mask, errors, np.inf)
            yield from self._solved(allowed, first.shares, first.levels)
            # Of all noise levels together: less is chosen, from more that was measured.
            mean = np.tensordot(first.shares, allowed, (0, 1))[:, None]
            yield from self._solved(mean, [1.0], ())

    def _solved(
        self, errors: np.ndarray, shares: Sequence[float], levels: tuple[float, ...]
    ) -> list[Radii]:
        chosen = solve(errors, self.costs, shares, self.budget)
        if chosen is None:
            return []
        rows = [tuple(self.radii[choice] for choice in row) for row in chosen]
        return [Radii(self.base, levels, tuple(zip(self._names, rows, strict=True)))]

    def _errors(self, now: np.ndarray, tried: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Means of squared errors when one layer changes, (layers, intervals, radii).

        Args:
            now: which radii they change from, (layers, intervals).
            tried: which they change to, (layers, intervals, radii); of others infinite.
            weights: of the trajectories.
        """
        total = np.where(tried, 0.0, np.inf)
        points = sum(len(part) for part in self.trajectories[0].points) // tried.shape[1]
        steps = len(self.trajectories) * points * int(tried.sum())
        shown = bar_options(self.progress)
        with tqdm(total=steps, desc="layers", unit="forward", **shown) as bar:
            for trajectory, weight in zip(self.trajectories, weights, strict=True):
                for interval, part in enumerate(trajectory.points):
                    about = self._by_name(now[:, interval])
                    which = [np.flatnonzero(row).tolist() for row in tried[:, interval]]
                    to = [[self.radii[index] for index in row] for row in which]
                    for forward in part:
                        found = self.measure.changes(forward, about, to, bar.update)
                        for row, indices, errors in zip(total, which, found, strict=True):
                            row[interval, indices] += weight * np.array(errors) / len(part)
        return total / len(self.trajectories)

    def _by_name(self, indices: np.ndarray) -> dict[str, int]:
        radii = [self.radii[index] for index in indices.tolist()]
        return dict(zip(self._names, radii, strict=True))


def solve(
    errors: np.ndarray, costs: Sequence[float], shares: Sequence[float], budget: float
) -> list[list[int]] | None:
    """The choice of radius for every layer and interval, (layers, intervals), if there is one.

    Args:
        errors: (layers, intervals, radii).
        costs: of every radius, in one layer and step.
        shares: of the steps, in every interval.
        budget: for a layer and step, in the mean.
    """
    layers, intervals, _ = errors.shape
    groups = [(layer, interval) for layer in range(layers) for interval in range(intervals)]
    found = least_error(
        [shares[interval] * errors[layer, interval] for layer, interval in groups],
        [[shares[interval] * cost for cost in costs] for _, interval in groups],
        budget * layers,
    )
    if found is None:
        return None
    return [found[layer * intervals : (layer + 1) * intervals] for layer in range(layers)]
