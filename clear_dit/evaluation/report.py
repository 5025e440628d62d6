"""The result as a dict for programs and as a table in Markdown for people."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ..generation.checks import find_window
from ..versions import __version__
from .measure import Values
from .metrics import METRICS
from .output_error import IMAGES, LEVELS
from .request import EvaluateRequest, Variant

_ARROWS = {"higher": "↑", "lower": "↓"}


def layer_gflop(
    request: EvaluateRequest, variant: Variant, text: int, token_pixels: int, channels: int
) -> float:
    """GFLOP of one attention layer at the evaluated size, batch 1 (`Window.attention_flops`).

    Args:
        request: gives the size.
        variant: gives the window; full attention is a window larger than the image.
        text: text tokens, padding included, at most.
        token_pixels: side of a token.
        channels: heads times head_dim.
    """
    generation = request.generation
    radius = generation.height + generation.width if variant.radius is None else variant.radius
    window = find_window(
        generation.height,
        generation.width,
        radius,
        variant.down_factor,
        text,
        token_pixels,
        far=variant.far,
    )
    return window.attention_flops(1, channels) / 1e9


def make_report(
    request: EvaluateRequest,
    values: Values,
    left_out: dict[str, str],
    gflop: dict[str, float],
    impls: dict[str, str],
) -> dict[str, Any]:
    """All that was found, ready for JSON.

    Returns:
        settings {model, prompts, count, height, width, steps, guidance, seed, dtype, device},
        rows [{label, kind, radius, down_factor, far, weights, folder, impl, gflop_per_layer, and
        the metrics' values, null where they have none}], metrics [names, in the table's order],
        left_out {metric: reason}, distilled_against_untuned, version.
    """
    generation = request.generation
    keys = ("model", "height", "width", "steps", "guidance", "seed", "dtype", "device")
    names = [name for name in METRICS if any(name in row for row in values.values())]
    rows = [
        {
            "label": variant.label,
            "kind": variant.kind,
            "radius": variant.radius,
            "down_factor": variant.down_factor,
            "far": variant.far,
            "weights": None if variant.weights is None else str(variant.weights),
            "folder": variant.folder,
            "impl": impls[variant.folder],
            "gflop_per_layer": round(gflop[variant.folder], 6),
            **{name: _for_json(values[variant.folder].get(name)) for name in names},
        }
        for variant in request.variants
    ]
    settings = {key: asdict(generation)[key] for key in keys}
    return {
        "settings": settings | {"prompts": request.source, "count": len(request.prompts)},
        "metrics": names,
        "rows": rows,
        "left_out": left_out,
        "distilled_against_untuned": _against_untuned(request, values, names),
        "version": __version__,
    }


def _for_json(value: float | None) -> float | str | None:
    """JSON has no infinity, which is the PSNR of identical images."""
    if value is None or math.isfinite(value):
        return value
    return str(value)


def _against_untuned(
    request: EvaluateRequest, values: Values, names: list[str]
) -> dict[str, dict[str, Any]]:
    """By distilled variant, its value over the untuned one's: below 1 is better for distances."""
    untuned = {v.setting: values[v.folder] for v in request.variants if v.kind == "untuned"}
    found: dict[str, dict[str, Any]] = {}
    for variant in request.variants:
        if variant.kind == "distilled":
            before, after = untuned[variant.setting], values[variant.folder]
            found[variant.label] = {
                name: round(after[name] / before[name], 4)
                for name in names
                if name in before and before[name] > 0 and math.isfinite(after[name] / before[name])
            }
    return found


def markdown(report: dict[str, Any]) -> str:
    """The table, what it was made with, what was left out and why, and how to read it."""
    settings, names = report["settings"], report["metrics"]
    heads = [f"{METRICS[name].title} {_ARROWS[METRICS[name].better]}" for name in names]
    lines = [
        f"| attention | {' | '.join([*heads, 'GFLOP / layer'])} |",
        f"|---|{'---|' * (len(heads) + 1)}",
    ]
    for row in report["rows"]:
        cells = [_cell(row[name], METRICS[name].digits) for name in names]
        gflop = f"{row['gflop_per_layer']:.4g}"
        lines.append(f"| {row['label']} | {' | '.join([*cells, gflop])} |")
    lines += [
        "",
        f"{settings['count']} images of {settings['height']} x {settings['width']} px each, "
        f"model {settings['model']}, prompts {settings['prompts']}, {settings['steps']} steps, "
        f"guidance {settings['guidance']:g}, seeds from {settings['seed']}, {settings['dtype']}.",
        "All values are against full attention from the same seeds, except those the first row has "
        "too.",
    ]
    lines += [_NOTES[name] for name in names if name in _NOTES]
    if report["distilled_against_untuned"]:
        lines += ["", "Distilled over untuned, as a factor:", ""]
        for label, ratios in report["distilled_against_untuned"].items():
            parts = [f"{METRICS[n].title} {ratio:.3g}" for n, ratio in ratios.items()]
            lines.append(f"- {label}: {', '.join(parts)}")
    if report["left_out"]:
        lines += ["", "Left out:", ""]
        lines += [f"- {METRICS[n].title}: {reason}." for n, reason in report["left_out"].items()]
    return "\n".join(lines) + "\n"


_NOTES = {
    "fid_demo": "fid_demo and kid_demo are FID and KID on the last hidden layer of the demo's own "
    "probe, trained on rendered images of its world: they compare with nothing published.",
    "output_mse": "output MSE: between the transformer's predictions and the teacher's, at noise "
    f"levels {', '.join(map(str, LEVELS))} of the first {IMAGES} (or all) of the teacher's own "
    "final latents.",
    "attributes": "attributes: those named in the prompts that the demo's probe sees in the image.",
}


def _cell(value: float | str | None, digits: int) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.{digits}f}"
