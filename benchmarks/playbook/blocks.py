"""A double and a single FLUX block with random weights, full attention against CLEAR, and the step
of the whole model that follows: 19 double blocks and 38 single ones.

The only part that needs diffusers. CLEAR's attention was right at the same size and radius first,
in the same process: within a block nothing tells.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from clear_dit.bench.attention import local_lse, sampled_errors
from clear_dit.bench.step import TOLERANCE
from clear_dit.bench.timing import time_in_turn
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window
from clear_dit.memory import peak_mb, reset_peak

from .check_kinds import poisoned
from .entries import entry_of
from .part_file import PartFile
from .pin import pinned
from .setting import Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """Checked on a small grid, then every size from the smallest."""
    if find_spec("diffusers") is None:
        reason = "needs the package diffusers, which is not installed: gpu.py says how to carry it"
        return [Task("diffusers", lambda: iter([{"skipped": reason}]))]
    make = functools.cache(partial(Blocks, setting))
    # Full attention, CLEAR, and one CLEAR step by step.
    variants = [(None, True), *((radius, True) for radius in setting.radii)]
    variants.append((setting.radii[0], False))
    return [
        Task("past the diagonal", lambda: _check(make(), setting)),
        *(
            Task(
                f"{size} px {'full' if radius is None else f'r={radius}'}{' stock' * (not fused)}",
                partial(_time, make, setting, size, radius, fused),
            )
            for size in setting.sizes
            for radius, fused in variants
        ),
    ]


@contextmanager
def _fused(on: bool, device: torch.device) -> Iterator[None]:
    """Whether the processor may norm and rotate by the fused kernel."""
    from clear_dit.attention import norm_rope

    before = norm_rope.FUSED_DEVICES
    norm_rope.FUSED_DEVICES = (device.type if on else "none",)
    try:
        yield
    finally:
        norm_rope.FUSED_DEVICES = before


class Blocks:
    """One double and one single block with random weights, and inputs of one image."""

    def __init__(self, setting: Setting) -> None:
        from diffusers import FluxTransformer2DModel

        config = setting.transformer | {"num_layers": 1, "num_single_layers": 1}
        torch.manual_seed(0)
        with torch.device(setting.device):
            self.model = FluxTransformer2DModel.from_config(config).to(setting.dtype).eval()
        self.setting = setting
        self.stock = self.model.attn_processors

    def inputs(self, window: Window) -> dict[str, Any]:
        """Arguments of both blocks; the rotary tables are the model's own."""
        width, device = self.model.inner_dim, self.setting.device
        ids = torch.zeros(window.sequence_length, 3, device=device)
        token = torch.arange(window.image_length, device=device)
        ids[window.text_length :, 1] = token // window.width
        ids[window.text_length :, 2] = token % window.width
        image, text, time_embedding = (
            torch.randn(*shape, width, device=device).to(self.setting.dtype)
            for shape in ((1, window.image_length), (1, window.text_length), (1,))
        )
        return {
            "hidden_states": image,
            "encoder_hidden_states": text,
            "temb": time_embedding,
            "image_rotary_emb": self.model.pos_embed(ids),
        }

    def attend(self, radius: int | None) -> None:
        """Full attention by diffusers where `radius` is None, else CLEAR."""
        from clear_dit import CLEARProcessor

        if radius is None:
            self.model.set_attn_processor(dict(self.stock))
        else:
            self.model.set_attn_processor(CLEARProcessor(radius, impl=self.setting.impl, far=False))

    def run(self, block: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, image) after a block, "double" or "single"."""
        blocks = {
            "double": self.model.transformer_blocks,
            "single": self.model.single_transformer_blocks,
        }
        with torch.no_grad():
            return blocks[block][0](**inputs)

    def error(self, fused: bool) -> float:
        """Largest relative error of CLEAR past the diagonal to full attention, on a small grid."""
        inputs = self.inputs(Window(8, 12, self.setting.text_length, 20))
        errors = []
        with _fused(fused, self.setting.device):
            for block in ("double", "single"):
                self.attend(None)
                full = self.run(block, inputs)
                self.attend(20)
                for ours, theirs in zip(self.run(block, inputs), full, strict=True):
                    errors.append((ours - theirs).float().norm() / theirs.float().norm())
        return float(torch.stack(errors).max())


def _check(both: Blocks, setting: Setting) -> Iterator[dict[str, Any]]:
    for fused in (True, False):
        with pinned(entry_of(setting, setting.impl, setting.radii[0])):
            error = both.error(fused)
        row = {"fused": fused, "error": error}
        yield row if error <= TOLERANCE[setting.dtype] else row | {"problem": "wrong"}


def _time(
    make: Any, setting: Setting, size: int, radius: int | None, fused: bool
) -> Iterator[dict[str, Any]]:
    """A row of both blocks and of the step, if what runs in them was found right."""
    wrong = PartFile(setting.folder, "blocks").read().problems.get("past the diagonal")
    if radius is not None and wrong is None:
        wrong = PartFile(setting.folder, "production").read().problems.get(f"r={radius}")
    entry = entry_of(setting, setting.impl, radius)
    row = {"size": size, "radius": radius, "entry": entry}
    with pinned(entry):
        if radius is not None and wrong is None:
            wrong = why_wrong(setting, size, radius)
        if wrong is not None:
            yield row | {"problem": f"not timed, for a check failed: {wrong}"}
        else:
            yield row | _block_row(make(), size, radius, fused)


def why_wrong(setting: Setting, size: int, radius: int) -> str | None:
    """How far CLEAR's attention is off on a sample of queries, if too far."""
    window = setting.window(size, radius)
    tensors = setting.problem(window).tensors()
    with poisoned():
        out = local_attention(*tensors, window, impl=setting.impl)
        assert isinstance(out, torch.Tensor)
        errors = sampled_errors(out, tensors, window, lse=local_lse(setting.impl, *tensors, window))
    return None if errors.right(setting.dtype) else f"wrong: {errors}"


def _block_row(both: Blocks, size: int, radius: int | None, fused: bool) -> dict[str, Any]:
    setting = both.setting
    row: dict[str, Any] = {"fused": fused}
    if radius is None:
        row["fused"] = None
    inputs = both.inputs(setting.window(size, radius or 1))
    long = radius is None and size == setting.sizes[-1]
    both.attend(radius)
    with _fused(fused, setting.device):
        for block in ("double", "single"):
            run = partial(both.run, block, inputs)
            run()
            reset_peak(setting.device)
            repeats = 1 if long else setting.repeats
            seconds = time_in_turn({block: run}, repeats, setting.device)[block]
            row[f"{block}_ms"] = seconds * 1e3
            row[f"{block}_peak_mb"] = peak_mb(setting.device)
    double, single = setting.layers
    row["step_s"] = (double * row["double_ms"] + single * row["single_ms"]) / 1e3
    return row
