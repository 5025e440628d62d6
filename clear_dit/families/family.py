"""What CLEAR has to know about a family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..attention.layout import Layout
from ..attention.positions import METHODS, Extension
from ..attention.processor import CLEARProcessor
from ..wrappers import unwrapped
from .recipe import Recipe

# Why linear layers stay wide, in most families.
BEGINS = "brings image, text or time into the model: a small part, on which all the rest depends"
ENDS = "gives the image: no layer after it averages its rounding out"
MODULATES = "modulates every block alike: a small part, whose rounding adds up"


@dataclass(frozen=True)
class Reading:
    """What the arguments of a model's forward say.

    Attributes:
        layout: of the tokens, in the attention layers.
        like: latents, for their device and dtype.
        text_mask: (batch, text) bool, False for padding; None if all of the text is valid.
        changes: arguments the forward gets instead of those given.
    """

    layout: Layout
    like: torch.Tensor
    text_mask: torch.Tensor | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Where a forward's tokens are cut into bands of the image's rows, for ranks that share it.

    What is cut is image tokens, and others behind them, which all ranks keep: (batch, tokens, ...),
    or (tokens,). It is done by name: arguments of the forward, or modules that it calls once.

    Attributes:
        arguments: of the forward, that are such tokens, or lists or dicts of them.
        output_of: module whose output they are, or the first of its outputs.
        inputs: module to names of its arguments that are such tokens.
        of_blocks: arguments by name of every block of `Family.stacks`.
        whole_after: module, or modules in one, whose output is put together again; it has the
            image's tokens first.
        tokens_first: whether that is (tokens, batch, channels).
        image_last: whether the others stand before the image's tokens everywhere.
        time: (the forward's arguments by name) to a number that falls from step to step.
    """

    arguments: tuple[str, ...] = ()
    output_of: str | None = None
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    of_blocks: tuple[str, ...] = ()
    whole_after: str = "proj_out"
    tokens_first: bool = False
    image_last: bool = False
    time: Callable[[Mapping[str, Any]], torch.Tensor] = lambda given: given["timestep"]


# Of FLUX.1 and its like, whose forward gets tokens. Embedders then run on a rank's own.
OF_TOKENS = Cut(("hidden_states", "controlnet_block_samples", "controlnet_single_block_samples"))


@dataclass(frozen=True)
class Family:
    """One row of the table of families.

    Attributes:
        name: in commands and file names, such as "flux2".
        title: for people, such as "FLUX.2 (dev, klein)".
        recipe: how its pipelines make whole images.
        transformer: class name of the transformer in diffusers.
        stacks: attributes of the model that hold its blocks, such as "mode_blocks.image"; a block's
            attention layers are its children with `set_processor`.
        processors: class name of a stock processor to CLEAR's that takes its place.
        was_undone: (model, CLEAR's processor of a layer) to whether diffusers has taken the layer's
            IP-adapter or fused projections away again, and put a stock processor there.
        is_fused: whether an attention layer runs fused projections.
        read: (model, the forward's arguments by name, explicit grid) to what they say; None where
            arguments are missing, of which the model itself complains.
        reference_grids: (the forward's arguments by name, their layout) to rows and columns of
            every reference image; None where the family has none that could be local.
        references: where a family has other reference images, what they are; else None.
        order: of the tokens in a layer with one sequence.
        grid_from: where rows and columns are found.
        heads: heads x channels of the published models.
        positions: the largest size, and why.
        extend: (model, how) to attributes of the model that stand in for its own while positions
            are extended: {"pos_embed": module}; None where positions cannot be extended.
        methods: of `Extension.rope` that `extend` knows.
        proportional: whether its tables bring proportional attention along: each layer rotates all
            tokens by one table, made at once. Elsewhere only CLEAR's processors can have it.
        tuned: linear layers of an attention layer that distillation trains and CLEAR weights hold,
            where the layer has them.
        wide: patterns of names of linear layers, such as "x_embedder", to why quantisation leaves
            them as they are, see `linears_of`.
        modulation: patterns of names of those in the blocks through which one row of numbers goes
            for each image, of which quantisation takes the weights alone.
        kept: where other attention layers are, such as "mode_blocks.image_cond", to why they stay
            as they are.
        text_processors: class name of a stock processor of those that get a rotary table to what
            takes its place where the table holds several positions a token: it takes the first.
        cut: where ranks that share an image cut its tokens.
        weights: CLEAR weights that somebody has published.
        serves_fused: whether the processors work on layers with fused projections.
        chunked: whether `chunk_feed_forward` knows the blocks.
        repeated_blocks: whether diffusers' `compile_repeated_blocks` knows them.
    """

    name: str
    title: str
    recipe: Recipe
    transformer: str
    stacks: tuple[str, ...]
    processors: Mapping[str, type[CLEARProcessor]]
    read: Callable[[Any, Mapping[str, Any], tuple[int, int] | None], Reading | None]
    order: str
    grid_from: str
    heads: str
    positions: str
    reference_grids: Callable[[Mapping[str, Any], Layout], tuple[tuple[int, int], ...]] | None = (
        None
    )
    references: str | None = None
    extend: Callable[[Any, Extension], Mapping[str, Any]] | None = None
    methods: tuple[str, ...] = METHODS
    proportional: bool = False
    was_undone: Callable[[Any, CLEARProcessor], bool] = lambda model, installed: False
    is_fused: Callable[[Any], bool] = lambda attn: getattr(attn, "fused_projections", False)
    tuned: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    wide: Mapping[str, str] = field(default_factory=dict)
    modulation: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    text_processors: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    cut: Cut = OF_TOKENS
    weights: str = "none published"
    serves_fused: bool = False
    chunked: bool = False
    repeated_blocks: bool = True

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The blocks of `stacks`, by name: "transformer_blocks.0"; wrapped ones in their wrapper.

        A model may lack a stack (ControlNets do), or have None in its place.
        """
        found = dict[str, nn.Module]()
        for stack in self.stacks:
            blocks: Any = model
            for name in stack.split("."):
                blocks = getattr(blocks, name, None)
            found |= {f"{stack}.{index}": block for index, block in enumerate(blocks or ())}
        return found

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """The attention layers CLEAR runs in, by name: "transformer_blocks.0.attn"."""
        return {
            f"{block_name}.{name}": child
            for block_name, block in self.blocks(model).items()
            for name, child in unwrapped(block).named_children()
            if hasattr(child, "set_processor")
        }

    def text_layers(self, model: nn.Module) -> list[Any]:
        """The attention layers over text or other images alone that get a rotary table."""
        return [
            module
            for name, module in model.named_modules()
            if any(name.startswith(f"{at}.") for at in self.kept)
            and type(getattr(module, "processor", None)).__name__ in self.text_processors
        ]

    def kept_layers(self, model: nn.Module) -> dict[str, list[str]]:
        """Names of the attention layers that stay as they are, by why."""
        ours, found = list(self.layers(model).values()), dict[str, list[str]]()
        for name, module in model.named_modules():
            if hasattr(module, "set_processor") and module not in ours:
                reasons = (why for at, why in self.kept.items() if name.startswith(f"{at}."))
                why = next(reasons, "is not attention over the image")
                found.setdefault(why, []).append(name)
        return found

    def extended(self, model: nn.Module, extension: Extension) -> Mapping[str, Any]:
        """What stands in for attributes of a model, by name, while its positions are extended.

        Raises:
            ValueError: the family's positions cannot be extended so, or somebody replaced them.
        """
        if self.extend is None or extension.rope not in self.methods:
            known = ", ".join(self.methods) if self.extend else "none"
            raise ValueError(
                f"CLEAR: rope {extension.rope!r} does not work with {self.title}; choose from: "
                f"{known}."
            )
        if extension.proportional_base is not None and not self.proportional:
            raise ValueError(
                f"CLEAR: proportional_base does not work by {self.title}'s position tables, which "
                "do not know all tokens; set it on CLEAR's processors (apply_clear)."
            )
        return self.extend(model, extension)

    def tuned_names(self, attn: nn.Module) -> list[str]:
        """Those of `tuned` that an attention layer has."""
        modules = dict(attn.named_modules())
        return [name for name in self.tuned if name in modules]


def check_image_length(layout: Layout, source: str, hidden_states: torch.Tensor) -> None:
    """Refuse latents that contradict a layout.

    Args:
        source: what the layout was read from, such as "img_ids".
        hidden_states: (batch, image + references, channels).

    Raises:
        ValueError: another number of tokens.
    """
    received = hidden_states.shape[1]
    if received != layout.image_length + layout.reference_length:
        raise ValueError(
            f"CLEAR: {source} means {layout.rows} x {layout.columns} = {layout.image_length} "
            f"image tokens{layout.and_references}, but hidden_states has {received}. Are "
            "height and width those of these latents?"
        )


def own_positions(model: Any, attribute: str, *known: type) -> Any:
    """What a model has for positions, unless somebody else put it there.

    Args:
        known: the stock class, and what stands in for it.

    Raises:
        ValueError: it is of another class.
    """
    positions = getattr(model, attribute)
    if not isinstance(positions, known):
        raise ValueError(
            f"CLEAR: only {known[0].__name__} can be extended, but the transformer's {attribute} "
            f"is a {type(positions).__name__}. Put the stock one back, or use "
            "Resolution(rope='none', proportional_base=None)."
        )
    return positions


def adapter_was_unloaded(model: nn.Module, projection: str) -> bool:
    """Whether an IP-adapter was loaded into a model, and unloaded.

    Args:
        projection: attribute that holds the projection of image prompts. Loading makes it a
            submodule, unloading leaves None in its place.
    """
    return model._modules.get(projection, model) is None
