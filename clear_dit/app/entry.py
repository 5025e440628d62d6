"""What a visitor entered, and from it requests that are within the server's bounds."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError, first_line
from ..generation.checks import MAX_SIDE
from ..generation.models import Model, find_model
from ..generation.prompts import check_prompt
from ..generation.request import GenerateRequest, make_request
from ..kernels.numbers import as_integer, as_number
from .settings import MAX_FULL_PIXELS, MAX_PROMPT, MAX_STEPS, Settings

ATTENTIONS = ("clear", "full", "both")
MAX_SEED = 2**53 - 1  # what JavaScript counts to
_MAX_LORA_SCALE = 4
# What errors call the fields where it is not their own name.
_TITLES = {"down_factor": "Pooling", "lora": "LoRA", "lora_scale": "LoRA strength"}


class EntryError(RequestError):
    """A bad entry, in words for the visitor; `field` is that of `Entry` which is at fault."""

    def __init__(self, words: str, field: str | None = None) -> None:
        super().__init__(words)
        self.field = field


@dataclass(frozen=True)
class Entry:
    """What a visitor entered, nothing of it checked.

    Attributes:
        prompt: what to generate.
        negative_prompt: what to keep away from; "" for the model's own.
        model: one of the server's.
        width, height: in pixels, whole tokens of the model.
        attention: "clear", "full" or "both", which generates the image twice.
        radius: of the window, in tokens.
        down_factor: side of a pooling cell, in tokens; 1 for none.
        far: whether to see the whole image by far keys; None as the weights were made for.
        steps, guidance, seed: see `GenerateRequest`.
        image: the name of an upload to enlarge; "" to start from noise.
        strength: the noise level from which an image, or a stage above the native size, is
            repainted, 0 to 1; None for the preset's.
        lora: the name of one of the server's; "" for none.
        lora_scale: how much of it is added.
    """

    prompt: Any
    negative_prompt: Any
    model: Any
    width: Any
    height: Any
    attention: Any
    radius: Any
    down_factor: Any
    far: Any
    steps: Any
    guidance: Any
    seed: Any
    image: Any
    strength: Any
    lora: Any
    lora_scale: Any

    def as_json(self) -> dict[str, Any]:
        """By field."""
        return asdict(self)


FIELDS = tuple(field.name for field in fields(Entry))


def make_entry(given: Any, settings: Settings) -> Entry:
    """An entry of a JSON object; what it does not have, or null, is the model's default.

    Raises:
        EntryError: it is no object, has a field that no entry has, or a model that is not one of
            the server's: of others nothing is looked for.
    """
    if not isinstance(given, Mapping):
        raise EntryError("An entry must be an object with a prompt.")
    unknown = [str(name)[:40] for name in given if name not in FIELDS]
    if unknown:
        raise EntryError(f"An entry has no {unknown[0]!r}; it has {', '.join(FIELDS)}.")
    model = given.get("model") or settings.models[0]
    if not isinstance(model, str) or model not in settings.models:
        raise EntryError(f"Model must be one of {', '.join(settings.models)}.", "model")
    found = find_model(model)
    defaults, side = found.defaults, default_side(found, settings)
    complete = {
        "prompt": "",
        "negative_prompt": "",
        "width": side,
        "height": side,
        "attention": "clear",
        "radius": defaults.radius,
        "down_factor": 1,
        "far": None,
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "seed": 0,
        "image": "",
        "strength": None,
        "lora": "",
        "lora_scale": 1.0,
    }
    complete |= {name: value for name, value in given.items() if value is not None}
    return Entry(**(complete | {"model": model}))


def default_side(model: Model, settings: Settings) -> int:
    """Of a model's own square, or of the largest that the server makes."""
    step = model.side_pixels
    return min(model.defaults.size, math.isqrt(settings.max_pixels) // step * step)


def loras(settings: Settings) -> dict[str, Path]:
    """The LoRA files that visitors may choose from, by name."""
    if settings.loras is None:
        return {}
    found = sorted(settings.loras.glob("*.safetensors"))
    return {path.stem: path for path in found if path.is_file()}


def make_requests(
    entry: Entry, settings: Settings, image: str | None = None
) -> tuple[GenerateRequest, ...]:
    """One request, or with "both" that of CLEAR and that of full attention.

    Args:
        entry: what was entered, of `make_entry`.
        settings: of the server.
        image: the file of an image to enlarge; it has been checked.

    Raises:
        EntryError: the first thing that is wrong or out of bounds.
    """
    if entry.model not in settings.models:
        raise EntryError(f"Model must be one of {', '.join(settings.models)}.", "model")
    negative = None
    if entry.negative_prompt not in ("", None) and str(entry.negative_prompt).strip():
        negative = _text("negative_prompt", entry.negative_prompt)
    if entry.attention not in ATTENTIONS:
        raise EntryError(f"Attention must be {', '.join(ATTENTIONS)}.", "attention")
    if entry.far is not None and not isinstance(entry.far, bool):
        raise EntryError("Far must be true, false or null.", "far")
    step = find_model(entry.model).side_pixels
    width, height = (_side(name, getattr(entry, name), step) for name in ("width", "height"))
    if width * height > settings.max_pixels:
        raise EntryError(
            f"{width} × {height} px are {width * height:,} pixels; this server generates at most "
            f"{settings.max_pixels:,}.",
            "width",
        )
    if entry.attention != "clear" and width * height > MAX_FULL_PIXELS:
        raise EntryError(
            f"Full attention is offered up to {MAX_FULL_PIXELS:,} pixels (its time grows with "
            f"their square), and this image has {width * height:,}; choose CLEAR or a smaller one.",
            "attention",
        )
    strength = entry.strength
    if strength is not None:
        strength = (_number("strength", strength, 0, 1),)
    options = {
        "width": width,
        "height": height,
        "radius": _whole("radius", entry.radius, 1, 512),
        "down_factor": _whole("down_factor", entry.down_factor, 1, 64),
        "far": entry.far,
        "steps": _whole("steps", entry.steps, 1, MAX_STEPS),
        "guidance": _number("guidance", entry.guidance, 0, 100),
        "seed": _whole("seed", entry.seed, 0, MAX_SEED),
        "strength": strength,
        "negative_prompt": negative,
    }
    if entry.far and options["down_factor"] != 1:
        raise EntryError("Seeing all and pooling exclude each other; choose one.", "far")
    options |= _lora(entry, settings)
    prompt = _text("prompt", entry.prompt)  # last, as it is entered last
    try:
        request = make_request(
            prompt,
            entry.model,
            image=image,
            upscaler=settings.upscaler,
            attention="full" if entry.attention == "full" else "clear",
            dtype=settings.dtype,
            quantize=settings.quantize,
            offload=settings.offload,
            device=settings.device,
            **options,
        )
    except RequestError as error:
        raise EntryError(for_visitor(error, settings.loras)) from error
    if entry.attention != "both":
        return (request,)
    return (request, replace(request, attention="full"))


def for_visitor(error: Exception, folder: Path | None = None) -> str:
    """What an error of the program says, without the names that options and classes have in it.

    Args:
        folder: of files that it may name, which is nobody's business.
    """
    words = first_line(error)
    if folder is not None:
        words = words.replace(f"{folder}{os.sep}", "")
    words = re.sub(r"^(--)?[A-Za-z_]+: ", "", words)
    words = re.sub(r"--(?:no-)?([a-z]+(?:-[a-z]+)*)", lambda name: name[1].replace("-", " "), words)
    return words[:1].upper() + words[1:]


def _lora(entry: Entry, settings: Settings) -> dict[str, Any]:
    if not entry.lora:
        return {}
    found = loras(settings)
    if not isinstance(entry.lora, str) or entry.lora not in found:
        names = ", ".join(found) or "none here"
        raise EntryError(f"LoRA must be one of the server's: {names}.", "lora")
    most = _MAX_LORA_SCALE
    scale = _number("lora_scale", entry.lora_scale, -most, most)
    return {"lora": str(found[entry.lora]), "lora_scale": scale}


def _text(field: str, value: Any) -> str:
    title = field.replace("_", " ").capitalize()
    if not isinstance(value, str):
        raise EntryError(f"{title} must be text.", field)
    if not value.strip():
        raise EntryError("Enter a prompt first: what the image should show.", field)
    if len(value) > MAX_PROMPT:
        raise EntryError(
            f"{title}: at most {MAX_PROMPT:,} characters are read, and this has {len(value):,}.",
            field,
        )
    try:
        return check_prompt(" ".join(value.split()), title)
    except RequestError as error:
        raise EntryError(str(error), field) from error


def _side(field: str, value: Any, step: int) -> int:
    pixels = _whole(field, value, step, MAX_SIDE)
    if pixels % step:
        lower = pixels // step * step
        raise EntryError(
            f"{_title(field)} must be a multiple of {step} pixels; the nearest are {lower} and "
            f"{lower + step}.",
            field,
        )
    return pixels


def _whole(field: str, value: Any, least: int, most: int) -> int:
    number = as_integer(_number(field, value, least, most, whole=True))
    if number is None:
        raise EntryError(f"{_title(field)} must be a whole number.", field)
    return number


def _number(field: str, value: Any, least: float, most: float, whole: bool = False) -> float:
    number = as_number(value)
    if number is None:
        kind = "a whole number" if whole else "a number"
        raise EntryError(f"{_title(field)} must be {kind}.", field)
    if not least <= number <= most:
        raise EntryError(f"{_title(field)} must be from {least:,} to {most:,}.", field)
    return number


def _title(field: str) -> str:
    return _TITLES.get(field, field.capitalize())
