"""What step caches save on the demo, and what they cost: skipped work, seconds, PSNR.

    python benchmarks/caches.py --out caches.json

One image for each of a few held-out prompts, without any cache and with each, one pass a step: at
512 px by full attention, and at 1024 px by a cascade whose last stage has CLEAR, with its distilled
weights (r=8) and with far keys. PSNR is against the same call's image without a cache. "blocks" and
"attention" are the shares of the transformer's feed-forward and attention layers that were not
computed, counted where they are, in all stages; "last" those of the last stage alone. MagCache's
ratios are found first, by its own calibration on one call at 512 px with another prompt. cache-dit
takes part where it is installed.

Nothing is printed unless the image without a cache is the same, byte for byte, before all caches
and after them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

from clear_dit import apply_clear
from clear_dit.bench.timing import hardware
from clear_dit.evaluation.request import evaluation_prompts
from clear_dit.generation.models import load_pipeline
from clear_dit.tables import table
from clear_dit.weights.known import known_weights

RADIUS = 8
# Sides in pixels, and how CLEAR is applied.
CALLS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "512 px, full": (512, None),
    f"1024 px, r={RADIUS}": (1024, {"weights": known_weights("demo", RADIUS, 1)}),
    f"1024 px, r={RADIUS} far": (1024, {"far": True}),
}


def pipeline_says() -> float:
    """In the place of a timestep, which `CLEARPipeline` tells these caches itself."""
    raise AssertionError


def diffusers_caches(ratios: list[float]) -> dict[str, Any]:
    """Configurations by what the table says of them."""
    steps = len(ratios)
    asks = {"current_timestep_callback": pipeline_says}
    return {
        **{f"FirstBlock {x}": FirstBlockCacheConfig(threshold=x) for x in (0.05, 0.1, 0.2)},
        **{
            f"Mag {x}": MagCacheConfig(threshold=x, mag_ratios=ratios, num_inference_steps=steps)
            for x in (0.06, 0.24)
        },
        **{
            f"TaylorSeer every {n}": TaylorSeerCacheConfig(cache_interval=n) for n in (2, 4)
        },
        "PAB every 2": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, **asks
        ),
        "FasterCache every 2": FasterCacheConfig(is_guidance_distilled=True, **asks),
    }  # fmt: skip


@contextlib.contextmanager
def cached(pipe: Any, config: Any) -> Iterator[None]:
    """Within it the transformer has a cache; None is none, a number is cache-dit's threshold."""
    if config is None:
        yield
    elif isinstance(config, float):
        import cache_dit

        with contextlib.redirect_stdout(io.StringIO()):
            settings = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=config
            )
            cache_dit.enable_cache(pipe.transformer, cache_config=settings)
        yield
        cache_dit.disable_cache(pipe.transformer)
    else:
        pipe.transformer.enable_cache(config)
        yield
        pipe.transformer.disable_cache()


@contextlib.contextmanager
def counted(pipe: Any) -> Iterator[Counter[tuple[str, str]]]:
    """How often feed-forward and attention layers run within it, by stage."""
    found, model = Counter[tuple[str, str]](), pipe.transformer

    def watch(layer: torch.nn.Module, kind: str) -> Any:
        def count(*_: Any) -> None:
            found[pipe.stage.name, kind] += 1

        return layer.register_forward_hook(count)

    double, single = model.transformer_blocks, model.single_transformer_blocks
    hooks = [
        *(watch(block.attn.to_q, "attention") for block in (*double, *single)),
        *(watch(block.ff, "blocks") for block in double),
        *(watch(block.proj_mlp, "blocks") for block in single),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def generate(pipe: Any, prompt: str, seed: int, size: int, steps: int) -> torch.Tensor:
    images: torch.Tensor = pipe(
        prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return images


def calibrated(pipe: Any, prompt: str, steps: int) -> list[float]:
    """MagCache's ratios of a whole schedule at the native size, which it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), cached(pipe, MagCacheConfig(calibrate=True)):
        generate(pipe, prompt, 0, pipe.native_size, steps)
    ratios: list[float] = ast.literal_eval(said.getvalue().strip().splitlines()[-1])
    assert len(ratios) == steps
    return ratios


def measure(
    calls: list[str], count: int, steps: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """What `main` prints, of some of CALLS.

    Raises:
        RuntimeError: the image without a cache is not the same twice.
    """
    device = torch.device("cpu")

    def load() -> Any:
        pipe = load_pipeline("demo", torch.float32, device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    *prompts, other = evaluation_prompts("demo", count + 1)
    ratios = calibrated(load(), other, steps)
    caches: dict[str, Any] = {"none": None} | diffusers_caches(ratios)
    if find_spec("cache_dit") is not None:
        caches |= {f"cache-dit {x}": x for x in (0.08, 0.24)}
    caches["none again"] = None
    rows = []
    for call in calls:
        # cache-dit leaves a forward of its own, which diffusers' caches do not run with.
        pipe, (size, clear) = load(), CALLS[call]
        if clear is not None:
            apply_clear(pipe, radius=RADIUS, **clear)
        plain: list[torch.Tensor] = []
        everything = Counter[tuple[str, str]]()
        for name, config in caches.items():
            progress(f"{call}, {name}")
            images, seconds = [], []
            with cached(pipe, config), counted(pipe) as ran:
                for seed, prompt in enumerate(prompts):
                    begin = time.perf_counter()
                    images.append(generate(pipe, prompt, seed, size, steps))
                    seconds.append(time.perf_counter() - begin)
            plain, everything = plain or images, everything or ran
            same = all(map(torch.equal, images, plain))
            if config is None and not same:
                raise RuntimeError(f"{call}: the image without a cache is not the same twice")
            pairs = zip(images, plain, strict=True)
            found = [float(peak_signal_noise_ratio(*pair, 1.0)) for pair in pairs]
            rows.append({
                "call": call, "cache": name,
                **{kind: skipped(ran, everything, kind) for kind in ("blocks", "attention")},
                "last": skipped(ran, everything, "attention", f"{size}x{size}"),
                "s": statistics.median(seconds),
                "psnr": None if same else statistics.mean(found),
            })  # fmt: skip
    return {
        "rows": rows, "mag_ratios": ratios, "count": count, "steps": steps, "dtype": "float32",
        "hardware": hardware(device), "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }  # fmt: skip


def skipped(
    ran: Counter[tuple[str, str]],
    everything: Counter[tuple[str, str]],
    kind: str,
    stage: str | None = None,
) -> float:
    """Share of layers of a kind that did not run; of all stages where None."""
    part, whole = (
        sum(n for (name, what), n in one.items() if what == kind and stage in (None, name))
        for one in (ran, everything)
    )
    return 1 - part / whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1, help="prompts")
    parser.add_argument("--steps", type=int, default=28, help="of a whole schedule")
    parser.add_argument("--only", nargs="*", default=[""], help="calls whose name has one of these")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    options = parser.parse_args()
    calls = [name for name in CALLS if any(part in name for part in options.only)]
    with tqdm(bar_format="{desc} ({elapsed})") as bar:
        result = measure(calls, options.count, options.steps, bar.set_description)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"]))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
