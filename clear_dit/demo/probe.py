"""A small classifier that reads an image's attributes; trained on rendered images only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from clear_dit.demo.captions import ATTRIBUTES, Scene, caption, parse, sample_scene
from clear_dit.demo.data import ImageSet
from clear_dit.demo.world import render

SIZE = 64  # pixels a side that the probe looks at
_BATCH, _PEAK_RATE = 64, 2e-3
_ITEMS = tuple(ATTRIBUTES.items())


class Probe(nn.Module):
    """Square images [b, 3, SIZE, SIZE] in [0, 1] -> logits of all attributes, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = [len(values) for values in ATTRIBUTES.values()]
        widths = (3, 32, 48, 64, 96)
        self.convolutions: nn.ModuleList = nn.ModuleList(
            [nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths)]
        )
        self.hidden: nn.Linear = nn.Linear(96 * (SIZE // 16) ** 2, 128)
        self.heads: nn.Linear = nn.Linear(128, sum(self.sizes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.heads(self.features(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The last hidden layer, [b, 128]: what FID and KID of the demo are computed on."""
        x = images * 4 - 2
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.hidden(x.flatten(1)))

    @torch.no_grad()
    def read_labels(self, images: torch.Tensor) -> torch.Tensor:
        """Images as in `forward` -> the most probable value of each attribute, int [b, 7]."""
        parts = self(images).split(self.sizes, -1)
        return torch.stack([part.argmax(-1) for part in parts], 1)

    def read(self, images: np.ndarray) -> np.ndarray:
        """uint8 images [n, h, w, 3] -> the most probable value of each attribute, int [n, 7]."""
        return self.read_labels(shrink(images)).numpy()


def shrink(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, SIZE, SIZE] in [0, 1], by area."""
    tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(tensor, (SIZE, SIZE), mode="area")


def _disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise, a change of contrast and of colour, and blur, so that texture does not decide."""
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, uniform(0, 1, n, 1, 1, 1))
    images = (images - 0.5) * uniform(0.9, 1.1, n, 1, 1, 1) + 0.5
    images = images + uniform(-0.03, 0.03, n, 3, 1, 1)
    strength = uniform(0, 0.05, n, 1, 1, 1)
    return images + strength * torch.randn(images.shape, generator=generator)


def train_probe(image_set: ImageSet, epochs: int = 6) -> Probe:
    """Train on `image_set` in memory at SIZE px."""
    torch.manual_seed(0)
    images = torch.cat([shrink(chunk) for chunk in image_set.open_chunks()])
    labels = torch.tensor([scene.labels for scene in image_set.scenes()])
    probe, generator = Probe(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=_PEAK_RATE, weight_decay=0.01)
    steps = max(1, epochs * len(images) // _BATCH)
    for step in tqdm(range(steps), "probe"):
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        parts = probe(_disturb(images[chosen], generator)).split(probe.sizes, -1)
        losses = [F.cross_entropy(p, labels[chosen, i]) for i, p in enumerate(parts)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval().requires_grad_(False)


def held_out_scenes(count: int, seed: int = 2024) -> list[Scene]:
    """Scenes whose combination of attributes never occurs in training."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, held_out=True) for _ in range(count)]


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of `held_out_scenes(count)`, by templates and synonyms drawn from `seed`.

    More of them begin with the same ones.
    """
    rng = np.random.default_rng(seed)
    return [caption(scene, rng) for scene in held_out_scenes(count)]


def asked_labels(captions: Sequence[str]) -> np.ndarray:
    """The attributes that captions name: int [n, 7], -1 where they leave one open."""
    named = [parse(text.lower()) for text in captions]
    return np.array(
        [
            [values.index(found[name]) if name in found else -1 for name, values in _ITEMS]
            for found in named
        ]
    )


def probe_accuracy(probe: Probe, count: int = 256, size: int = 256) -> np.ndarray:
    """Accuracy per attribute [7] on fresh renders of held-out scenes."""
    scenes = held_out_scenes(count, seed=77)
    images = np.stack([render(scene, size, size) for scene in scenes])
    return (probe.read(images) == np.array([scene.labels for scene in scenes])).mean(0)


@torch.no_grad()
def rendered_features(probe: Probe, count: int = 64) -> torch.Tensor:
    """The probe's features [count, 128] of rendered held-out scenes."""
    scenes = held_out_scenes(count, seed=77)
    return probe.features(shrink(np.stack([render(scene, SIZE, SIZE) for scene in scenes])))


def save_probe(probe: Probe, path: Path) -> None:
    """Save the weights to the safetensors file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(probe.state_dict(), path)
    path.chmod(0o644)


def load_probe(path: Path) -> Probe:
    """Load what `save_probe` saved."""
    probe = Probe()
    probe.load_state_dict(load_file(path))
    return probe.eval().requires_grad_(False)
