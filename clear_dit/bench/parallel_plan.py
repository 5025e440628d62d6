"""What sharing an image among 2 to 64 ranks will take, from rates, by three ways of sharing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Any

import torch

from ..counting.fake import build, defaults
from ..counting.pass_flops import PassFlops
from ..generation.checks import find_window
from ..kernels.window import Window
from ..tables import table
from .configurations import find_configuration
from .parallel_bytes import Layer, halo_bytes, ring_bytes, ulysses_bytes
from .published import Configuration

RANKS = (1, 2, 4, 8, 16, 32, 64)
BFLOAT16 = 2


@dataclass(frozen=True)
class Rates:
    """What a rank does.

    Attributes:
        tflops: 10^12 floating-point operations a second.
        gbps: 10^9 bytes a second that it sends.
        latency: microseconds that a message takes besides.
    """

    tflops: float
    gbps: float
    latency: float


# About what an H100 reaches in bfloat16, and NVLink between eight of them.
ASSUMED = Rates(tflops=400, gbps=200, latency=20)


def plan_parallel(
    model: str, sides: Sequence[int], radius: int, far: bool, rates: Rates
) -> dict[str, Any]:
    """Bytes, seconds a step and efficiency, with CLEAR's attention in bfloat16.

    Seconds are those of the products' FLOPs and of the messages one after the other, nothing of it
    hidden; `overlapped_seconds` the longer of both, as if everything were. Patch parallelism
    computes the text on every rank, and keys and values of the halo twice; that is counted. To
    Ulysses and ring attention, which know no windows, the same sparse attention is granted.

    Args:
        model: a name or a folder, see `find_configuration`.
        sides: of square images, in pixels.
        radius: in tokens.
        far: with far keys.

    Returns:
        rows with side (pixels), ranks, way ("halo", "ulysses", "ring"), mb_per_layer,
        compute_seconds, communication_seconds, seconds, overlapped_seconds, efficiency; those that
        do not exist are None; `rates`, `model`, `radius`, `far`.

    Raises:
        RequestError: an unknown model, a side or a radius out of its range.
    """
    configuration = find_configuration(model)
    flops = PassFlops.of(configuration.transformer, configuration.text_length)
    output_channels = _token_channels(configuration)
    rows: list[dict[str, Any]] = []
    for side in sides:
        window = find_window(
            side,
            side,
            radius,
            1,
            configuration.text_length,
            configuration.token_pixels,
            far=far,
        )
        costs = _Costs(window, flops, output_channels)
        alone = costs.flops_alone / (rates.tflops * 1e12)
        for ranks in RANKS:
            if ranks <= window.height:
                rows += [
                    {"side": side, "ranks": ranks, **row}
                    for row in _ways(costs, ranks, rates, alone)
                ]
    setting = {"model": model, "radius": radius, "far": far}
    return {"rows": rows, "rates": asdict(rates), **setting}


@dataclass(frozen=True)
class _Costs:
    """Of one forward pass.

    Attributes:
        window: of the image.
        flops: of the model.
        output_channels: numbers that it makes of an image token, which all ranks gather once a
            step.
    """

    window: Window
    flops: PassFlops
    output_channels: int

    @property
    def layer(self) -> Layer:
        """One of attention."""
        window, flops = self.window, self.flops
        return Layer(
            window.height,
            window.width,
            window.text_length,
            window.radius,
            flops.heads,
            flops.head_dim,
            BFLOAT16,
            far=window.far_levels > 0,
        )

    @property
    def flops_alone(self) -> float:
        return self.flops.local(self.window)

    def flops_of_band(self, ranks: int) -> float:
        """Of the largest band, with its halo's keys and values."""
        window, channels = self.window, self.flops.heads * self.flops.head_dim
        rows = ceil(window.height / ranks)
        halo_rows = min(2 * window.reach, window.height - rows)
        seen = sum(window.far_pairs()) if window.far_levels else window.disc_pairs()
        of_layer = 4 * seen * rows / window.height * channels
        halo = 2 * 2 * channels**2 * halo_rows * window.width
        return self.flops.linear(rows * window.width) + self.flops.layers * (of_layer + halo)


def _token_channels(configuration: Configuration) -> int:
    """Numbers of an image token's latents."""
    from ..pipelines.decoding.segments import latent_channels

    with defaults(torch.bfloat16, "meta"):
        autoencoder = build(configuration.autoencoder)
    return latent_channels(autoencoder) * configuration.latents_of_token**2


def _ways(costs: _Costs, ranks: int, rates: Rates, alone: float) -> list[dict[str, Any]]:
    shared = costs.flops_alone / ranks
    # The halo, and what the ranks pool; then two all-reduces of the text, in a tree.
    in_a_row = (2 if costs.layer.far else 1) + 4 * log2(ranks)
    ways: list[tuple[str, int | None, float, float]] = [
        ("halo", halo_bytes(costs.layer, ranks), costs.flops_of_band(ranks), in_a_row),
        ("ulysses", ulysses_bytes(costs.layer, ranks), shared, 4),
        ("ring", ring_bytes(costs.layer, ranks), shared, ranks - 1),
    ]
    if ranks == 1:
        ways = [("one rank", 0, shared, 0)]
    gathered = costs.window.image_length * costs.output_channels * BFLOAT16 * (ranks - 1) // ranks
    rows = []
    for way, sent, flops, messages in ways:
        row: dict[str, Any] = {"way": way, "mb_per_layer": None if sent is None else sent / 1e6}
        if sent is None:
            names = ("compute_seconds", "communication_seconds", "seconds", "overlapped_seconds")
            rows.append(row | dict.fromkeys((*names, "efficiency")))
            continue
        compute = flops / (rates.tflops * 1e12)
        sending = (costs.flops.layers * sent + gathered) / (rates.gbps * 1e9)
        sending += costs.flops.layers * messages * rates.latency / 1e6
        rows.append(
            row
            | {
                "compute_seconds": compute,
                "communication_seconds": sending,
                "seconds": compute + sending,
                "overlapped_seconds": max(compute, sending),
                "efficiency": alone / ranks / (compute + sending),
            }
        )
    return rows


def report(result: dict[str, Any]) -> str:
    """The tables of a plan, one for each size."""
    rates, sees = result["rates"], ", far keys" if result["far"] else ""
    parts = [
        f"{result['model']}, CLEAR with radius {result['radius']} tokens{sees}, bfloat16, batch 1, "
        f"one forward pass;\neach rank {rates['tflops']:.4g} TFLOP/s, {rates['gbps']:.4g} GB/s, "
        f"{rates['latency']:.3g} microseconds a message"
    ]
    for side in dict.fromkeys(row["side"] for row in result["rows"]):
        rows = [
            {
                "ranks": row["ranks"],
                "way": row["way"],
                "MB sent a layer": row["mb_per_layer"],
                "compute s": row["compute_seconds"],
                "messages s": row["communication_seconds"],
                "step s": row["seconds"],
                "overlapped s": row["overlapped_seconds"],
                "efficiency": row["efficiency"],
            }
            for row in result["rows"]
            if row["side"] == side
        ]
        parts.append(f"\n{side} x {side} px\n{table(rows)}")
    parts.append("\n-: Ulysses gives every rank whole heads; they do not divide.")
    return "\n".join(parts)
