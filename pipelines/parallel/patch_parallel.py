"""One image on many GPUs, exactly: every rank holds a band of its rows.

    with start_ranks() as ranks:
        pipe = CLEARFluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev").to(ranks.device)
        apply_clear(pipe, radius=16)
        pipe.enable_patch_parallel(ranks.mesh)
        image = pipe("a fox", height=8192, width=8192, generator=torch.Generator().manual_seed(0))

Every rank runs this with the same arguments, and gets the same image: noise is drawn whole from
the seed, and the latents are whole on every rank between steps. Within the transformer a rank has
its band, all layers but attention being per token. In attention it gets the radius - 1 rows beside
its band from the neighbours, while it computes what does not need them; with far keys radius rows,
and about as many rows of the cells of every level. The authors of CLEAR
average the text's outputs over the ranks (arXiv 2412.16112); here they are merged by their
log-sum-exp: what all ranks compute together is what one would, but for rounding.

Stages with full attention (the first of a cascade, at the native size) run whole on every rank.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from clear_dit.attention.layout import Layout
from clear_dit.attention.processor import CLEARProcessor
from clear_dit.families.table import attention_layers, family_of, transformer_of
from clear_dit.kernels.numbers import integer
from clear_dit.weights.state import Call, ClearState

from .attention import SharedImage
from .bands import Bands
from .caches import SharedDecisions
from .cutting import cut_arguments, cut_inside
from .exchange import Gathered, Traffic

logger: logging.Logger = logging.getLogger(__name__)

WHO = "patch parallel"
DIMENSIONS = ("guidance", "patch")


def parallelize(
    pipe_or_model: Any, mesh: DeviceMesh, stale_halos_after: int | None = None
) -> PatchParallel:
    """Share every image that a transformer under CLEAR generates among the ranks of a mesh.

    `CLEARFluxPipeline.enable_patch_parallel` does this and more; this is for stock pipelines.
    Every rank must call it, and the model, with the same arguments. ControlNets run whole on
    every rank.

    Args:
        pipe_or_model: a pipeline with a transformer of a family, or that, under `apply_clear`.
        mesh: with a dimension "patch", from the top of the image to the bottom.
        stale_halos_after: None is exact. A number of steps, at least 1, is an approximation
            (DistriFusion, arXiv 2402.19481): after so many steps every layer takes the neighbours'
            rows from the step before, so that nothing waits for them. Text, pooled keys and far
            keys stay exact.

    Returns:
        The handle: its `traffic` counts what this rank sent, its `remove()` ends the sharing.

    Raises:
        ValueError: CLEAR is not applied, a mesh that does not fit, or a setting out of its range.
    """
    model = transformer_of(pipe_or_model, "parallelize")
    clear = ClearState.on(model)
    if clear is None or clear.tracker is None:
        raise ValueError(
            f"{WHO}: the image is shared by way of local attention, and the transformer has "
            "full attention; call apply_clear first."
        )
    patches = PatchParallel(mesh, stale_halos_after)
    if patches.guidance_ranks > 1:
        raise ValueError(
            f"{WHO}: a mesh with {patches.guidance_ranks} guidance ranks needs CLEARFluxPipeline's "
            "enable_patch_parallel; a stock pipeline runs both passes itself."
        )
    patches.attach(model)
    return patches


class PatchParallel:
    """The ranks that share images, as one of them sees it; `ClearState.sharing` of a transformer.

    Args:
        mesh: of dimensions "patch" and, optionally, "guidance" of size 1 or 2: its first half
            computes the pass with the prompt, the second that with the negative prompt.
        stale_halos_after: see `parallelize`.

    Attributes:
        traffic: what this rank sent so far, and how many layers it computed.

    Raises:
        ValueError: other dimensions or sizes, or a setting out of its range.
    """

    def __init__(self, mesh: DeviceMesh, stale_halos_after: int | None = None) -> None:
        names = mesh.mesh_dim_names or ()
        if "patch" not in names or not set(names) <= set(DIMENSIONS):
            raise ValueError(
                f"{WHO}: the mesh must have the dimension 'patch' and may have 'guidance', got "
                f"{names or 'no names'}; see start_ranks."
            )
        sizes = dict(zip(names, mesh.shape, strict=True))
        self.guidance_ranks: int = sizes.get("guidance", 1)
        if self.guidance_ranks > 2:
            raise ValueError(
                f"{WHO}: guidance has two passes, so the mesh's 'guidance' must be 1 or 2, got "
                f"{self.guidance_ranks}."
            )
        if stale_halos_after is not None:  # the first step has none before it
            stale_halos_after = integer(f"{WHO}: stale_halos_after", stale_halos_after, 1)
        self.group: ProcessGroup = mesh.get_group("patch")
        self.guidance_group: ProcessGroup | None = (
            mesh.get_group("guidance") if self.guidance_ranks > 1 else None
        )
        self.stale_halos_after = stale_halos_after
        self.traffic: Traffic = Traffic()
        self._guidance_scale: float | None = None
        self._decisions = SharedDecisions(self.group)
        self._shares: dict[tuple[Layout, int, int, int], SharedImage] = {}
        self._steps = _Steps()

    @property
    def groups(self) -> list[ProcessGroup]:
        """Of the ranks that share rows with this one, and of those that share guidance."""
        return [self.group] + ([] if self.guidance_group is None else [self.guidance_group])

    @property
    def ranks(self) -> int:
        """Number of ranks that share an image's rows."""
        return self.group.size()

    def attach(self, model: nn.Module) -> None:
        """Share what a transformer generates from now on.

        Raises:
            ValueError: it is shared already.
        """
        state = ClearState.attach(model)
        if state.sharing is not None:
            raise ValueError(
                f"{WHO}: the transformer's images are shared already; call remove() on what "
                "parallelize returned, or disable_patch_parallel(), first."
            )
        state.sharing, self._model = self, model

    def remove(self) -> None:
        """Share nothing any more."""
        self._decisions.remove(self._model)
        state = ClearState.on(self._model)
        if state is not None and state.sharing is self:
            state.sharing = None

    def check(self, rows: int) -> None:
        """Refuse an image of fewer rows of tokens than ranks, with a ValueError."""
        Bands(rows, self.ranks, self.group.rank(), 0)

    @contextmanager
    def one_pass(self, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Within it this rank's options for `FluxPipeline.__call__`: one pass, where ranks share.

        Raises:
            ValueError: there are guidance ranks, but no second pass, or one with image prompts.
        """
        if self.guidance_group is None:
            yield options
            return
        negative = {name: options[name] for name in options if name.startswith("negative_")}
        scale = options["true_cfg_scale"]
        if scale <= 1 or negative.get("negative_prompt_embeds") is None:
            raise ValueError(
                f"{WHO}: guidance ranks need two passes: true_cfg_scale over 1 and a "
                "negative_prompt; or use a mesh without 'guidance'."
            )
        if any("ip_adapter" in name and value is not None for name, value in options.items()):
            raise ValueError(
                f"{WHO}: guidance ranks do not take image prompts (IP-adapters); use a mesh "
                "without 'guidance'."
            )
        own = {name: value for name, value in options.items() if name not in negative}
        if self.guidance_group.rank() == 1:
            own |= {name.removeprefix("negative_"): value for name, value in negative.items()}
        self._guidance_scale = scale
        try:
            yield own | {"true_cfg_scale": 1.0}
        finally:
            self._guidance_scale = None

    @contextmanager
    def unguided(self) -> Iterator[None]:
        """Within it outputs are of the pass with the prompt alone, on all guidance ranks."""
        scale = self._guidance_scale
        self._guidance_scale = None if scale is None else 1.0
        try:
            yield
        finally:
            self._guidance_scale = scale

    @torch.compiler.disable
    def before(
        self, model: nn.Module, call: Call | None, given: dict[str, Any]
    ) -> tuple[dict[str, Any], SharedImage | None]:
        """This rank's band of the transformer's inputs, and the image that they are of.

        Args:
            call: what the arguments say; None where CLEAR does not run.
            given: the arguments, by name.

        Raises:
            ValueError: what cannot be shared.
        """
        share = None
        if call is not None:
            _refuse_other_processors(model)
            share = self._shared(call)
            self._announce_step(share, family_of(model).cut.time(given))
        if share is not None and torch.is_grad_enabled():
            raise ValueError(f"{WHO} has no backward pass; use torch.no_grad().")
        self._decisions.follow(model, None if share is None else share.layout.image_length)
        if share is None:
            _announce_whole()
            return given, None
        return cut_arguments(model, share, given), share

    def cut(self, model: nn.Module, share: SharedImage) -> AbstractContextManager[None]:
        """Within it a forward of the transformer has this rank's tokens; see `Family.cut`."""
        return cut_inside(model, share)

    def _shared(self, call: Call) -> SharedImage:
        tracker, layout = call.tracker, call.forward.layout
        if layout.local_references:
            raise ValueError(
                f"{WHO} does not share reference images that are local within themselves; call "
                "apply_clear with references='dense'."
            )
        if tracker.pooled_weight != "one":
            raise ValueError(
                f"{WHO} does not share pooled keys that weigh as their tokens; call apply_clear "
                "with pooled_weight='one', or with down_factor=1 and far=True."
            )
        if not tracker.radii.is_plain:
            raise ValueError(
                f"{WHO} shares one radius for all layers and noise levels, got {tracker.radii}; "
                "call apply_clear with one radius, and without a schedule."
            )
        key = (layout, tracker.radii.base, tracker.down_factor, tracker.far_levels)
        if key not in self._shares:
            for share in self._shares.values():
                share.forget_halos()
            # Two passes of guidance may have texts of two lengths.
            self._shares = {
                other: share for other, share in self._shares.items() if other[0][1:] == layout[1:]
            }
            self._shares[key] = SharedImage(
                *key, self.group, self.traffic, keeps_halos=self.stale_halos_after is not None
            )
        self._shares[key].begin_forward()
        return self._shares[key]

    def _announce_step(self, image: SharedImage, time: torch.Tensor) -> None:
        if self.stale_halos_after is None:
            return
        if self._steps.count(float(time.flatten()[0])):
            for share in self._shares.values():
                share.forget_halos()
        image.forward_pass = self._steps.forward_pass
        image.stale = self._steps.step >= self.stale_halos_after

    @torch.compiler.disable
    def after(self, output: Any) -> Any:
        """The output on every rank, of both passes where ranks share those."""
        if self._guidance_scale is None:
            return output
        assert self.guidance_group is not None
        is_tuple = isinstance(output, tuple)
        sample = output[0] if is_tuple else output.sample
        both = Gathered(sample, self.guidance_group, self.traffic, "guidance").wait()
        sample = both[0]
        if self._guidance_scale != 1:
            sample = both[1] + self._guidance_scale * (both[0] - both[1])
        return (sample, *output[1:]) if is_tuple else type(output)(sample=sample)


@functools.cache
def _announce_whole() -> None:
    logger.info("full attention is not shared: every rank computes the whole image")


def _refuse_other_processors(model: nn.Module) -> None:
    for name, attn in attention_layers(model).items():
        if not isinstance(attn.processor, CLEARProcessor):
            raise ValueError(
                f"{WHO}: {name} has a {type(attn.processor).__name__}, which would see this rank's "
                "rows only; call apply_clear again, or remove_clear for full attention everywhere."
            )


class _Steps:
    """Counts the steps of an image, and the forward passes of a step, by their timesteps."""

    def __init__(self) -> None:
        self.step = self.forward_pass = 0
        self._timestep: float | None = None

    def count(self, timestep: float) -> bool:
        """Count a forward; whether another image begins with it."""
        last, self._timestep = self._timestep, timestep
        if last is not None and timestep == last:
            self.forward_pass += 1
            return False
        self.forward_pass = 0
        begins = last is None or timestep > last
        self.step = 0 if begins else self.step + 1
        return begins
