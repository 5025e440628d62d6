"""apply_clear and remove_clear: CLEAR on whole models, one processor per layer, and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from .attention.processor import CLEARProcessor, FluxAttnProcessor
from .attention.radii import Radii
from .chunking import chunk_feed_forward, is_chunked
from .families.family import Family
from .families.schedule import Schedule, read_schedule
from .families.table import (
    all_families,
    attention_layers,
    family_of,
    models_of,
    transformer_of,
)
from .weights.changing import changing
from .weights.learned import give_learned, settle
from .weights.load import find_weights, load_checked, open_checked
from .weights.reconcile import reconcile
from .weights.saved import marked
from .weights.state import ClearState, originals_of
from .wrappers import unwrapped

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """What `apply_clear` did to one model.

    Attributes:
        model: its class.
        family: its title, such as "FLUX.2 (dev, klein)".
        layers: names of the attention layers that have CLEAR now.
        radii: of their windows.
        far: whether they have far keys.
        kept: names of those that stay as they were, by why.
    """

    model: str
    family: str
    layers: tuple[str, ...]
    radii: Radii
    far: bool
    kept: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        kept = "".join(
            f"; {len(names)} stay as they are, such as {names[0]}, which {why}"
            for why, names in self.kept.items()
        )
        far = " with far keys" if self.far else ""
        radii = "" if self.radii.is_plain else f", radius {self.radii}"
        return f"{self.family}: {len(self.layers)} attention layers run CLEAR{far}{radii}{kept}"


def apply_clear(
    pipe_or_model: Any,
    radius: int | Mapping[str, int] | Radii | None = None,
    down_factor: int = 1,
    weights: str | os.PathLike[str] | None = None,
    impl: str = "auto",
    proportional_base: int | None = None,
    references: str = "dense",
    far: bool | None = None,
    pooled_weight: str = "one",
    grid: tuple[int, int] | None = None,
    dense_layers: Sequence[str] = (),
    dense_until: float | None = None,
    schedule: Schedule | str | os.PathLike[str] | None = None,
) -> tuple[Applied, ...]:
    """Replace the attention of every layer of a model by CLEAR's local attention.

    Where no tuned weights are loaded, with far keys: image tokens see the whole image, far tokens
    pooled into ever coarser cells.

    The families of models are those of `families/table.py`. A pipeline's ControlNets are included:
    they attend over the whole image too. In large images FLUX.1's feed-forward layers run chunk
    by chunk, which takes less memory (`chunk_feed_forward`). A second call replaces the settings;
    `remove_clear` still goes back to what was there before the first. Nothing is changed if
    anything is refused.

    Args:
        pipe_or_model: a pipeline with a transformer of a family, the transformer itself, or one of
            its ControlNets.
        radius: of the disc an image token attends to, in tokens; or a map of layers' names, such as
            "transformer_blocks.0.attn", to such, with "*" for those it does not name. In a pipeline
            layers are the transformer's, and ControlNets have what "*" says. None takes 16.
        down_factor: side of a pooling cell, in tokens; 1 is the variant without pooled keys.
        weights: fine-tuned weights for these settings, a path or a hub repository: see
            `load_clear_weights`. They are the transformer's; a ControlNet keeps its own. None
            leaves the model's weights as they are.
        impl: one of `auto, triton, flex, tiled, reference`.
        proportional_base: see `CLEARProcessor`.
        references: "dense" or "local": whether reference images (FLUX.1-Kontext, FLUX.2,
            Qwen-Image-Edit) attend to all of themselves or, like the image, to their discs; see
            `CLEARProcessor`.
        far: True takes far keys, False is the paper's CLEAR. None does as the CLEAR weights that
            the model has (`weights`, or those loaded before) were made for, and without any takes
            far keys; the log says so once, at INFO. A ControlNet never has CLEAR weights: with None
            it takes far keys, whatever the transformer does. What was learned of far keys goes and
            comes with the weights.
        pooled_weight: of a pooled key of `down_factor`: "one", or "count"; see `CLEARProcessor`.
        grid: (rows, columns) of the image, in tokens; it is found where None. Every forward must
            then have it. For `torch.export`, which hides the position ids that it is found by.
        dense_layers: names of layers in which every token attends to every one, in quadratic time
            but without a mask; of the transformer's, in a pipeline.
        dense_until: noise level, from 1 (noise) to 0 (the image), down to which all layers do: 0.9
            takes full attention in forwards at 0.9 and above.
        schedule: the radii instead, of this very model, a file of `clear-dit calibrate` or its
            content; it says `far` too. In a pipeline ControlNets have the uniform radius it was
            made for.

    Returns:
        What was done to the transformer and to every ControlNet; the log says it too, at INFO.

    Raises:
        ValueError: an unsupported model or layer, a setting out of its range, settings that exclude
            each other, weights that do not fit.
        OSError: the weights or the schedule cannot be found.
    """
    models = models_of(pipe_or_model, "apply_clear")
    radii: Any = 16 if radius is None else radius
    if schedule is not None:
        others = {
            "radius": radius,
            "dense_layers": dense_layers or None,
            "dense_until": dense_until,
        }
        others |= {"down_factor": down_factor if down_factor != 1 else None}
        found = _take_schedule(schedule, models[0], others, far)
        radii, far = found.radii, found.far
    settings = CLEARProcessor(
        radius=radii,
        down_factor=down_factor,
        impl=impl,
        grid=grid,
        proportional_base=proportional_base,
        references=references,
        far=far,
        pooled_weight=pooled_weight,
        dense_layers=dense_layers,
        dense_until=dense_until,
    )
    for model in models:
        _refuse_layers(model)
        _refuse_references(model, settings)
    if weights is None:
        return install(models, settings)
    transformer = transformer_of(pipe_or_model, "apply_clear(weights=...)")
    path = find_weights(weights, settings.radius, settings.down_factor, settings.far)
    each = _for_each(models, settings)
    with open_checked(transformer, path, settings) as file, ExitStack() as stack:
        states = [
            stack.enter_context(changing(model, weights=model is transformer)) for model in models
        ]
        for model, own in zip(models, each, strict=True):
            _install(model, own)
        load_checked(transformer, states[models.index(transformer)], file, path)
    return tuple(_report(model) for model in models)


def _take_schedule(
    schedule: Schedule | str | os.PathLike[str],
    model: nn.Module,
    others: Mapping[str, Any],
    far: bool | None,
) -> Schedule:
    """A schedule for a model, beside which nothing else is said.

    Args:
        others: settings that it excludes, by name; None where they are not given.

    Raises:
        ValueError: it is for another model, or one is.
        OSError: there is no such file.
    """
    found = schedule if isinstance(schedule, Schedule) else read_schedule(schedule)
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"apply_clear: a schedule has the radii of all layers; leave {name} out, got "
                f"{value!r}."
            )
    if far not in (None, found.far):
        raise ValueError(
            f"apply_clear: the schedule was made for far={found.far}, got far={far}; leave far "
            "out, or calibrate again."
        )
    found.check_model("apply_clear", model)
    return found


def remove_clear(pipe_or_model: Any) -> bool:
    """Put the processors back that were there before CLEAR, and the weights bit for bit.

    A LoRA that was fused since stays, on the original weights. Nothing is changed if anything is
    refused.

    Layers whose processor somebody else replaced since are left alone. IP-adapters that were loaded
    or unloaded since stay so. It waits for forwards of the model that are under way in other
    threads, as `apply_clear` and `load_clear_weights` do; only before the first of these calls
    forwards are not known, and a model must not be in use. What stays on the model is this lock.

    Args:
        pipe_or_model: what `apply_clear` or `set_attn_processor` was called on.

    Returns:
        Whether there was anything to remove.

    Raises:
        ValueError: the original weights cannot be put back: CLEAR weights were trained or replaced
            since, quantised, sharded or offloaded, or came with the model (`save_pretrained`).
    """
    models = models_of(pipe_or_model, "remove_clear")
    with ExitStack() as stack:
        for model in models:
            if ClearState.on(model) is not None:
                stack.enter_context(changing(model, weights=True))
        removed = [_remove(model) for model in models]
    logger.info("CLEAR %s", "removed" if any(removed) else "was not applied: nothing to remove")
    return any(removed)


def _remove(model: nn.Module) -> bool:
    state, originals = ClearState.on(model), dict[str, Any]()
    originals_of(model).refuse_lost("remove_clear")
    removed = was_applied = state is not None and state.is_applied
    if state is not None and was_applied:
        reconcile(state, model)
        state.restore_weights(model)
        originals = state.processors
    for name, attn in attention_layers(model).items():
        if isinstance(attn.processor, CLEARProcessor):
            attn.processor.decide_far(None)  # somebody may set it again
            attn.set_processor(originals.get(name) or FluxAttnProcessor())
            removed = True
    if state is not None and was_applied:
        state.forget()
        if family_of(model).chunked:
            chunk_feed_forward(model, None)
    return removed


def _refuse_layers(model: nn.Module) -> None:
    """Refuse layers whose processor the family has no replacement for, or cannot serve.

    Raises:
        ValueError: the layer, what it has and what is known.
    """
    family = family_of(model)
    layers = family.layers(model)
    blocks = {name: unwrapped(block) for name, block in family.blocks(model).items()}
    strange = [name for name in blocks if not any(layer.startswith(f"{name}.") for layer in layers)]
    if strange or not blocks:
        got = f"{strange[0]}, {_class(blocks[strange[0]])}" if blocks else "no blocks"
        raise ValueError(
            f"apply_clear: every block in {' and '.join(family.stacks)} of {type(model).__name__} "
            f"must be diffusers' own, which has an attention layer with a processor; got {got}."
        )
    for name, attn in layers.items():
        if family.is_fused(attn) and not family.serves_fused:
            raise ValueError(
                f"apply_clear: {name} has fused projections, which CLEAR does not serve in "
                f"{family.title}; call unfuse_qkv_projections() first."
            )
        processor = type(attn.processor).__name__
        if isinstance(attn.processor, CLEARProcessor) or processor in family.processors:
            continue
        raise ValueError(
            f"apply_clear: {name} has {_class(attn.processor)}; in {family.title} CLEAR takes "
            f"the place of {' or '.join(family.processors)}. Put that back first."
        )


def _for_each(models: Sequence[nn.Module], settings: CLEARProcessor) -> list[CLEARProcessor]:
    """The settings of each model: radii by layer are those of the first.

    Raises:
        ValueError: it has no such layer, or radii are missing.
    """
    first, *others = models
    settings.radii.check_layers("apply_clear", family_of(first).layers(first))
    elsewhere = settings.settings | {"radius": settings.radii.of_other_model()}
    return [settings, *(CLEARProcessor(**elsewhere) for _ in others)]


def _class(thing: object) -> str:
    return f"{type(thing).__name__} of {type(thing).__module__}"


def _refuse_references(model: nn.Module, settings: CLEARProcessor) -> None:
    """Refuse an option for reference images in a family that has none.

    Raises:
        ValueError: the family, and those that have them.
    """
    family = family_of(model)
    if settings.references == "local" and family.reference_grids is None:
        have = ", ".join(other.title for other in all_families() if other.reference_grids)
        has = f"them {family.references}" if family.references else "no reference images"
        raise ValueError(
            f"apply_clear: references='local' is for {have}; {family.title} has {has}. Leave it "
            "out."
        )


def install(models: Sequence[nn.Module], settings: CLEARProcessor) -> tuple[Applied, ...]:
    """Give every layer a processor of its own with these settings; a model's share one tracker.

    Pooling weights a model already has stay, where the new down_factor equals the old; what was
    learned of far keys, where there still are far keys.

    Raises:
        ValueError: a model's weights go with weights of pooling, which it came without; radii of
            layers that the first model has not, or that say nothing of all its layers.
    """
    for model in models:
        _refuse_lost_pooling(model, settings)
    each = _for_each(models, settings)
    with ExitStack() as stack:
        for model, own in zip(models, each, strict=True):
            stack.enter_context(changing(model))
            _install(model, own)
    return tuple(map(_report, models))


def _refuse_lost_pooling(model: nn.Module, settings: CLEARProcessor) -> None:
    """Refuse weights without the pooling they were trained with: `from_pretrained` leaves it out.

    Raises:
        ValueError: they are.
    """
    entry, came_so = marked(model), not originals_of(model).loaded_here
    uses = settings.down_factor > 1 or settings.far is not False
    if entry is not None and entry["learned"] and came_so and uses:
        raise ValueError(
            f"apply_clear: the model was saved with CLEAR weights ({entry['file']}) whose learned "
            "pooling from_pretrained leaves out; give weights=, a file of save_clear_weights."
        )


def _install(model: nn.Module, settings: CLEARProcessor) -> None:
    family = family_of(model)
    state = ClearState.attach(model)
    reconcile(state, model)
    state.tracker = settings.new_tracker(state.weights_far)
    for name, attn in family.layers(model).items():
        old = attn.processor
        if not isinstance(old, CLEARProcessor):
            state.processors[name] = old
        new = _replacement(family, old).for_layer(settings, state.tracker, old)
        new.layer_radii = settings.radii.of_layer(name)
        attn.set_processor(new)
        if new.has_far_keys:
            give_learned(name, attn, state.learned, old)
        settle(model, attn, old)
        state.installed[name] = new
    state.given_up = frozenset()
    if family.chunked and not is_chunked(model):
        chunk_feed_forward(model)


def _report(model: nn.Module) -> Applied:
    """What was done to a model; logs it."""
    family = family_of(model)
    layers = family.layers(model)
    first = next(iter(layers.values())).processor
    kept = {why: tuple(names) for why, names in family.kept_layers(model).items()}
    applied = Applied(
        type(model).__name__,
        family.title,
        tuple(layers),
        first.radii,
        first.has_far_keys,
        kept,
    )
    described = (len(layers), first.extra_repr(), applied)
    logger.info("CLEAR applied to %d attention layers: %s; %s", *described)
    first.tracker.say_far()
    state = ClearState.on(model)
    assert state is not None
    state.decide_far(model)
    return applied


def _replacement(family: Family, old: Any) -> Any:
    """The class of CLEAR's processor in the place of a stock one, or of an earlier one of ours."""
    default = next(iter(family.processors.values()))
    if isinstance(old, CLEARProcessor):
        return type(old) if hasattr(type(old), "for_layer") else default
    return family.processors.get(type(old).__name__, default)
