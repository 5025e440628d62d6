"""README's plot from the results of gpu.py: `python benchmarks/plot_gpu.py DIR OUT.png`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from playbook.part_file import PartFile
from playbook.parts import PARTS
from playbook.summary import layer_rows, steps_of

WIDTH, HEIGHT = 1200, 460
# Drawn larger and reduced, which smooths the lines.
SCALE = 2
GREY, LIGHT = (90, 90, 90), (228, 228, 228)
COLOURS = {
    "full attention": (40, 40, 40),
    "FlexAttention, r=16": (214, 120, 30),
    "CLEAR, r=8": (20, 120, 200),
    "CLEAR, r=16": (40, 160, 90),
    "CLEAR, r=32": (170, 60, 150),
}
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One diagram: curves by name, both axes logarithmic; pixels a side to milliseconds."""

    title: str
    curves: dict[str, Points]


def panels(of_layers: list[dict[str, Any]], of_steps: list[dict[str, Any]]) -> list[Panel]:
    """The two diagrams, of rows of one attention layer and of whole steps."""
    layers: dict[str, Points] = {name: [] for name in COLOURS}
    for row in of_layers:
        name = {
            "sdpa-cudnn": "full attention",
            "flex": f"FlexAttention, r={row['radius']}",
            "triton": f"CLEAR, r={row['radius']}",
        }.get(row["impl"])
        ms = row.get("ms")
        if name in layers and ms and row["size"] not in dict(layers[name]):
            layers[name].append((row["size"], ms))
    steps: dict[str, Points] = {name: [] for name in COLOURS}
    for row in of_steps:
        if row["fused"] is not False:
            name = "full attention" if row["radius"] is None else f"CLEAR, r={row['radius']}"
            steps.setdefault(name, []).append((row["size"], row["step_s"] * 1e3))
    return [
        Panel("one attention layer, forward", {k: sorted(v) for k, v in layers.items() if v}),
        Panel("one denoising step of FLUX.1-dev*", {k: sorted(v) for k, v in steps.items() if v}),
    ]


def draw(drawn: list[Panel], caption: str) -> Image.Image:
    """The image, WIDTH x HEIGHT."""
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    pen = ImageDraw.Draw(image)
    each = WIDTH / len(drawn)
    for index, panel in enumerate(drawn):
        _draw_panel(pen, panel, index * each, each)
    pen.text(_at(16, HEIGHT - 24), caption, GREY, _font(12))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _font(size: int) -> Any:
    return ImageFont.load_default(size * SCALE)


def _at(x: float, y: float) -> tuple[float, float]:
    return x * SCALE, y * SCALE


def _draw_panel(pen: ImageDraw.ImageDraw, panel: Panel, offset: float, width: float) -> None:
    left, right, top, bottom = offset + 76, offset + width - 150, 44, HEIGHT - 72
    points = [point for curve in panel.curves.values() for point in curve]
    sizes = sorted({size for size, _ in points})
    low = math.floor(math.log10(min(ms for _, ms in points)))
    high = math.ceil(math.log10(max(ms for _, ms in points)))
    span = math.log(sizes[-1] / sizes[0]) or 1.0

    def place(size: float, ms: float) -> tuple[float, float]:
        x = left + math.log(size / sizes[0]) / span * (right - left)
        return _at(x, bottom - (math.log10(ms) - low) / max(1, high - low) * (bottom - top))

    pen.text(_at(left, 14), panel.title, "black", _font(15))
    for power in range(low, high + 1):
        x, y = place(sizes[0], 10**power)
        pen.line([(x, y), (right * SCALE, y)], LIGHT, SCALE)
        pen.text((x - 8 * SCALE, y), _duration(10**power), GREY, _font(12), anchor="rm")
    for size in sizes:
        x, _ = place(size, 10**low)
        pen.text((x, (bottom + 10) * SCALE), f"{size:g} px", GREY, _font(12), anchor="mt")
    used: list[float] = []
    for name, curve in sorted(panel.curves.items(), key=lambda item: item[1][-1][1]):
        line = [place(*point) for point in curve]
        pen.line(line, COLOURS[name], 2 * SCALE + 1, joint="curve")
        for x, y in line:
            pen.circle((x, y), 3.5 * SCALE, COLOURS[name])
        # From the lowest up, and not onto each other.
        y = min([line[-1][1], *(other - 15 * SCALE for other in used[-1:])])
        used.append(y)
        pen.text((line[-1][0] + 9 * SCALE, y), name, COLOURS[name], _font(12), anchor="lm")


def _duration(ms: float) -> str:
    if ms < 1:
        return f"{ms * 1e3:g} us"
    return f"{ms:g} ms" if ms < 1000 else f"{ms / 1e3:g} s"


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: plot_gpu.py DIR OUT.png", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    records = {name: PartFile(folder, name).read() for name in PARTS}
    rows = panels(layer_rows(records), steps_of(records["blocks"]))
    drawn = [panel for panel in rows if panel.curves]
    if not drawn:
        print(f"plot_gpu.py: nothing was measured in {folder}", file=sys.stderr)
        return 1
    found = next(each.environment for each in records.values() if each.environment)
    caption = (
        f"{found['hardware']}, torch {found['torch']}, triton {found['triton']}, "
        "bfloat16, 24 heads x 128, 512 text tokens; full attention: cuDNN (layer), PyTorch's "
        "choice (step).  * 19 double and 38 single blocks, one of each timed"
    )
    draw(drawn, caption).save(sys.argv[2], optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
