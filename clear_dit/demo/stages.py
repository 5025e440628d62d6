"""What the training programs of both architectures share."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw
from tqdm import tqdm

from clear_dit.demo.autoencoder import to_tensor
from clear_dit.demo.data import ImageSet, save_array
from clear_dit.demo.muon import FAST_BFLOAT16
from clear_dit.demo.transformer import pack


def halve(images: np.ndarray) -> np.ndarray:
    """Average 2x2 pixels: uint8 [n, 2h, 2w, 3] -> [n, h, w, 3]."""
    n, h, w, c = images.shape
    blocks = images.reshape(n, h // 2, 2, w // 2, 2, c)
    return blocks.mean((2, 4), dtype=np.float32).round().astype(np.uint8)


@torch.no_grad()
def encode_set(
    vae: AutoencoderTiny, image_set: ImageSet, folder: Path, halved: bool = False
) -> None:
    """Encode `image_set` to packed latents: one float16 file [<= CHUNK, tokens, 64] per chunk.

    halved: encode the images at half their size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batch = max(1, 16 * 256**2 // image_set.size**2)
    for index, chunk in enumerate(tqdm(image_set.open_chunks(), f"encode {image_set.size} px")):
        path = folder / f"{index:05d}.npy"
        if path.exists():
            continue
        parts = []
        for first in range(0, len(chunk), batch):
            images = chunk[first : first + batch]
            with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16):
                latents = vae.encoder(to_tensor(halve(images) if halved else images))
            latents = (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
            parts.append(pack(latents).half().numpy())
        save_array(path, np.concatenate(parts))


def load_tokens(folder: Path) -> np.ndarray:
    """All packed latents of a set: float16 [n, tokens, 64]."""
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def draw_curve(curves: list[list[float]], width: int = 960, height: int = 360) -> bytes:
    """A PNG of the smoothed losses, one colour per phase, on a common axis of steps."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 60, 20, width - 20, height - 40
    total = sum(map(len, curves))
    smooth = []
    for curve in curves:
        window = max(1, len(curve) // 100)
        sums = np.cumsum(np.concatenate([np.zeros(1), curve]))
        smooth.append((sums[window:] - sums[:-window]) / window)
    low = 0.9 * min(map(np.min, smooth))
    high = max(float(np.quantile(c, 0.97)) for c in smooth) * 1.1
    for level in np.linspace(low, high, 6):
        y = bottom - (level - low) / (high - low) * (bottom - top)
        draw.line([(left, y), (right, y)], fill=(225, 225, 225))
        draw.text((8, y - 6), f"{level:.3f}", fill="black")
    start = 0
    for index, curve in enumerate(smooth):
        xs = left + (start + np.arange(len(curve))) / total * (right - left)
        ys = bottom - (np.clip(curve, low, high) - low) / (high - low) * (bottom - top)
        colour = ((30, 90, 200), (200, 70, 30))[index % 2]
        draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=colour, width=2)
        draw.text((xs[0] + 4, top), f"phase {index + 1}", fill=colour)
        start += len(curves[index])
    draw.text(((left + right) // 2 - 60, bottom + 14), f"steps (0 to {total})", fill="black")
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def timed(work: Path, name: str, stage: Callable[[], object]) -> None:
    """Run `stage` and add its seconds to WORK/times.tsv, which the card sums up."""
    begin = time.time()
    try:
        stage()
    finally:
        with (work / "times.tsv").open("a") as stream:
            stream.write(f"{name}\t{time.time() - begin:.0f}\n")
