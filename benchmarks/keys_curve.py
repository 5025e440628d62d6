"""How near to full attention an image comes with so many keys: the plot in docs/benchmarks.md.

    clear-dit evaluate ... --out evaluation
    python benchmarks/keys_curve.py evaluation/report.json --out curve.json --plot curve.png

Draws what `clear-dit evaluate` measured: for every row of one or more reports the image keys of a
query, text left out, against PSNR to full attention's image.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from plot_gpu import GREY, LIGHT, SCALE, _at, _font

from clear_dit.generation.checks import find_window
from clear_dit.tables import table

WIDTH, HEIGHT = 760, 490
COLOURS = {
    "local, untuned": (214, 120, 30),
    "local, distilled": (170, 60, 150),
    "pooled by 4, untuned": (150, 150, 150),
    "pooled by 4, distilled": (90, 90, 90),
    "far keys, untuned": (20, 120, 200),
    "far keys, distilled": (40, 160, 90),
}


def read_points(paths: list[Path]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the reports (curve, radius, keys, psnr), and the settings they share."""
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for path in paths:
        report = json.loads(path.read_text())
        same = {k: v for k, v in report["settings"].items() if k != "device"}
        if settings and settings != same:
            raise SystemExit(f"keys_curve.py: {path} has other settings than {paths[0]}")
        settings = same
        for row in report["rows"]:
            if row["radius"] is None:
                continue
            window = find_window(
                settings["height"], settings["width"], row["radius"], row["down_factor"],
                far=row["far"],
            )  # fmt: skip
            kind = "far keys" if row["far"] else "local"
            if row["down_factor"] > 1:
                kind = f"pooled by {row['down_factor']}"
            rows.append(
                {
                    "curve": f"{kind}, {row['kind']}",
                    "radius": row["radius"],
                    "keys": window.attended_pairs() / window.image_length,
                    "psnr": row["psnr"],
                }
            )
    return sorted(rows, key=lambda row: (row["curve"], row["keys"])), settings


def draw(rows: list[dict[str, Any]], caption: str) -> Image.Image:
    """Keys, logarithmic, against PSNR."""
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    pen = ImageDraw.Draw(image)
    left, right, top, bottom = 60, WIDTH - 30, 92, HEIGHT - 76
    keys, psnr = [row["keys"] for row in rows], [row["psnr"] for row in rows]
    ticks = [n for n in (20, 50, 100, 200, 500, 1000) if min(keys) / 1.6 <= n <= max(keys) * 1.6]
    x_low, x_high = math.log(min(keys) / 1.2), math.log(max(keys) * 1.2)
    low, high = 2 * math.floor(min(psnr) / 2), 2 * math.ceil(max(psnr) / 2)

    def place(count: float, value: float) -> tuple[float, float]:
        x = left + (math.log(count) - x_low) / (x_high - x_low) * (right - left)
        return _at(x, bottom - (value - low) / (high - low) * (bottom - top))

    pen.text(_at(left, 14), "PSNR to full attention, dB", "black", _font(15))
    for value in range(low, high + 1, 2):
        y = place(min(keys), value)[1]
        pen.line([(left * SCALE, y), (right * SCALE, y)], LIGHT, SCALE)
        pen.text(((left - 8) * SCALE, y), str(value), GREY, _font(12), anchor="rm")
    for count in ticks:
        x = place(count, low)[0]
        pen.text((x, (bottom + 8) * SCALE), str(count), GREY, _font(12), anchor="mt")
    pen.text(_at(right, bottom + 28), "image keys of a query", GREY, _font(12), anchor="rt")
    curves = defaultdict(list)
    for row in rows:
        curves[row["curve"]].append(row)
    for name, points in curves.items():
        colour = COLOURS[name]
        line = [place(row["keys"], row["psnr"]) for row in points]
        if len(line) > 1:
            pen.line(line, colour, 2 * SCALE + 1, joint="curve")
        for (x, y), row in zip(line, points, strict=True):
            pen.circle((x, y), 4 * SCALE, colour)
            label = f"r={row['radius']}"
            pen.text((x, y - 8 * SCALE), label, colour, _font(11), anchor="mb")
    for index, name in enumerate(sorted(curves)):
        x, y = left + 14 + index % 3 * 200, 40 + index // 3 * 16
        pen.circle(_at(x - 8, y), 4 * SCALE, COLOURS[name])
        pen.text(_at(x, y), name, COLOURS[name], _font(12), anchor="lm")
    pen.text(_at(16, HEIGHT - 24), caption, GREY, _font(12))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="report.json of clear-dit evaluate")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--plot", type=Path, required=True, help="the PNG to write")
    options = parser.parse_args()
    rows, settings = read_points(options.reports)
    result = {"rows": rows, **settings}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    caption = (
        f"{settings['model']} pipeline, {settings['count']} prompts, {settings['height']} x "
        f"{settings['width']} px, {settings['steps']} steps, {settings['dtype']}"
    )
    draw(rows, caption).save(options.plot, optimize=True)
    print(table(rows))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
