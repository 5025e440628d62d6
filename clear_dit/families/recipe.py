"""What whole images of a family take besides attention: pipelines, latents, sizes, noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..compat import names_from
from .prompt_reading import PromptReading


@dataclass(frozen=True)
class Latents:
    """How a family's pipelines hold latents.

    Everywhere else they are a grid as the transformer takes them: (batch, channels, height, width),
    of the autoencoder's channels and size, shifted and scaled.

    Attributes:
        held: the form in which the denoising loop holds them: "tokens", (batch, height * width /
            pack^2, channels * pack^2), as FLUX.1 does; "rows", (batch, channels * pack^2, height /
            pack, width / pack); or "grid".
        given: that of `latents=`; the same where None.
        pack: side of the squares of latent pixels that are packed together, row by row within each
            channel.
    """

    held: str = "tokens"
    given: str | None = None
    pack: int = 2

    def to_grid(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the loop holds as a grid of height x width latent pixels."""
        if self.held == "grid":
            return latents
        side = self.pack
        if self.held == "rows":
            latents = latents.flatten(2).transpose(1, 2)
        split = latents.unflatten(2, (-1, side, side)).unflatten(1, (height // side, -1))
        return split.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_grid`."""
        return self._packed(grid, self.held)

    def as_given(self, grid: torch.Tensor) -> torch.Tensor:
        """A grid as a pipeline's `latents=`."""
        return self._packed(grid, self.given or self.held)

    def _packed(self, grid: torch.Tensor, form: str) -> torch.Tensor:
        if form == "grid":
            return grid
        side = self.pack
        split = grid.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        rows = split.permute(0, 2, 4, 1, 3, 5).flatten(3, 5)  # [B, rows, columns, C]
        return rows.flatten(1, 2) if form == "tokens" else rows.permute(0, 3, 1, 2)

    def shape(self, channels: int, height: int, width: int) -> tuple[int, ...]:
        """Of an image of height x width latent pixels; channels: of the transformer's input."""
        rows, columns = height // self.pack, width // self.pack
        if self.held == "tokens":
            return (rows * columns, channels)
        return (channels, rows, columns) if self.held == "rows" else (channels, height, width)

    def given_shape(self, height: int, width: int) -> tuple[int | str, ...]:
        """Shape of a pipeline's `latents=`, of any batch and channels; sizes in latent pixels."""
        form, rows, columns = self.given or self.held, height // self.pack, width // self.pack
        if form == "tokens":
            return ("batch", rows * columns, "channels")
        return ("batch", "channels", *((rows, columns) if form == "rows" else (height, width)))


@dataclass(frozen=True)
class Defaults:
    """What suits a model where a request does not say it.

    Attributes:
        size: native height and width, in pixels.
        radius: of the window, in tokens.
        steps: denoising steps.
        guidance: strength of guidance, as the pipeline takes it.
    """

    size: int
    radius: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Guidance:
    """How a family's pipelines are told the strength of guidance.

    Attributes:
        argument: of a call, for classifier-free guidance in two passes. None: a guider among the
            pipeline's parts, which HunyuanImage has.
        off: strengths up to this one are one pass.
        negative: the prompt of the second pass, where the pipeline has none of its own.
        embedded: of a call instead, where the transformer's configuration has "guidance_embeds":
            one pass.
        fixed: names of pipelines whose second pass, if there is one, takes no other prompt.
    """

    argument: str | None = "guidance_scale"
    off: float = 1.0
    negative: str | None = None
    embedded: str = "guidance_scale"
    fixed: tuple[str, ...] = ()

    def takes_negative(self, config: Mapping[str, Any], pipeline: str) -> bool:
        """Whether a second pass takes a prompt of a call's.

        Args:
            config: of the transformer.
            pipeline: the name of its stock class.
        """
        return not config.get("guidance_embeds") and pipeline not in self.fixed

    def passes(self, config: Mapping[str, Any], strength: float) -> int:
        """Of a step, by the transformer's configuration."""
        return 1 if config.get("guidance_embeds") or strength <= self.off else 2

    def of_one_pass(self, config: Mapping[str, Any], strength: float) -> float:
        """The strength with which a step is the first of its passes alone."""
        return strength if self.passes(config, strength) == 1 else self.off

    def without(self, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call for one pass instead of two; what is embedded stays.

        A guider among the pipeline's parts is not told by arguments.
        """
        embedded = config.get("guidance_embeds") and self.argument == self.embedded
        changed = {name: None for name in options if name.startswith("negative_")}
        if self.argument is not None and not embedded:
            changed[self.argument] = self.off  # type: ignore[assignment]
        return {**options, **changed}

    def options(
        self, pipe: Any, strength: float, prompts: int, negative: str | None = None
    ) -> dict[str, Any]:
        """The arguments of a call for so many prompts with guidance of this strength.

        Args:
            negative: the prompt of the second pass of all; None for the model's own.
        """
        config = pipe.transformer.config
        if config.get("guidance_embeds"):
            return {self.embedded: strength}
        found: dict[str, Any] = {} if self.argument is None else {self.argument: strength}
        negative = self.negative if negative is None else negative
        if negative is not None and strength > self.off:
            found["negative_prompt"] = [negative] * prompts
        return found


@dataclass(frozen=True)
class Denoiser:
    """How a step of the denoising loop calls a family's transformer.

    Attributes:
        latents, time: names of the forward's arguments.
        scale: the time at noise level 1; from 0 it grows in proportion.
        kept: names of what a loop keeps from one step to the next: none of it is a prompt's.
    """

    latents: str = "hidden_states"
    time: str = "timestep"
    scale: float = 1.0
    kept: tuple[str, ...] = ()

    def arguments(
        self, latents: torch.Tensor, levels: torch.Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Of the forward, by name.

        Args:
            latents: (batch, ...), as the loop holds them, in the dtype of the forward.
            levels: noise levels from 0 to 1, (batch,) float32.
            conditioning: the other arguments, for as many images.
        """
        return {**conditioning, self.latents: latents, self.time: self.scale * levels}

    def levels(self, time: torch.Tensor) -> torch.Tensor:
        """Noise levels from 0 to 1 of the forward's argument for the time; the inverse."""
        return time / self.scale

    def velocity(self, output: Any, shape: Sequence[int]) -> torch.Tensor:
        """noise - image, as the loop holds latents.

        Args:
            output: of the forward.
            shape: of the latents of one image.
        """
        velocity: torch.Tensor = output
        return velocity


def no_options(pipe: Any) -> dict[str, Any]:
    """`Recipe.options` of most families."""
    return {}


def whole_length(pipe: Any) -> PromptReading:
    """`Recipe.prompts` of most families: as many tokens as the model is given, of the prompt."""
    return PromptReading(pipe.recipe.given_length(pipe))


def log_shift(pipe: Any, tokens: int, steps: int) -> float:
    """`Recipe.mu` of most families: linear in the tokens."""
    return linear_shift(pipe.scheduler.config, tokens)


def linear_shift(config: Mapping[str, Any], tokens: int) -> float:
    """log(shift) as FLUX.1's pipeline has it, by a scheduler's configuration."""
    # Pipelines are imported when they are needed: it takes seconds, and they print warnings.
    (calculate_shift,) = names_from("diffusers.pipelines.flux.pipeline_flux", "calculate_shift")
    mu: float = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return mu


@dataclass(frozen=True)
class Recipe:
    """How the pipelines of a family make whole images.

    Attributes:
        pipelines: names of diffusers' pipelines that `CLEARPipeline` drives, the plain one first.
        defaults: what suits the published models.
        latents: how the pipelines hold them.
        patch: side of a token, in latent pixels.
        step: sides of images are multiples of so many tokens.
        reduction: side of a latent pixel in pixels, where the autoencoder's configuration does not
            say it.
        widest: the longest side over the shortest, of images it was trained at; None where nobody
            has said. A model with another native size than `defaults` is taken to have been
            trained at squares.
        mu: (pipeline, image tokens, steps) to log(shift) by dynamic shifting.
        shift: static shift of the noise levels above the native size.
        ntk_factor: what "ntk" multiplies theta by above the native size, where somebody has
            published that for the family; None takes "two" with local attention, else "yarn".
        text_length: tokens of text that the model is given where a call does not say it.
        guidance: how a call is told of it.
        denoiser: how the transformer is called in a step.
        options: (pipeline) to arguments that every call takes besides.
        factor_counts_packing: whether a pipeline's `vae_scale_factor` is the side of as many latent
            pixels as are packed together, not of one.
        casts_latents: whether a pipeline casts its `latents=` to what the transformer takes.
        several_prompts: whether a call takes them, or one alone.
        prompts: (what `described` makes of a model) to how far it reads a prompt; None where it
            reads all of it, or a language model's words in its place.
        rewriters: methods of the pipelines by which a language model rewrites prompts, the first
            argument.
        defaults_of: (the transformer's configuration, model_index.json) to what suits a model that
            is not like the others, such as a distilled one; None where it is.
    """

    pipelines: tuple[str, ...]
    defaults: Defaults
    latents: Latents = Latents()
    patch: int = 2
    step: int = 1
    reduction: int | None = None
    widest: float | None = None
    mu: Callable[[Any, int, int], float] = log_shift
    shift: float = 3.0
    ntk_factor: float | None = None
    text_length: int = 512
    guidance: Guidance = Guidance()
    denoiser: Denoiser = Denoiser()
    options: Callable[[Any], Mapping[str, Any]] = no_options
    factor_counts_packing: bool = False
    casts_latents: bool = True
    several_prompts: bool = True
    prompts: Callable[[Any], PromptReading | None] = whole_length
    rewriters: tuple[str, ...] = ()
    defaults_of: Callable[[Mapping[str, Any], Mapping[str, Any]], Defaults | None] = (
        lambda config, index: None
    )

    @property
    def native_size(self) -> int:
        """Side of a square of as many pixels as the published models were trained at, in pixels."""
        return self.defaults.size

    def given_length(self, pipe: Any) -> int:
        """Tokens of text that a call with `options` gives the model, padding included, at most."""
        length: int = self.options(pipe).get("max_sequence_length", self.text_length)
        return length

    def trained_at(self, height: int, width: int, native_size: int) -> bool:
        """Whether a model of this native size, in pixels, knows an image's shape."""
        if native_size != self.native_size:
            return height == width
        return self.widest is None or max(height, width) <= self.widest * min(height, width)
