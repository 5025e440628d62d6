"""What to evaluate: the request, its checks, and the rows of the table it makes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import RequestError
from ..generation.checks import find_window, take_numbers, takes_far
from ..generation.models import find_model
from ..generation.prompts import read_prompts
from ..generation.request import GenerateRequest, make_request
from ..kernels.numbers import integer
from ..weights.format import made_for_far
from ..weights.known import adapter_folder
from ..weights.load import find_weights
from .metrics import METRICS

MAX_COUNT = 100_000
MAX_BATCH = 256
PUBLISHED_NAME = re.compile(r"clear_(?:local|far)_(\d{1,6})(?:_down_(\d{1,3}))?")

# Radius and down_factor, in tokens, and whether there are far keys.
Setting = tuple[int, int, bool]


@dataclass(frozen=True)
class Variant:
    """A row of the table: an attention and its weights.

    Attributes:
        label: for people.
        folder: where its images lie; different for weights that differ.
        radius, down_factor: of the window, in tokens; None and 1 for full attention.
        far: whether it takes far keys.
        weights: fine-tuned weights, None for the model's own.
    """

    label: str
    folder: str
    radius: int | None = None
    down_factor: int = 1
    far: bool = False
    weights: Path | None = None

    @property
    def kind(self) -> str:
        """teacher, untuned or distilled."""
        if self.radius is None:
            return "teacher"
        return "untuned" if self.weights is None else "distilled"

    @property
    def setting(self) -> tuple[int | None, int, bool]:
        """What an untuned and a distilled variant have in common."""
        return self.radius, self.down_factor, self.far


TEACHER = Variant("full attention", "full")


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate, complete and checked. `make_evaluate_request` fills in what is not said.

    Attributes:
        generation: model, size, steps, guidance, seed, dtype and device of every image; image i
            starts from noise of seed + i.
        prompts: one for each image.
        source: where they are from: "demo" or a file.
        variants: the teacher, then the students.
        metrics: names out of METRICS.
        explicit: whether the metrics were asked for by name, so that none may be left out.
        batch: images at once.

    Raises:
        RequestError: the first thing that is wrong.
    """

    generation: GenerateRequest
    prompts: tuple[str, ...]
    source: str
    variants: tuple[Variant, ...]
    metrics: tuple[str, ...]
    explicit: bool
    batch: int

    def __post_init__(self) -> None:
        take_numbers(self, {"batch": (1, MAX_BATCH)})
        if self.generation.seed + len(self.prompts) > 2**63:
            raise RequestError("--seed: the last image's seed must be below 2^63.")
        for variant in self.variants[1:]:
            assert variant.radius is not None
            find_window(
                self.generation.height,
                self.generation.width,
                variant.radius,
                variant.down_factor,
                token_pixels=find_model(self.generation.model).token_pixels,
                far=variant.far,
            )


def make_evaluate_request(
    model: str,
    prompts: str,
    count: int,
    *,
    weights: Sequence[str] = (),
    radii: Sequence[int] = (),
    down_factor: int = 1,
    far: bool | None = None,
    metrics: str = "auto",
    batch: int = 4,
    **settings: Any,
) -> EvaluateRequest:
    """A request in which whatever is None or not named takes the model's default.

    Args:
        model: "demo", "demo-sd3", a folder in diffusers format, or a hub repository (owner/name).
        prompts: "demo" for the demo's held-out captions, or a file (see `read_prompts`).
        count: images of each variant: the first prompts there are.
        weights: each a file, CLEAR weights or a LoRA, whose metadata or published name says radius,
            down_factor and far, or else the only one of `radii`, `down_factor` and `far` do; or a
            folder or hub repository, of which the files for `radii`, `down_factor` and `far` are
            taken. Each comes with an untuned row of the same settings.
        radii: of untuned rows, in tokens; without them and without weights, the model's default.
        down_factor: that goes with `radii`, in tokens.
        far: that goes with `radii`: whether they take far keys; None for far keys unless
            `down_factor` is above 1.
        metrics: names with commas, or "auto" for all that can be computed here.
        batch: images at once.
        settings: height, width, steps, guidance, seed, dtype, device, as in `GenerateRequest`.

    Raises:
        RequestError: see `EvaluateRequest`; or the prompts, the weights' files, a metric's name.
    """
    count = integer("--count", count, 1, MAX_COUNT, RequestError)
    down_factor = integer("--down-factor", down_factor, 1, error=RequestError)
    radii = [integer("--radius", radius, 1, error=RequestError) for radius in radii]
    names = _metric_names(metrics)
    generation = make_request("evaluation", model, **settings)
    texts = evaluation_prompts(prompts, count)
    files = [file for name in weights for file in _weight_files(name, radii, down_factor, far)]
    if not files and not radii:
        radii = [generation.radius]
    untuned = [(radius, down_factor, takes_far(far, radius, down_factor)) for radius in radii]
    return EvaluateRequest(
        generation=generation,
        prompts=tuple(texts),
        source=prompts,
        variants=_variants(untuned, files),
        metrics=names or tuple(METRICS),
        explicit=bool(names),
        batch=batch,
    )


def evaluation_prompts(source: str, count: int) -> list[str]:
    """Exactly `count` prompts: the demo's held-out captions for "demo", else those of a file."""
    if source == "demo":
        from ..demo.probe import held_out_captions

        return held_out_captions(count)
    texts = read_prompts(source, limit=count)
    if len(texts) < count:
        raise RequestError(
            f"--count is {count}, but {source} has {len(texts)} prompts; ask for fewer."
        )
    return texts


def _metric_names(metrics: str) -> tuple[str, ...]:
    """In the order of METRICS, each once; empty for "auto"."""
    names = {name.strip() for name in metrics.split(",")}
    unknown = sorted(names - METRICS.keys() - {"auto"})
    if unknown:
        raise RequestError(
            f"--metrics: unknown {', '.join(map(repr, unknown))}; choose auto, or of "
            f"{', '.join(METRICS)}, with commas between."
        )
    return () if "auto" in names else tuple(name for name in METRICS if name in names)


def weights_settings(path: Path, given: Sequence[Setting] = ()) -> Setting:
    """radius, down_factor and far of a file of CLEAR weights.

    From its metadata (`save_clear_weights` writes them), else from a published name such as
    clear_local_8_down_4.safetensors, else the settings given, if there is one.

    Raises:
        RequestError: it is not safetensors, or nothing says them.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header, made_for = file.metadata() or {}, made_for_far(file)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"--weights: {path} is not a safetensors file, or truncated.") from error
    published = PUBLISHED_NAME.fullmatch(path.stem)
    if "radius" in header:
        said = (header["radius"], header.get("down_factor", "1"))
    elif published is not None:
        said = (published[1], published[2] or "1")
    elif len(set(given)) == 1:
        return given[0]
    else:
        raise RequestError(
            f"--weights: {path} does not say its radius, in its metadata or by a published name; "
            "say it with one --radius (and --down-factor or --no-far)."
        )
    radius, factor = said
    if not all(number.isdecimal() and len(number) < 10 for number in (radius, factor)):
        raise RequestError(
            f"--weights: {path} has no numbers for radius and down_factor: {radius}, {factor}."
        )
    if header.get("far", "true") not in ("true", "false"):
        raise RequestError(
            f"--weights: {path} has neither true nor false for far: {header['far']!r}."
        )
    return int(radius), int(factor), made_for


def _weight_files(
    name: str, radii: Sequence[int], down_factor: int, far: bool | None
) -> list[Path]:
    if Path(name).is_file():
        return [Path(name)]
    if not radii:
        raise RequestError(
            f"--weights: {name!r} is not a file; for a folder or a hub repository say which with "
            "--radius (and --down-factor)."
        )
    try:
        return [find_weights(name, radius, down_factor, far) for radius in radii]
    except (ValueError, OSError) as error:
        raise RequestError(f"--weights: {error}") from error


def _variants(untuned: Sequence[Setting], files: Sequence[Path]) -> tuple[Variant, ...]:
    """The teacher; then for every setting the untuned model and those distilled for it."""
    tuned = [(weights_settings(path, untuned), path) for path in files]
    settings = dict.fromkeys([*untuned, *(setting for setting, _ in tuned)])
    variants = [TEACHER]
    for setting in settings:
        radius, factor, far = setting
        title = f"CLEAR r={radius}" + (" far" if far else "")
        title += f", down {factor}" if factor > 1 else ""
        folder = adapter_folder(*setting)
        variants.append(Variant(f"{title}, untuned", folder, *setting))
        paths = {_digest(path): path for its, path in tuned if its == setting}
        for digest, path in paths.items():
            # Several for one setting are told apart by their folder and name.
            which = f" ({path.parent.name}/{path.stem})" if len(paths) > 1 else ""
            label = f"{title}, distilled{which}"
            variants.append(Variant(label, f"{folder}-{digest[:12]}", *setting, path))
    return tuple(variants)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
