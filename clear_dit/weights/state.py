"""What CLEAR remembers about a model it was applied to."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..access import Access
from ..attention.processor import CLEARProcessor
from ..attention.text_padding import valid_text
from ..attention.tracker import Forward, WindowTracker
from ..families.family import Family
from ..families.table import attention_layers, family_of, head_dim_of
from ..kernels.choice import select_impl
from ..kernels.triton.device import kernels_of
from .forward import STATE, is_bare, parameter_names, put_under, take_away
from .originals import Originals
from .reconcile import reconcile
from .saved import marked

logger: logging.Logger = logging.getLogger(__name__)

# What runs is not what the weights were made for.
FAR_WITH_LOCAL_WEIGHTS = (
    "far=True, but the CLEAR weights that are loaded were made for local attention: on the demo, "
    "r=4, 32 prompts, images are then 20.4 dB from full attention's, with the model's own weights "
    "27.9 dB. Leave out far, and they run as they were made; or run far keys without weights."
)
LOCAL_WITH_FAR_WEIGHTS = (
    "far=False, down_factor or a radius of 1 leaves far keys out, but the CLEAR weights that are "
    "loaded were made for them: on the demo, r=4, 32 prompts, images are then 17.8 dB from full "
    "attention's, with far keys 31.7 dB. Leave these settings out, and they run as they were made."
)
WITHOUT_LEARNED = (
    "the CLEAR weights that are loaded learned how far keys are pooled, but the processors set "
    "since then do not know; call apply_clear instead of set_attn_processor."
)


class Call(NamedTuple):
    """What the arguments of a forward say.

    Attributes:
        tracker: of the layers that run it.
        forward: what they share.
        impl: the implementation that runs it.
        changes: arguments that the forward gets in place of those given.
        is_local: whether CLEAR runs in it, not full attention.
    """

    tracker: WindowTracker
    forward: Forward
    impl: str
    changes: Mapping[str, Any]
    is_local: bool = True


class ClearState:
    """What CLEAR remembers about one model.

    Attributes:
        access: who uses the model, and who changes it.
        sharing: of a `PatchParallel`, what the ranks that share images do around a forward; else
            None.
        calls: one object for each call under way that changes the model in its forwards.
        tracker: shared by the processors of all layers; None while only weights were loaded.
        processors: those that were there before CLEAR, by layer name.
        installed: those of CLEAR, by layer name.
        given_up: names of layers that somebody gave other processors since then by this package's
            own means.
        originals: parameters as they were before CLEAR weights were loaded.
        weights_far: whether those CLEAR weights were made for far keys; None where there are none.
        learned: what they learned of far keys, on the CPU, by its name in a file.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.access: Access = Access()
        self.sharing: Any = None
        self.calls: set[object] = set()
        self.tracker: WindowTracker | None = None
        self.processors: dict[str, Any] = {}
        self.installed: dict[str, CLEARProcessor] = {}
        self.given_up: frozenset[str] = frozenset()
        self.originals: Originals = Originals()
        self.weights_far: bool | None = None
        self.learned: dict[str, torch.Tensor] = {}
        self._names = names
        self._said_of_far: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model is not shared, and in no call.
        return vars(self) | {"sharing": None, "calls": set()}

    @classmethod
    def on(cls, model: nn.Module) -> ClearState | None:
        """The state of a model, None if it has none."""
        return vars(model).get(STATE)

    @classmethod
    def attach(cls, model: nn.Module) -> ClearState:
        """The state of a model, a new one if it has none."""
        state = cls.on(model)
        if state is None:
            state = cls(parameter_names(model))
            entry = marked(model)
            if entry is not None:  # it came with CLEAR weights
                state.originals, state.weights_far = originals_of(model), entry["far"]
            setattr(model, STATE, state)
            put_under(model)
        elif is_bare(model):  # somebody has taken CLEAR's forward out
            put_under(model)
        return state

    @property
    def is_applied(self) -> bool:
        """Whether there is anything of CLEAR's on the model."""
        return self.tracker is not None or self.originals.loaded_here

    @property
    def is_idle(self) -> bool:
        """Whether forwards have nothing to do with CLEAR."""
        return not (self.is_applied or self.calls or self.sharing is not None)

    def forget(self) -> None:
        """What `remove_clear` leaves: the lock stays, for the threads that share the model."""
        self.tracker, self.processors, self.installed = None, {}, {}
        self.given_up = frozenset()

    def detach(self, model: nn.Module) -> None:
        """Leave the model, as if CLEAR had never been applied to it."""
        take_away(model)
        delattr(model, STATE)

    def restore_weights(self, model: nn.Module) -> None:
        """Put the original parameters back; see `Originals.put_back`."""
        self.originals.put_back(model, "remove_clear")
        self.learned.clear()
        self.weights_far = None

    @contextmanager
    def own_weights(self, model: nn.Module) -> Iterator[None]:
        """Within it a model that runs CLEAR has its CLEAR weights.

        Also where a stage of full attention, of this thread, has put the original ones back: not
        all forwards in between are the stage's, see `as_between_forwards`.
        """
        with ExitStack() as stack:
            if self.originals.are_back and _has_local(model):
                stack.enter_context(self.originals.away(model))
            yield

    @torch.compiler.disable
    def decide_far(self, model: nn.Module) -> None:
        """Tell the processors there are whether the loaded weights were made for far keys.

        Warns, once, where what runs is not what those were made for.
        """
        layers = attention_layers(model)
        for attn in layers.values():
            if isinstance(attn.processor, CLEARProcessor):
                attn.processor.decide_far(self.weights_far)
        first, message = next((attn.processor for attn in layers.values()), None), None
        if self.weights_far is not None and isinstance(first, CLEARProcessor):
            if first.has_far_keys != self.weights_far:
                message = LOCAL_WITH_FAR_WEIGHTS if self.weights_far else FAR_WITH_LOCAL_WEIGHTS
            elif self.learned and first.far_weight is None:
                message = WITHOUT_LEARNED
        if message not in (None, self._said_of_far):
            logger.warning(message)
        self._said_of_far = message

    def is_given_up(self, name: str, processor: Any) -> bool:
        """Whether a layer has this in the place of CLEAR's on purpose."""
        return name in self.given_up and not isinstance(processor, CLEARProcessor)

    def give_up(self, model: nn.Module) -> None:
        """The processors that layers have now in the place of CLEAR's are what somebody wants."""
        layers = attention_layers(model)
        others = {
            name: attn.processor
            for name, attn in layers.items()
            if name in self.installed and not isinstance(attn.processor, CLEARProcessor)
        }
        self.given_up = frozenset(others)
        if others:
            name, processor = next(iter(others.items()))
            logger.warning(
                "%d of %d attention layers no longer run CLEAR (%s has %s); remove_clear puts "
                "weights back too, apply_clear puts CLEAR back",
                len(others),
                len(layers),
                name,
                type(processor).__name__,
            )

    @torch.compiler.disable
    def prepare(self, model: nn.Module) -> None:
        """Before a forward: the layers as they ought to be.

        Raises:
            ValueError: a layer that ought to run CLEAR does not.
        """
        with self.access.shared():
            self.decide_far(model)  # processors set since then were not told
            if self._is_as_it_ought_to_be(model):
                return
        with self.access.exclusive():
            others = reconcile(self, model)
        if others:
            layers = attention_layers(model)
            kind = type(layers[others[0]].processor)
            raise ValueError(
                f"CLEAR: {len(others)} of {len(layers)} attention layers no longer have the "
                f"processor that apply_clear put there ({others[0]} has {kind.__module__}."
                f"{kind.__name__}); call remove_clear for full attention, or apply_clear again."
            )

    def _is_as_it_ought_to_be(self, model: nn.Module) -> bool:
        if not self.installed:
            return True
        layers = attention_layers(model)
        return layers.keys() == self.installed.keys() and all(
            attn.processor is self.installed[name] or self.is_given_up(name, attn.processor)
            for name, attn in layers.items()
        )

    @torch.compiler.disable
    def read(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call | None:
        """What a forward's arguments say; None where no layer of the model runs CLEAR in it.

        Raises:
            ValueError: a size that the family cannot have, or arguments without names.
        """
        settings = self._running(model)
        if settings is None:
            return None
        given, family = self.by_name(args, kwargs), family_of(model)
        try:
            reading = family.read(model, given, settings.grid)
            text = None if reading is None else valid_text(reading.text_mask)
        except RuntimeError as error:
            if torch.compiler.is_exporting():
                raise ValueError(_not_exported(family, settings.grid)) from error
            raise
        if reading is None:
            return None
        layout = reading.layout
        if settings.grid not in (None, (layout.rows, layout.columns)):
            raise ValueError(
                f"CLEAR: grid={settings.grid} was given, but the image has {layout.rows} x "
                f"{layout.columns} tokens; correct the grid, or leave it out."
            )
        if settings.references == "local" and family.reference_grids and layout.reference_length:
            grids = family.reference_grids(given, layout)
            layout = layout._replace(local_references=grids)
        impl = self._chosen_impl(model, settings, reading.like)
        forward = Forward(layout, text, interval=self._interval(model, settings.tracker, given))
        return Call(settings.tracker, forward, impl, reading.changes, settings.local)

    def _interval(self, model: nn.Module, tracker: WindowTracker, given: Mapping[str, Any]) -> int:
        """The interval of noise levels of a forward.

        Raises:
            ValueError: the level cannot be told, or is not one for the whole batch.
        """
        if not tracker.radii.levels:
            return 0
        denoiser = family_of(model).recipe.denoiser
        time = given.get(denoiser.time)
        if torch.compiler.is_exporting() or time is None:
            why = "torch.export hides it" if time is not None else f"{denoiser.time} is not given"
            raise ValueError(
                f"CLEAR: radii by noise level need the forward's noise level, and {why}; leave "
                "dense_until or the schedule out."
            )
        times = torch.as_tensor(time).flatten().float()
        found = {tracker.radii.interval(level) for level in denoiser.levels(times).tolist()}
        if len(found) > 1:
            raise ValueError(
                "CLEAR: the images of a batch have noise levels on both sides of one at which "
                "radii change; run them apart, or leave dense_until or the schedule out."
            )
        return found.pop()

    def by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A forward's arguments by name.

        Raises:
            ValueError: some have none, since a stranger's forward stands in the place of the
                class's.
        """
        if len(args) > len(self._names):
            raise ValueError(
                f"CLEAR: the forward got {len(args)} arguments by position, of which "
                f"{len(self._names)} have a name: the class's forward was replaced by one whose "
                "signature does not say (functools.wraps keeps it). Pass them by name."
            )
        return dict(zip(self._names, args, strict=False)) | dict(kwargs)

    def _chosen_impl(self, model: nn.Module, settings: CLEARProcessor, like: torch.Tensor) -> str:
        """The implementation that will run, also chosen (and logged) here for compiled blocks.

        settings: a processor that runs; like: a tensor of the device and dtype the layers run in.
        """
        impl, tracker = settings.impl, settings.tracker
        if impl != "auto" or not settings.local:
            return impl
        query = like.new_empty(1, 1, 1, head_dim_of(model))
        needs_grad = torch.is_grad_enabled()
        far, pooled = tracker.far_levels > 0, tracker.down_factor > 1
        kernels = kernels_of(far, pooled, needs_grad)
        return select_impl(impl, query, needs_grad=needs_grad, kernels=kernels)

    def _running(self, model: nn.Module) -> CLEARProcessor | None:
        """A processor of ours that runs in the forward that begins: CLEAR, or full attention."""
        layers = attention_layers(model)
        for name, attn in layers.items():
            if name in self.installed and attn.processor is self.installed[name]:
                return self.installed[name]
        ours = (attn.processor for attn in layers.values())
        return next((p for p in ours if isinstance(p, CLEARProcessor) and not p.local), None)


def _has_local(model: nn.Module) -> bool:
    """Whether a layer has local attention."""
    processors = (attn.processor for attn in attention_layers(model).values())
    return any(isinstance(one, CLEARProcessor) and one.local for one in processors)


def _not_exported(family: Family, grid: tuple[int, int] | None) -> str:
    """What a forward lacks whose tensors have no values."""
    hidden = "CLEAR: torch.export hides the values of tensors, "
    source = re.split("[ ,]", family.grid_from)[0]
    if grid is None and source.endswith("_ids"):
        return (
            f"{hidden}of {source} too, by which {family.title} finds its token grid; name it: "
            "apply_clear(..., grid=(rows, columns))."
        )
    return (
        f"{hidden}of masks too, by which {family.title} tells text from padding; leave the mask "
        "out where the model can do without, else run it as it is."
    )


def originals_of(model: nn.Module) -> Originals:
    """What CLEAR weights replaced in a model; empty where it has none."""
    state = ClearState.on(model)
    return Originals(lost=marked(model) is not None) if state is None else state.originals
