"""Which sample, noise level and noise a training step sees: a function of the seed and the step.

Nothing here has a state, so that a resumed run, or one with other numbers of processes, batch and
accumulation (of the same product), sees the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from ..generation.conditioning import Conditioning, moved
from .samples import SampleFolder

# Of the schedule; the noise level is one of 1/1000, ..., 1000/1000, not shifted.
SCHEDULE_STEPS = 1000


class Batch(NamedTuple):
    """Inputs of a training step, on the CPU; n draws.

    Attributes:
        clean, noise: [n, ...] float32, as the denoising loop holds latents.
        s: [n] float32, the noise level.
        conditionings: n of one image each, in the samples' dtype.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    s: torch.Tensor
    conditionings: list[Conditioning]

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Everything on a device; the conditionings in a dtype."""
        clean, noise, s = self.clean.to(device), self.noise.to(device), self.s.to(device)
        return Batch(clean, noise, s, [moved(each, device, dtype) for each in self.conditionings])


class Draws:
    """The sequence of draws from the first `count` samples of a folder.

    Draw d is of a random permutation of the samples, a new one for each epoch.

    Args:
        samples: checked, see `open_samples`.
        count: samples to use.
        seed: of everything.
        prompt_dropout: share of draws whose text is the empty prompt's.

    Attributes:
        stackable: whether the conditionings of any draws can be put together in one batch.
    """

    def __init__(self, samples: SampleFolder, count: int, seed: int, prompt_dropout: float) -> None:
        self.samples = samples
        self.count = count
        self.seed = seed
        self.prompt_dropout = prompt_dropout
        self.empty: Conditioning | None = samples.empty() if prompt_dropout > 0 else None
        self.stackable: bool = samples.have_one_shape(count, prompt_dropout > 0)
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
        clean, noise, s, conditionings = zip(*map(self._draw, draws), strict=True)
        return Batch(torch.stack(clean), torch.stack(noise), torch.tensor(s), list(conditionings))

    def _draw(self, draw: int) -> tuple[torch.Tensor, torch.Tensor, float, Conditioning]:
        sample = self.samples[self.number(draw)]
        rng = np.random.default_rng((self.seed, 1, draw))
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        level = int(rng.integers(1, SCHEDULE_STEPS + 1))
        clean = sample.latents.float()
        conditioning = sample.conditioning
        if self.empty is not None and rng.random() < self.prompt_dropout:
            conditioning = self.empty
        noise = torch.randn(clean.shape, generator=generator)
        return clean, noise, level / SCHEDULE_STEPS, conditioning
