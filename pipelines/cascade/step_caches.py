"""Caches that skip blocks or attention in some steps: diffusers' own, and cache-dit's.

They hang on the transformer, and keep from step to step what belongs to one image of one size.
Here they are refused where they would do nothing or harm, and set to the stage that begins.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from clear_dit.families.table import transformer_of

from .stages import Stage

WHO = "CLEARPipeline"
CACHE_DIT = "cache-dit"
# Names of diffusers' hooks, one for each cache: what it is called.
HOOKS = {
    "fbc_leader_block_hook": "FirstBlockCache",
    "mag_cache_leader_block_hook": "MagCache",
    "taylorseer_cache": "TaylorSeer",
    "sea_cache_root": "SeaCache",
    "text_kv_cache_transformer": "TextKVCache",
    "faster_cache_denoiser": "FasterCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
}
# Which keep one state for all passes of a step.
FOR_ONE_PASS = ("FasterCache", "PyramidAttentionBroadcast")
# Hooks whose settings go by the number of steps.
BY_STEPS = ("mag_cache_leader_block_hook", "mag_cache_block_hook")
OTHERS = "FirstBlockCacheConfig, MagCacheConfig or TaylorSeerCacheConfig"


def caches_on(model: Any) -> dict[str, Any]:
    """The step caches of a transformer by name; a hook of each, of cache-dit its settings."""
    found = {HOOKS[name]: hook for name, hook in _hooks(model) if name in HOOKS}
    if hasattr(model, "_is_cached"):
        found[CACHE_DIT] = model._context_kwargs["cache_config"]
    return found


def check_caches(
    pipe: Any, options: Mapping[str, Any], stages: Sequence[Stage], patches: Any
) -> None:
    """Refuse step caches that cannot do with a pipeline's call what they are for.

    Args:
        pipe: a `CLEARPipeline`.
        options: the arguments of the stock pipeline's call.
        stages: its plan.
        patches: a `PatchParallel`, the ranks that share the image; None for one process.

    Raises:
        ValueError: the cache, and what to use instead.
    """
    model = transformer_of(pipe, WHO)
    found, config = caches_on(model), getattr(model, "_cache_config", None)
    if not found and config is not None:
        raise ValueError(
            f"{WHO}: {type(config).__name__} has found no layer in {type(model).__name__}, so that "
            "it skips nothing; name them by its identifiers, or call disable_cache()."
        )
    if not found:
        return
    stock, passes = pipe.stock.__name__, _passes(pipe, options)
    if patches is not None and patches.guidance_ranks > 1:
        passes = 1  # of this rank
    if "SeaCache" in found:
        raise ValueError(
            f"{WHO}: SeaCache skips nothing here, as {stock} does not tell it the step and its "
            f"noise level; use {OTHERS}, or disable_cache()."
        )
    if "TextKVCache" in found:
        raise ValueError(
            f"{WHO}: TextKVCache keeps nothing here, as it is for Nucleus-Image alone; use "
            f"{OTHERS}, or disable_cache()."
        )
    if CACHE_DIT in found:
        _check_cache_dit(pipe, found[CACHE_DIT], passes, stages, patches)
    elif "cache_context" not in inspect.unwrap(pipe.stock.__call__).__code__.co_names:
        raise ValueError(
            f"{WHO}: {next(iter(found))} must be told which pass of a step it is in, and {stock} "
            "does not; call disable_cache()."
        )
    faster = found.get("FasterCache")
    if faster is not None and not faster.is_guidance_distilled:
        raise ValueError(
            f"{WHO}: FasterCache guesses one pass of guidance from the other, for which both must "
            f"be one batch, and {stock} computes them one by one; FasterCacheConfig("
            "is_guidance_distilled=True) skips attention alone."
        )
    for name in FOR_ONE_PASS:
        if name in found and passes > 1:
            raise ValueError(
                f"{WHO}: {name} keeps one output of a layer, which the {passes} passes of a step "
                f"would take for each other's; use {OTHERS}, or no negative prompt."
            )


def _check_cache_dit(
    pipe: Any, config: Any, passes: int, stages: Sequence[Stage], patches: Any
) -> None:
    if "_original_call" in vars(type(pipe)):
        raise ValueError(
            f"{WHO}: cache-dit has wrapped the call of {type(pipe).__name__}, in which it cannot "
            "tell stages apart; call cache_dit.disable_cache(pipe), then cache_dit.enable_cache("
            "pipe.transformer, ...)."
        )
    if patches is not None:
        raise ValueError(
            f"{WHO}: with cache-dit ranks that share an image would not decide as one process "
            "does; use FirstBlockCacheConfig instead."
        )
    if passes > 1 and not all(stage.guided for stage in stages):
        raise ValueError(
            f"{WHO}: cache-dit takes {passes} passes of the transformer for a step, and stages "
            "that take few steps have one; use preset='repaint', or another cache."
        )
    if bool(config.enable_separate_cfg) != (passes > 1):
        raise ValueError(
            f"{WHO}: cache-dit takes a step for {1 + bool(config.enable_separate_cfg)} passes of "
            f"the transformer, but this call's have {passes}; enable it with "
            f"DBCacheConfig(enable_separate_cfg={passes > 1}, ...)."
        )


def _passes(pipe: Any, options: Mapping[str, Any]) -> int:
    """Of the transformer, in a step."""
    guidance, config = pipe.recipe.guidance, pipe.transformer.config
    if guidance.argument is None:  # a guider, which has two unless it is off
        return 1 if config.get("guidance_embeds") else 2
    if guidance.argument == "true_cfg_scale" and not any(
        options.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds")
    ):
        return 1
    if guidance.argument == "true_cfg_scale":
        return 1 if options["true_cfg_scale"] <= guidance.off else 2
    passes: int = guidance.passes(config, options[guidance.argument])
    return passes


@contextmanager
def of_a_stage(pipe: Any, begins: float, steps: int) -> Iterator[None]:
    """Within it step caches know nothing of other stages and images, and are set to this one.

    FasterCache and PyramidAttentionBroadcast go by the timestep of the call, and never skip
    attention in its first step. MagCache has the number of steps of the stage, and their ratios.

    Args:
        pipe: a call's own, which has its `_current_timestep` in every step.
        begins: where in a whole schedule the stage does, from 0 to 1.
        steps: of the stage.
    """
    model, timestep = transformer_of(pipe, WHO), _Timestep(pipe)
    if not caches_on(model):
        yield
        return
    hooks, set_to = [*_hooks(model)], list[tuple[Any, str, Any]]()
    for name, hook in hooks:
        if hasattr(hook, "current_timestep_callback"):
            set_to.append((hook, "current_timestep_callback", timestep))
        if name in BY_STEPS:
            set_to.append((hook, "config", _for_steps(hook.config, begins, steps)))
    before = [(hook, name, getattr(hook, name)) for hook, name, _ in set_to]
    try:
        for hook, name, value in set_to:
            setattr(hook, name, value)
        _forget(model)
        yield
    finally:
        for hook, name, value in before:
            setattr(hook, name, value)
        _forget(model)


class _Timestep:
    """That of the step under way; infinite in the first, in which nothing is kept to be used."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._first: float | None = None

    def __call__(self) -> float:
        now = float(self._pipe._current_timestep)
        self._first = now if self._first is None else self._first
        return math.inf if now == self._first else now


def _for_steps(config: Any, begins: float, steps: int) -> Any:
    """MagCache's settings for a stage; its ratios are of a whole schedule, step to step."""
    if config.calibrate:
        return replace(config, num_inference_steps=steps)
    ratios = config.mag_ratios.double().cpu().numpy()
    if begins == 0 and steps == len(ratios):
        return config
    # What the residual has grown to when a step begins, and one step past the last.
    grown = np.cumsum(np.log([1.0, *ratios[1:], ratios[-1]]))
    places = np.linspace(begins * len(ratios), len(ratios), steps + 1)[:-1]
    at = np.interp(places, np.arange(len(grown)), grown)
    fitting = torch.tensor(np.exp(np.diff(at, prepend=at[0])), dtype=torch.float32)
    return replace(config, num_inference_steps=steps, mag_ratios=fitting)


def _forget(model: Any) -> None:
    """What belongs to an image that is not under way any more."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            registry.reset_stateful_hooks(recurse=False)
    if hasattr(model, "_is_cached"):
        manager = model._context_manager
        for name, context in [*manager._cached_context_manager.items()]:
            manager.reset_context(name, **context._init_kwargs)


def _hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those of diffusers on a model and all within it, by name."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            yield from registry.hooks.items()
