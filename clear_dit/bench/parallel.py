"""A denoising step whose image ranks share, measured: computing, waiting for others, bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..counting.flops import config_of, count_flops
from ..counting.inputs import Random, model_inputs
from ..errors import RequestError, first_line
from ..families.table import transformer_of
from ..generation.checks import find_impl, find_window
from ..generation.denoising import text_length
from ..generation.models import find_model, load_pipeline
from ..plugin import apply_clear
from .step import output_of, relative_error, step_report, verdict

if TYPE_CHECKING:
    from ..pipelines.parallel.start import Ranks

# Size and number of the messages whose rate is measured, and number of those of one byte.
_LARGE, _LARGE_COUNT, _SMALL_COUNT = 2**25, 4, 50


def measure(
    model: str,
    height: int,
    width: int,
    radius: int,
    far: bool,
    impl: str,
    dtype: torch.dtype,
    ranks: Ranks,
    repeats: int,
) -> dict[str, Any]:
    """Check, then time one forward pass of the transformer: on the first rank, then shared by all.

    Args:
        height, width: in pixels; radius in tokens.
        far: with far keys.
        ranks: all of which call this.

    Returns:
        On every rank: rows with rank, seconds, compute_seconds, communication_seconds (what is not
        hidden behind computing), mb_per_layer; alone_seconds; `efficiency`, of all ranks against
        one; `rates`, see `Rates`; `correct`.
    """
    device = ranks.device
    side = find_model(model).token_pixels
    window = find_window(height, width, radius, token_pixels=side, far=far)
    name = find_impl(impl, dtype, device)
    pipe = load_pipeline(model, dtype, device, text_encoders=False)
    apply_clear(pipe, radius=radius, far=far, impl=impl)
    transformer: Any = transformer_of(pipe, "bench parallel")
    window = replace(window, text_length=text_length(pipe))
    inputs = model_inputs(transformer, window, Random(dtype, device))

    @torch.no_grad()
    def step() -> torch.Tensor:
        try:
            out = output_of(transformer, inputs)
        except ValueError as error:  # such as a size past the positions
            raise RequestError(first_line(error)) from error
        _synchronize(device)
        return out

    alone, expected = 0.0, None
    if ranks.is_first:
        expected = step()
        alone = statistics.median(_seconds(step) for _ in range(repeats))
    ranks.process_group.gather(None)  # the others wait
    pipe.enable_patch_parallel(ranks.mesh)
    assert pipe.patch_parallel is not None
    traffic = pipe.patch_parallel.traffic
    shared = step()
    error = 0.0
    if expected is not None:
        error = relative_error(shared, expected)
    traffic.time_waits(device)
    times, waits = [], []
    for _ in range(repeats):
        ranks.process_group.gather(None)
        before = traffic.seconds_waited()
        times.append(_seconds(step))
        waits.append(traffic.seconds_waited() - before)
    row = {
        "rank": ranks.rank,
        "seconds": statistics.median(times),
        "compute_seconds": statistics.median(
            total - wait for total, wait in zip(times, waits, strict=True)
        ),
        "communication_seconds": statistics.median(waits),
        "mb_per_layer": traffic.per_layer() / 1e6,
    }
    everyone = ranks.process_group.gather([row, alone, error, _link(ranks)])
    seconds = max(row["seconds"] for row, *_ in everyone)
    alone, error = everyone[0][1], everyone[0][2]
    gbps, latency = (statistics.median(link[n] for *_, link in everyone) for n in (0, 1))
    tflop = count_flops(config_of(transformer), window)["rows"][1]["total_tflop"]
    return {
        "rows": [row for row, *_ in everyone],
        "alone_seconds": alone,
        "speedup": alone / seconds,
        "efficiency": alone / seconds / len(everyone),
        "rates": {"tflops": tflop / alone, "gbps": gbps, "latency": latency},
        "model": model,
        "height": height,
        "width": width,
        "radius": radius,
        "far": far,
        "impl": name,
        **verdict(error, dtype, device),
    }


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _link(ranks: Ranks) -> tuple[float, float]:
    """GB/s of large messages and microseconds of small ones, both ways at once, between pairs."""
    count = len(ranks.members)
    partner = ranks.rank ^ 1
    if partner == count:  # of an odd number the last is left over
        partner = ranks.rank
    found = []
    for size, repeats in ((1, _SMALL_COUNT), (_LARGE, _LARGE_COUNT)):
        outgoing = torch.zeros(size, dtype=torch.uint8, device=ranks.device)
        incoming = torch.empty_like(outgoing)
        for number in range(repeats + 1):
            if number == 1:  # warm
                _synchronize(ranks.device)
                start = time.perf_counter()
            if partner != ranks.rank:
                operations = [
                    dist.P2POp(dist.isend, outgoing, partner),
                    dist.P2POp(dist.irecv, incoming, partner),
                ]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
        _synchronize(ranks.device)
        found.append((time.perf_counter() - start) / repeats)
    return _LARGE / found[1] / 1e9, found[0] * 1e6


def report(result: dict[str, Any]) -> str:
    """The table of a measurement."""
    rates = result["rates"]
    return step_report(
        result,
        f"{result['speedup']:.2f} times as fast as one rank ({result['alone_seconds']:.4g} s), "
        f"efficiency {result['efficiency']:.1%}; a rank does {rates['tflops']:.3g} TFLOP/s, "
        f"{rates['gbps']:.3g} GB/s, {rates['latency']:.3g} microseconds a message",
    )
