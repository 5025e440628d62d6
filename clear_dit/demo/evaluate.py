"""Does the demo paint what it is asked? `python -m clear_dit.demo.evaluate`.

Paints captions of held-out attribute combinations and reads the pictures with the probe. Prints,
per attribute, the share of pictures that show the value asked for; beside it the probe's accuracy
on rendered pictures, and the share of accidental hits when captions are shuffled. The last line is
JSON.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import FluxPipeline
from PIL import Image
from tqdm import tqdm

from clear_dit.demo.captions import ATTRIBUTES, Scene, caption
from clear_dit.demo.probe import Probe, held_out_scenes, load_probe, probe_accuracy


def paint(
    pipe: FluxPipeline,
    captions: list[str],
    *,
    size: int,
    steps: int,
    true_cfg_scale: float,
    seed: int,
    batch: int,
    max_sequence_length: int = 64,
) -> np.ndarray:
    """Pictures of `captions`: uint8 [n, size, size, 3]; picture i starts from noise seed + i."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in tqdm(range(0, len(captions), batch), f"paint at guidance {true_cfg_scale:g}"):
        texts = captions[first : first + batch]
        images = pipe(
            texts,
            negative_prompt=[""] * len(texts) if true_cfg_scale > 1 else None,
            true_cfg_scale=true_cfg_scale,
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(texts))],
            max_sequence_length=max_sequence_length,
            output_type="np",
        ).images
        pictures.append((images * 255 + 0.5).astype(np.uint8))
    return np.concatenate(pictures)


def score(probe: Probe, pictures: np.ndarray, scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Hits per attribute [7], and with shuffled captions (false positives) the same."""
    seen = probe.read(pictures)
    asked = np.array([scene.labels for scene in scenes])
    rolled = [(seen == np.roll(asked, shift, 0)).mean(0) for shift in range(1, len(scenes))]
    return {"hits": (seen == asked).mean(0), "shuffled": np.mean(rolled, 0)}


def contact_sheet(pictures: np.ndarray, columns: int, side: int) -> Image.Image:
    """Lay out pictures [n, h, w, 3] on a grid, each `side` px wide."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (i % columns * side, i // columns * side))
    return sheet


def main(
    model: Annotated[Path, typer.Option(help="The pipeline's folder.")] = Path("assets/demo"),
    count: Annotated[int, typer.Option(min=2, help="How many captions.")] = 64,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 20,
    guidance: Annotated[
        list[float] | None, typer.Option(help="true_cfg_scale; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise seed of the first picture.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 4,
    sheet: Annotated[Path | None, typer.Option(help="Where a contact sheet goes (PNG).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of computation.")] = 2,
    bfloat16: Annotated[bool, typer.Option(help="Compute in bfloat16 where it is faster.")] = False,
) -> None:
    """Score the pipeline on captions unseen in training."""
    torch.set_num_threads(threads)
    pipe = FluxPipeline.from_pretrained(model)
    probe = load_probe(model / "probe" / "probe.safetensors")
    scenes = held_out_scenes(count)
    rng = np.random.default_rng(seed)
    captions = [caption(scene, rng) for scene in scenes]
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
            pictures = paint(
                pipe, captions, size=size, steps=steps, true_cfg_scale=scale, seed=seed, batch=batch
            )
        seconds = (time.perf_counter() - begin) / count
        rows[scale] = score(probe, pictures, scenes)
        report["guidance"][f"{scale:g}"] = {
            "accuracy": round(float(rows[scale]["hits"].mean()), 4),
            "shuffled": round(float(rows[scale]["shuffled"].mean()), 4),
            "seconds_per_picture": round(seconds, 2),
            **{n: round(float(v), 4) for n, v in zip(ATTRIBUTES, rows[scale]["hits"], strict=True)},
        }
        if sheet is not None:
            path = sheet.with_stem(f"{sheet.stem}-{scale:g}")
            contact_sheet(pictures, 8, 192).save(path)
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
