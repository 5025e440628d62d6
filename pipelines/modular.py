"""Modular pipelines of diffusers with the face of a stock one, which `CLEARPipeline` drives.

A modular pipeline is a chain of blocks that read and write one state. Here a call runs the blocks
of texts, once for all stages, and those that denoise; what decodes is left out. Noise levels come
by the input that the blocks have for them, what happens after a step by the scheduler.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.modular_pipelines import SequentialPipelineBlocks

from .checks import WHO

# Blocks of a chain by name, as diffusers has them.
OF_TEXTS = ("prompt_upsampler", "text_encoder")
DECODES = "decode"
# Inputs whose default is told; others are None, for which each block takes its own.
TOLD = ("num_inference_steps", "num_images_per_prompt", "output_type")


class _Face:
    """What comes before a modular pipeline's class and `DiffusionPipeline`."""

    blocks: Any

    # Not DiffusionPipeline's, by which the configuration would follow in another form.
    __setattr__ = object.__setattr__
    set_progress_bar_config = DiffusionPipeline.set_progress_bar_config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """As in the modular pipeline; its index leads to what is saved, if options do not say."""
        options = {"overwrite_modular_index": True} | options
        super().save_pretrained(os.fspath(save_directory), **options)  # type: ignore[misc]

    def __call__(
        self, *, output_type: str = "latent", return_dict: bool = False, **inputs: Any
    ) -> tuple[torch.Tensor]:
        """Latents as the denoising loop holds them, (batch, tokens, channels).

        Args:
            output_type, return_dict: as a stage has them: latents in a tuple.
            inputs: of the blocks.
        """
        texts, others = _parted(self.blocks)
        for name in ("prompt", "negative_prompt"):
            if isinstance(inputs.get(name), list):
                (inputs[name],) = inputs[name]
        encoded = self.encode_prompt(**_known(texts, inputs))
        latents: torch.Tensor = self._run(others, inputs | encoded).latents
        return (latents.flatten(2).transpose(1, 2),)  # of FLUX.3, whose last block unpacks them

    @staticmethod
    def check_inputs(prompt: Any) -> None:
        """As in a stock pipeline.

        Raises:
            ValueError: several prompts, of which the blocks of FLUX.3 take one.
        """
        if isinstance(prompt, list) and len(prompt) != 1:
            raise ValueError(
                f"{WHO}: prompt must be one text, got a list of {len(prompt)}; call once for each, "
                "or give num_images_per_prompt."
            )

    def encode_prompt(self, **inputs: Any) -> dict[str, Any]:
        """What the blocks of texts make of their inputs, by name."""
        texts, _ = _parted(self.blocks)
        if not texts.sub_blocks:
            return {}
        made: dict[str, Any] = self._run(texts, inputs).get(texts.intermediate_output_names)
        return made

    def _run(self, blocks: Any, inputs: Mapping[str, Any]) -> Any:
        """The state after some blocks.

        Raises:
            ValueError: parts that they need are not loaded.
        """
        needed = [part.name for part in blocks.expected_components]
        missing = [name for name in needed if getattr(self, str(name), None) is None]
        if missing:
            raise ValueError(
                f"{WHO}: {', '.join(map(str, missing))} not loaded, which blocks of "
                f"{type(self).__name__} need; call load_components(), or take these blocks out."
            )
        alone = copy.copy(self)
        alone._blocks = blocks  # type: ignore[attr-defined]
        for block in _nested(blocks):
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return ModularPipeline.__call__(alone, **_known(blocks, inputs))


def face_of(pipe: ModularPipeline) -> type[DiffusionPipeline]:
    """A class for a modular pipeline: of its own and a stock one's, called with its inputs."""
    inputs = ((one.name, one.default if one.name in TOLD else None) for one in pipe.blocks.inputs)
    modular: Any = type(pipe)
    return _face(modular, tuple(dict(inputs).items()))


@functools.cache
def _face(modular: type, inputs: tuple[tuple[str | None, Any], ...]) -> type[DiffusionPipeline]:
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    kind = inspect.Parameter.KEYWORD_ONLY
    named = [inspect.Parameter(name, kind, default=value) for name, value in inputs if name]
    named.append(inspect.Parameter("return_dict", kind, default=True))

    def call(self: Any, **options: Any) -> tuple[torch.Tensor]:
        return _Face.__call__(self, **options)

    call.__signature__ = inspect.Signature([own, *named])  # type: ignore[attr-defined]
    return type(modular.__name__, (_Face, modular, DiffusionPipeline), {"__call__": call})


def load_modular(
    model: Any, options: Mapping[str, Any], of_hub: Mapping[str, Any]
) -> ModularPipeline | None:
    """The modular pipeline that a folder or a hub repository has, with its parts; None for none.

    Blocks whose parts have no place that they could be loaded from are left out, such as one that
    was taken out before the pipeline was saved.

    Args:
        options: of `from_pretrained`. A part by its name is taken as it is, and None for it leaves
            it out, not its blocks.
        of_hub: arguments by which files are found.

    Raises:
        ValueError: a part cannot be loaded.
    """
    model = os.fspath(model)  # diffusers takes no Path
    try:
        saved = ModularPipeline.load_config(model, **of_hub)
    except OSError:
        return None
    found = ModularPipeline.from_pretrained(model, **of_hub)
    loaded = found.pretrained_component_names
    given = {name: options[name] for name in loaded if name in options}
    names = [name for name in loaded if name not in given and _is_somewhere(found, name)]
    blocks = found.blocks
    for name, block in dict(blocks.sub_blocks).items():
        parts = {part.name for part in block.expected_components} & set(loaded)
        if parts and parts.isdisjoint((*names, *given)):
            blocks.sub_blocks.pop(name)
    pipe = type(found)(blocks, model, modular_config_dict=saved)
    if "native_size" in saved:  # a `CLEARPipeline`'s
        pipe.register_to_config(native_size=saved["native_size"])
    others = {name: value for name, value in options.items() if name not in given}
    pipe.load_components(names, **others)
    for name in names:
        if getattr(pipe, name) is None:  # which diffusers only logs
            pipe.register_components(**{name: pipe.get_component_spec(name).load(**others)})
    pipe.update_components(**{name: part for name, part in given.items() if part is not None})
    return pipe


def _is_somewhere(pipe: ModularPipeline, name: str) -> bool:
    return pipe.get_component_spec(name).pretrained_model_name_or_path is not None


def _parted(blocks: Any) -> tuple[Any, Any]:
    """A chain's blocks of texts, and the others without the one that decodes."""
    parts = blocks.sub_blocks
    texts = {name: parts[name] for name in parts if name in OF_TEXTS}
    others = {name: parts[name] for name in parts if name not in (*OF_TEXTS, DECODES)}
    chained = SequentialPipelineBlocks.from_blocks_dict
    return chained(texts), chained(others)


def _known(blocks: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that are given and that blocks take."""
    names = blocks.input_names
    return {name: x for name, x in inputs.items() if name in names and x is not None}


def _nested(blocks: Any) -> Iterator[Any]:
    for block in getattr(blocks, "sub_blocks", {}).values():
        yield block
        yield from _nested(block)
