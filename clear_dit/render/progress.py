"""The bar of a rendering: images, and the time left by how much work each of them is."""

from __future__ import annotations

from tqdm import tqdm

from ..generation.request import GenerateRequest
from ..generation.runner import Step
from ..progress import bar_options

_BAR = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} left{postfix}"
_LINE = "{desc} {percentage:3.0f}%, {elapsed} passed, {remaining} left{postfix}"


class Progress:
    """A bar on standard error, or lines where that is no terminal.

    Time grows with pixels times steps, as CLEAR's does.

    Args:
        shown: False for no bar.
    """

    def __init__(self, shown: bool) -> None:
        self._bar = tqdm(
            **{"total": 0, "miniters": 0, "smoothing": 0, "bar_format": _BAR}
            | bar_options(shown, _LINE)
        )

    def restart(self, settled: list[GenerateRequest], left: list[GenerateRequest]) -> None:
        """Other jobs than before."""
        if self._bar.disable:
            return
        done = sum(map(_cost, settled))
        self._bar.total = done + sum(map(_cost, left))
        # What was there before took no time of this run.
        self._bar.initial += done - self._bar.n
        self._bar.n = done
        self.count(len(settled), len(settled) + len(left))
        self._bar.refresh()

    def count(self, settled: int, jobs: int) -> None:
        """How many of how many are done or failed."""
        self._bar.set_description_str(f"{settled:,} of {jobs:,} images", refresh=False)
        self._bar.update(0)

    def settle(self, request: GenerateRequest) -> None:
        """One is done or failed."""
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update(_cost(request))

    def step(self, step: Step) -> None:
        """One of this process is a step further."""
        stage = f"stage {step.stage} of {step.stages}, " if step.stages > 1 else ""
        self._bar.set_postfix_str(f"{stage}step {step.step} of {step.steps}", refresh=False)
        self._bar.update(0)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _cost(request: GenerateRequest) -> int:
    return request.height * request.width * request.steps
