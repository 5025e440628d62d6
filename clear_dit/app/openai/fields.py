"""What a request for images may say, and what is answered: the OpenAPI document is made of it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..entry import FIELDS, MAX_SEED
from ..settings import MAX_IMAGES, MAX_PROMPT, MAX_STEPS
from .errors import ParamError

MAX_PARTIAL = 3
# What browsers and Pillow call them, by OpenAI's name.
KINDS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


class ImageRequest(BaseModel):
    """A request for images: OpenAI's parameters, and after them those of this server.

    What it cannot do is refused, not ignored. None is the default of every one.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", title="CreateImageRequest")

    prompt: Annotated[str, Field(max_length=MAX_PROMPT, description="What to show.")]
    model: Annotated[
        str | None, Field(description="One of GET /v1/models; the first by default.")
    ] = None
    n: Annotated[
        int | None,
        Field(ge=1, le=MAX_IMAGES, description="How many, each with the next seed; 1 by default."),
    ] = None
    size: Annotated[
        str | None,
        Field(
            pattern=r"^([1-9][0-9]{1,4}x[1-9][0-9]{1,4}|auto)$",
            description="WIDTHxHEIGHT in pixels, both multiples of the model's tokens (16 pixels "
            "for most); auto, the default, is the model's own, or that of the image to edit.",
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="b64_json, the default, or a URL that holds for an hour."),
    ] = None
    output_format: Annotated[
        Literal["png", "jpeg", "webp"] | None, Field(description="png by default.")
    ] = None
    stream: Annotated[
        bool | None, Field(description="Whether to send events, the last of each image with it.")
    ] = None
    partial_images: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_PARTIAL,
            description="With stream: how many small previews (JPEG) to send at most; 0 by "
            "default.",
        ),
    ] = None
    quality: Annotated[
        Literal["auto", "standard"] | None, Field(description="Nothing to choose: see steps.")
    ] = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description="There is none.")] = None
    user: Annotated[str | None, Field(max_length=256, description="Not read.")] = None
    seed: Annotated[
        int | None, Field(ge=0, le=MAX_SEED, description="Of the first image; random by default.")
    ] = None
    negative_prompt: Annotated[
        str | None, Field(max_length=MAX_PROMPT, description="What to keep away from.")
    ] = None
    steps: Annotated[
        int | None, Field(ge=1, le=MAX_STEPS, description="The model's by default.")
    ] = None
    guidance: Annotated[
        float | None, Field(ge=0, le=100, description="The model's by default.")
    ] = None
    strength: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="How much of the image to edit, or of a stage above the model's native "
            "size, is painted anew.",
        ),
    ] = None
    attention: Annotated[
        Literal["clear", "full"] | None, Field(description="clear by default.")
    ] = None
    radius: Annotated[
        int | None, Field(ge=1, le=512, description="Of the attention window, in tokens.")
    ] = None
    down_factor: Annotated[
        int | None,
        Field(ge=1, le=64, description="Side of a pooling cell in tokens; 1, the default: none."),
    ] = None
    far: Annotated[
        bool | None,
        Field(description="Whether tokens see the whole image; as the weights were made for."),
    ] = None
    lora: Annotated[str | None, Field(max_length=256, description="One of the server's.")] = None
    lora_scale: Annotated[
        float | None, Field(ge=-4, le=4, description="How much of it is added; 1 by default.")
    ] = None

    def entry(self) -> dict[str, Any]:
        """What it says of an image, see `entry.Entry`; its size apart.

        Raises:
            ParamError: parameters that exclude each other.
        """
        if self.stream and self.response_format == "url":
            raise ParamError(
                "response_format: events hold the image itself; leave it out, or stream.",
                "response_format",
            )
        if self.partial_images and not self.stream:
            raise ParamError("partial_images: set stream, too.", "partial_images")
        return {name: getattr(self, name) for name in FIELDS if name in type(self).model_fields}

    def pixels(self) -> tuple[int, int] | None:
        """Width and height; None for auto."""
        if self.size in (None, "auto"):
            return None
        width, _, height = str(self.size).partition("x")
        return int(width), int(height)


R = TypeVar("R", bound=BaseModel)


def parse(kind: type[R], body: bytes | dict[str, str]) -> R:
    """A request: of JSON, whose types must be right, or of a form, where all is text.

    Raises:
        ParamError: the first thing that is wrong.
    """
    try:
        if isinstance(body, bytes):
            return kind.model_validate_json(body, strict=True)
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        if first["type"] == "json_invalid":
            raise ParamError("The request is not JSON.") from error
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ParamError(
                f"There is no parameter {str(param)[:40]!r}; there are {known}.", str(param)[:40]
            ) from error
        if param is None:
            raise ParamError("The request must be a JSON object.") from error
        words = first["msg"][:1].lower() + first["msg"][1:]
        got = "" if first["type"] == "missing" else f", got {repr(first['input'])[:60]}"
        raise ParamError(f"{param}: {words}{got}.", param) from error


class ImageData(BaseModel):
    """One image.

    Attributes:
        b64_json: the file in base64; or
        url: where it can be fetched for an hour, without a key.
        seed: that makes it again.
    """

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesAnswer(BaseModel):
    """The images of a request.

    Attributes:
        created: seconds since 1970.
        size: WIDTHxHEIGHT, in pixels.
        output_format: of the files.
        background: they have one.
        data: one after the other.
    """

    created: int
    size: str
    output_format: Literal["png", "jpeg", "webp"]
    background: Literal["opaque"]
    data: list[ImageData]


class ModelAnswer(BaseModel):
    """A model of the server."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "clear-dit"


class ModelsAnswer(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]
