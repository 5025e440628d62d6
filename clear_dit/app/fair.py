"""The order in which jobs run: those who ask take turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

# Of whom it is remembered when they had their last turn.
_MAX_REMEMBERED = 1000


class Waiting(Protocol):
    """What a queue knows of a job: whose it is."""

    @property
    def owner(self) -> str: ...

    @property
    def party(self) -> str: ...


J = TypeVar("J", bound=Waiting)


class FairQueue(Generic[J]):
    """Jobs that wait. Parties take turns, in each its owners, and an owner's jobs are in order.

    So who has sent many images waits for them, and who sends one comes soon.
    """

    def __init__(self) -> None:
        self._jobs: list[J] = []
        self._turn = 0
        self._last_turn: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: J) -> bool:
        return job in self._jobs

    def __iter__(self) -> Iterator[J]:
        """In the order in which they would run if nothing else came."""
        left, turns, turn = list(self._jobs), dict(self._last_turn), self._turn
        while left:
            job = _next(left, turns)
            left.remove(job)
            turn += 1
            turns[job.party] = turns[job.owner] = turn
            yield job

    def add(self, job: J) -> None:
        """Put a job in."""
        self._jobs.append(job)

    def remove(self, job: J) -> None:
        """Take a job out that will not run."""
        self._jobs.remove(job)

    def pop(self) -> J:
        """Take the next job out; its owner and party have had their turn."""
        job = _next(self._jobs, self._last_turn)
        self._jobs.remove(job)
        self._turn += 1
        for who in (job.party, job.owner):
            self._last_turn.pop(who, None)
            self._last_turn[who] = self._turn
        while len(self._last_turn) > _MAX_REMEMBERED:
            del self._last_turn[next(iter(self._last_turn))]
        return job


def _next(jobs: list[J], last_turn: dict[str, int]) -> J:
    """Of who has waited longest for a turn; `min` takes the first of several."""
    return min(jobs, key=lambda job: (last_turn.get(job.party, 0), last_turn.get(job.owner, 0)))
