"""Which sample, noise level and noise a training step sees: a function of the seed and the step.

Nothing here has a state, so that a resumed run, or one with other numbers of processes, batch and
accumulation (of the same product), sees the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from .samples import SampleFolder, Text

# Of the schedule; the noise level is one of 1/1000, ..., 1000/1000, not shifted.
SCHEDULE_STEPS = 1000


class Batch(NamedTuple):
    """Inputs of a training step, on the CPU; n draws.

    Attributes:
        clean, noise: [n, tokens, channels] float32.
        s: [n] float32, the noise level.
        words: [n, text tokens, channels], in the samples' dtype.
        pooled: [n, channels], likewise.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    s: torch.Tensor
    words: torch.Tensor
    pooled: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Everything on a device; the text in a dtype."""
        clean, noise, s = (each.to(device) for each in self[:3])
        words, pooled = (each.to(device, dtype) for each in self[3:])
        return Batch(clean, noise, s, words, pooled)


class Draws:
    """The sequence of draws from the first `count` samples of a folder.

    Draw d is of a random permutation of the samples, a new one for each epoch.

    Args:
        samples: checked, see `open_samples`.
        count: samples to use.
        seed: of everything.
        prompt_dropout: share of draws whose text is the empty prompt's.
    """

    def __init__(self, samples: SampleFolder, count: int, seed: int, prompt_dropout: float) -> None:
        self.samples, self.count, self.seed = samples, count, seed
        self.prompt_dropout = prompt_dropout
        self.empty: Text | None = samples.empty() if prompt_dropout > 0 else None
        self._order: tuple[int, np.ndarray] | None = None

    def number(self, draw: int) -> int:
        """The sample of a draw."""
        epoch, position = divmod(draw, self.count)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.count)
            self._order = (epoch, order)
        return int(self._order[1][position])

    def batch(self, draws: Iterable[int]) -> Batch:
        """Some draws.

        Raises:
            RequestError: a sample's text embeddings are not finite.
        """
        rows = [self._draw(draw) for draw in draws]
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _draw(self, draw: int) -> Batch:
        sample = self.samples[self.number(draw)]
        rng = np.random.default_rng((self.seed, 1, draw))
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        level = int(rng.integers(1, SCHEDULE_STEPS + 1))
        clean = sample.latents.float()
        words, pooled = sample.words, sample.pooled
        if self.empty is not None and rng.random() < self.prompt_dropout:
            words, pooled = self.empty.words[0], self.empty.pooled[0]
        noise = torch.randn(clean.shape, generator=generator)
        return Batch(clean, noise, torch.tensor(level / SCHEDULE_STEPS), words, pooled)
