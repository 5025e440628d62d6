"""One prompt, one image: what is asked for, complete and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError, first_line
from ..families.recipe import Defaults
from ..families.schedule import Schedule, read_schedule
from ..kernels.numbers import integer, number
from ..pipelines.cascade.presets import AUTO as AUTO_PRESET
from ..pipelines.cascade.presets import PRESETS
from ..weights.known import AUTO
from .checks import (
    Bounds,
    check_quantize,
    check_size,
    check_upscaler,
    find_device,
    find_dtype,
    find_impl,
    find_window,
    take_numbers,
    takes_far,
)
from .dtypes import AUTO as AUTO_DTYPE
from .dtypes import resolve_dtype
from .image_input import read_image
from .lora import check_lora
from .models import Model, find_model
from .placing import check_offload
from .prompts import check_prompt

MAX_STEPS = 1000
NO_WEIGHTS = "none"
_BOUNDS: dict[str, Bounds] = {
    "radius": (1,),
    "down_factor": (1,),
    "steps": (1, MAX_STEPS),
    "guidance": (0, 100),
    "seed": (0, 2**63 - 1),
    "low_resolution_guidance": (0, 1),
    "lora_scale": (-4, 4),
}


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate, and how: complete and checked. `make_request` fills in what is not said.

    Attributes:
        prompt: the text.
        model: "demo", "demo-sd3", a folder in diffusers format, or a hub repository (owner/name).
        height, width: of the image, in pixels, whole tokens (16 pixels for most models).
        radius: of the window, in tokens.
        down_factor: side of a pooling cell, in tokens; 1 for none.
        far: whether the window has far keys; None as the weights were made for, and without any
            where `down_factor` is 1.
        weights: CLEAR weights: a file, a folder or a hub repository; "auto" for those known to fit
            model, radius, down_factor and far (see `known_weights`); None for the model's own.
        lora: a .safetensors file of a LoRA, which is added to the model's weights and CLEAR's; None
            for none.
        lora_scale: how strongly it acts, from -4 to 4.
        schedule: radii by layer and noise level (`clear-dit calibrate`), of this model, in place of
            `radius`, which is then that of the uniform window of as many FLOPs; None for one.
        attention: "clear" or "full".
        impl: see `local_attention`.
        steps: denoising steps.
        guidance: strength of guidance, as the model's pipeline takes it: FLUX.1-dev's embedded
            scale; for a model without one, the scale of classifier-free guidance against an empty
            prompt (two passes), 1 for none (0 for Z-Image and Krea 2).
        negative_prompt: what the image should not be, the prompt of guidance's second pass; None
            (and "") for the model's own.
        seed: of the initial noise.
        image: an image to enlarge to height x width, of that aspect ratio; None to start from
            noise.
        preset: of the stages above the native size: "auto", "repaint" or "refine".
        strength: of these stages, from 0 to 1: one for all, or one for each; None for the preset's.
        stage_steps: of these stages: one for all, or one for each; None for the preset's. See
            `CLEARPipeline` for all three.
        low_resolution_guidance: from 0 to 1, see `CLEARPipeline`; None for the default.
        upscaler: the .safetensors file of a network that enlarges images before they are
            repainted, see `load_upscaler`; None for none.
        stages_dir: a folder for finished stages, from which the same request goes on.
        dtype: "float32", "bfloat16" or "float16"; given "auto", what that is on `device` (see
            `resolve_dtype`).
        quantize: "int8", "fp8" or "nvfp4" for the transformer's linear layers, see `quantize`; None
            for `dtype`.
        offload: what waits on the CPU, see `place`.
        device: a torch device.

    Raises:
        RequestError: the first thing that is wrong.
    """

    prompt: str
    model: str
    height: int
    width: int
    radius: int
    down_factor: int
    far: bool | None
    weights: str | None
    lora: str | None
    lora_scale: float
    schedule: Schedule | None
    attention: str
    impl: str
    steps: int
    guidance: float
    negative_prompt: str | None
    seed: int
    image: str | None
    preset: str
    strength: tuple[float, ...] | None
    stage_steps: tuple[int, ...] | None
    low_resolution_guidance: float | None
    upscaler: str | None
    stages_dir: str | None
    dtype: str
    quantize: str | None
    offload: str
    device: str

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RequestError("the prompt is empty; describe an image.")
        model = find_model(self.model)
        take_numbers(self, _BOUNDS)
        for name in ("height", "width"):
            object.__setattr__(self, name, check_size(name, getattr(self, name), model.side_pixels))
        find_window(
            self.height,
            self.width,
            self.radius,
            self.down_factor,
            token_pixels=model.token_pixels,
            far=self.far is True,
        )
        if self.attention not in ("clear", "full"):
            raise RequestError(f"--attention must be clear or full, got {self.attention!r}.")
        if self.attention == "full" and self.weights not in (None, AUTO):
            raise RequestError("--weights are for --attention clear; leave them out with full.")
        if self.negative_prompt is not None:
            negative = _checked_negative(self.negative_prompt, self.guidance, model)
            object.__setattr__(self, "negative_prompt", negative)
        if self.lora is not None:
            check_lora(self.lora, model, _window_alone(self))
        elif self.lora_scale != 1:
            raise RequestError(f"--lora-scale {self.lora_scale:g} is of a --lora; name one.")
        if self.schedule is not None:
            _check_schedule(self, self.schedule)
        if self.preset not in PRESETS:
            raise RequestError(
                f"--preset must be one of {', '.join(PRESETS)}; got {self.preset!r}."
            )
        for name, check, most in (("strength", number, 1), ("stage_steps", integer, MAX_STEPS)):
            given = getattr(self, name)
            if given is not None:
                values = given if isinstance(given, (tuple, list)) else (given,)
                who = f"--{name.replace('_', '-')}"
                checked = tuple(check(who, x, 0, most, RequestError) for x in values)
                object.__setattr__(self, name, checked)
        if self.upscaler is not None:
            check_upscaler(self.upscaler)
        device = find_device(self.device)
        object.__setattr__(self, "dtype", resolve_dtype(self.dtype, device))
        dtype = find_dtype(self.dtype)
        check_quantize(self.quantize, device, dtype)
        check_offload(self.offload)
        if self.lora is not None and self.offload != "none":
            raise RequestError("--lora keeps all parts on the device; leave --offload out.")
        if self.attention == "clear":
            find_impl(self.impl, dtype, device)

    @property
    def stage_options(self) -> dict[str, Any]:
        """preset, strength and stage_steps as `CLEARPipeline` takes them."""
        found: dict[str, Any] = {"preset": self.preset}
        for name in ("strength", "stage_steps"):
            given = getattr(self, name)
            found[name] = given[0] if given is not None and len(given) == 1 else given
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        content = None if self.schedule is None else self.schedule.as_json()
        return asdict(self) | {"schedule": content}


def make_request(
    prompt: str, model: str = "demo", defaults: Defaults | None = None, **settings: Any
) -> GenerateRequest:
    """A request in which whatever is None or not named takes the model's default.

    Weights are "auto" by default, and "none" stands for the model's own.

    Args:
        prompt, model, settings: see `GenerateRequest`.
        defaults: those of the model, for many requests; `find_model` has them where None.

    Raises:
        RequestError: see `GenerateRequest`.
    """
    defaults = defaults or find_model(model).defaults
    device = str(find_device(settings.get("device")))
    height, width = defaults.size, defaults.size
    if settings.get("image") is not None:
        height, width = _enlarged_size(settings, find_model(model))
    complete: dict[str, Any] = {
        "height": height,
        "width": width,
        "radius": defaults.radius,
        "down_factor": 1,
        "far": None,
        "weights": AUTO,
        "lora": None,
        "lora_scale": 1.0,
        "schedule": None,
        "attention": "clear",
        "impl": "auto",
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "negative_prompt": None,
        "seed": 0,
        "image": None,
        "preset": AUTO_PRESET,
        "strength": None,
        "stage_steps": None,
        "low_resolution_guidance": None,
        "upscaler": None,
        "stages_dir": None,
        "dtype": AUTO_DTYPE,
        "quantize": None,
        "offload": "none",
    }
    complete |= {name: value for name, value in settings.items() if value is not None}
    if settings.get("schedule") is not None:
        if settings.get("radius") is not None:
            raise RequestError(
                f"--schedule has the radii of all layers; leave --radius {settings['radius']} out."
            )
        complete["schedule"] = schedule = find_schedule(settings["schedule"])
        complete["radius"] = schedule.radius
    if complete["weights"] == NO_WEIGHTS:
        complete["weights"] = None
    return GenerateRequest(prompt, model, **(complete | {"device": device}))


def find_schedule(schedule: Schedule | str) -> Schedule:
    """The schedule in a file; one that has been read already is taken as it is.

    Raises:
        RequestError: there is no such file, or it holds none.
    """
    if isinstance(schedule, Schedule):
        return schedule
    try:
        return read_schedule(schedule, "--schedule")
    except (OSError, ValueError) as error:
        raise RequestError(first_line(error)) from error


def _window_alone(request: GenerateRequest) -> tuple[int, int, bool] | None:
    """radius, down_factor and far of local attention with the model's own weights."""
    if request.attention == "full" or request.weights is not None or request.schedule is not None:
        return None
    far = takes_far(request.far, request.radius, request.down_factor)
    return request.radius, request.down_factor, far


def _check_schedule(request: GenerateRequest, schedule: Schedule) -> None:
    """Refuse settings that a schedule excludes.

    Raises:
        RequestError: by name.
    """
    if request.attention == "full":
        raise RequestError("--schedule is for --attention clear; leave it out with full.")
    if request.down_factor > 1:
        raise RequestError(
            f"--schedule has no pooled keys; leave --down-factor {request.down_factor} out."
        )
    if request.far not in (None, schedule.far):
        made = "far" if schedule.far else "no-far"
        raise RequestError(
            f"--schedule was made with --{made}; leave --far and --no-far out, or calibrate again."
        )


def _checked_negative(prompt: Any, guidance: float, model: Model) -> str | None:
    """A negative prompt that acts, without the white space around it; None for an empty one.

    Raises:
        RequestError: it is no prompt, or there is no second pass that would take it.
    """
    if not isinstance(prompt, str) or prompt.strip():
        prompt = check_prompt(prompt, "--negative-prompt")
    if not prompt.strip():
        return None
    if not model.takes_negative_prompt:
        raise RequestError(
            f"--negative-prompt: guidance of {model.index.path} has no second pass that takes a "
            "prompt; leave it out."
        )
    off = model.family.recipe.guidance.off
    if guidance <= off:
        raise RequestError(
            f"--negative-prompt acts in guidance's second pass, and --guidance {guidance:g} has "
            f"none; take more than {off:g}, or leave it out."
        )
    return str(prompt)


def _enlarged_size(settings: dict[str, Any], model: Model) -> tuple[int, int]:
    """Height and width of the image that an image is enlarged to."""
    from ..pipelines.cascade.given_image import check_image, enlarged_size

    height, width = (
        None if settings.get(name) is None else check_size(name, settings[name], model.side_pixels)
        for name in ("height", "width")
    )
    image = read_image(Path(settings["image"]))
    try:
        check_image(image, model.token_pixels)
        return enlarged_size(height, width, (image.height, image.width), model.side_pixels)
    except ValueError as error:
        raise RequestError(str(error)) from error
