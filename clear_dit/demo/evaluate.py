"""Does the demo generate what it is asked? `python -m clear_dit.demo.evaluate`.

Generates captions of held-out attribute combinations and reads the images with the probe. Prints,
per attribute, the share of images that show the value asked for; beside it the probe's accuracy
on rendered images, and the share of accidental hits when captions are shuffled. The last line is
JSON. `clear-dit evaluate` compares attentions on the same captions.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from tqdm import tqdm

from clear_dit.demo.captions import ATTRIBUTES
from clear_dit.demo.probe import Probe, asked_labels, held_out_captions, load_probe, probe_accuracy
from clear_dit.generation.denoising import decode, denoise
from clear_dit.pipelines.pipeline import CLEARPipeline


def generate(
    pipe: FluxPipeline | StableDiffusion3Pipeline,
    captions: list[str],
    *,
    size: int,
    steps: int,
    true_cfg_scale: float,
    seed: int,
    batch: int,
) -> np.ndarray:
    """Images of `captions`: uint8 [n, size, size, 3]; image i starts from noise seed + i."""
    pipe.set_progress_bar_config(disable=True)
    clear = CLEARPipeline(pipe, native_size=size)  # one stage, as trained
    images = []
    for first in tqdm(range(0, len(captions), batch), f"generate at guidance {true_cfg_scale:g}"):
        texts = captions[first : first + batch]
        seeds = [seed + first + index for index in range(len(texts))]
        latents = denoise(
            clear,
            texts,
            seeds,
            height=size,
            width=size,
            steps=steps,
            guidance=true_cfg_scale,
        )
        images += [np.array(decode(clear, one[None], size, size)) for one in latents]
    return np.stack(images)


def score(probe: Probe, images: np.ndarray, captions: list[str]) -> dict[str, np.ndarray]:
    """Hits per attribute [7], and with shuffled captions (false positives) the same."""
    seen = probe.read(images)
    asked = asked_labels(captions)
    rolled = [(seen == np.roll(asked, shift, 0)).mean(0) for shift in range(1, len(captions))]
    return {"hits": (seen == asked).mean(0), "shuffled": np.mean(rolled, 0)}


def contact_sheet(images: np.ndarray, columns: int, side: int) -> Image.Image:
    """Lay out images [n, h, w, 3] on a grid, each `side` px wide."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % columns * side, i // columns * side))
    return sheet


def main(
    model: Annotated[Path, typer.Option(help="The pipeline's folder.")] = Path("assets/demo"),
    count: Annotated[int, typer.Option(min=2, help="How many captions.")] = 64,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 20,
    guidance: Annotated[
        list[float] | None,
        typer.Option(help="true_cfg_scale, or SD3's guidance_scale; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise seed of the first image.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 4,
    sheet: Annotated[Path | None, typer.Option(help="Where a contact sheet goes (PNG).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of computation.")] = 2,
    bfloat16: Annotated[bool, typer.Option(help="Compute in bfloat16 where it is faster.")] = False,
) -> None:
    """Score the pipeline on captions unseen in training."""
    torch.set_num_threads(threads)
    pipe = DiffusionPipeline.from_pretrained(model)
    probe = load_probe(model / "probe" / "probe.safetensors")
    captions = held_out_captions(count, seed)
    renders = probe_accuracy(probe, size=size, count=128)
    rows: dict[float, dict[str, np.ndarray]] = {}
    report: dict[str, Any] = {
        "count": count,
        "size": size,
        "steps": steps,
        "bfloat16": bfloat16,
        "guidance": {},
    }
    for scale in guidance or [1.0]:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            images = generate(
                pipe, captions, size=size, steps=steps, true_cfg_scale=scale, seed=seed, batch=batch
            )
        seconds = (time.perf_counter() - begin) / count
        rows[scale] = score(probe, images, captions)
        report["guidance"][f"{scale:g}"] = {
            "accuracy": round(float(rows[scale]["hits"].mean()), 4),
            "shuffled": round(float(rows[scale]["shuffled"].mean()), 4),
            "seconds_per_image": round(seconds, 2),
            **{n: round(float(v), 4) for n, v in zip(ATTRIBUTES, rows[scale]["hits"], strict=True)},
        }
        if sheet is not None:
            path = sheet.with_stem(f"{sheet.stem}-{scale:g}")
            contact_sheet(images, 8, 192).save(path)
    head = "".join(f"  cfg {scale:<4g} shuffled" for scale in rows)
    print(f"{'attribute':<14} renders{head}")
    for i, name in enumerate([*ATTRIBUTES, "all"]):
        pick = np.mean if name == "all" else lambda values, i=i: values[i]
        cells = "".join(
            f"  {pick(r['hits']):8.3f} {pick(r['shuffled']):8.3f}" for r in rows.values()
        )
        print(f"{name:<14} {pick(renders):7.3f}{cells}")
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
