"""The whole evaluation: generate, compare, write the table and the contact sheet."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..families.table import channels_of
from ..files import own_folder, whole_file
from ..generation.checks import find_device, find_dtype
from ..generation.denoising import text_length
from ..generation.image_input import open_image
from ..generation.image_output import save_png
from ..generation.models import load_pipeline, model_path
from ..pipelines.decoding.image_files import METADATA_KEY
from . import output_error
from .images import ImageSet, fingerprint
from .measure import Values, choose_metrics, measure
from .networks import make_networks
from .report import layer_gflop, make_report, markdown
from .request import EvaluateRequest, Variant
from .sheet import contact_sheet
from .variants import TextCache, attention_of, check_weights, generate_missing

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline

logger: logging.Logger = logging.getLogger(__name__)

SHEET_ROWS = 8
REPORT, TABLE, SHEET = "report.json", "report.md", "contact-sheet.png"


def evaluate(request: EvaluateRequest, out: Path, progress: bool = True) -> dict[str, Any]:
    """Generate what is missing of every variant, compare the images, and write the result.

    Images lie in out/images/VARIANT; a run that was stopped goes on where it was, and one with
    other settings generates only what differs. Writes report.md, report.json and contact-sheet.png.

    Args:
        request: what to evaluate.
        out: a folder, made if it is not there.
        progress: show progress bars on standard error.

    Returns:
        What report.json holds, see `make_report`; and generated, how many images this run made.

    Raises:
        RequestError: a bad request, before any work.
        OSError: something cannot be written; nothing is left under its name.
    """
    generation = request.generation
    networks = make_networks(model_path(generation.model), generation.height, generation.width)
    names, left_out = choose_metrics(request, networks)
    pipe = load_pipeline(
        generation.model, find_dtype(generation.dtype), find_device(generation.device)
    )
    check_weights(pipe, request.variants)
    with own_folder(out):
        pipe.set_progress_bar_config(disable=True)
        model = (text_length(pipe), pipe.token_pixels, channels_of(pipe.transformer))
        gflop = {
            variant.folder: layer_gflop(request, variant, *model) for variant in request.variants
        }
        work = _Work(pipe, request, out, "output_mse" in names, progress)
        for variant in request.variants:
            work.do(variant)
        sets, values, generated = work.sets, work.values, work.generated
        # The metrics' networks may need the room.
        del pipe, work
        found = measure(request, sets, names, networks, progress)
        for folder, more in found.items():
            values[folder].update(more)
        impls = {folder: _impl(images) for folder, images in sets.items()}
        report = make_report(request, values, left_out, gflop, impls)
        _write(report, request, sets, out)
    return report | {"generated": generated}


class _Work:
    """What needs the pipeline: images and predictions, one variant after the other."""

    def __init__(
        self,
        pipe: CLEARPipeline,
        request: EvaluateRequest,
        out: Path,
        output_mse: bool,
        progress: bool,
    ) -> None:
        self.pipe, self.request, self.out = pipe, request, out
        self.output_mse, self.progress = output_mse, progress
        self.texts = TextCache(pipe.device)
        self.sets: dict[str, ImageSet] = {}
        self.values: Values = {variant.folder: {} for variant in request.variants}
        self.generated = 0
        self.points: list[output_error.Point] = []
        self.teacher_fingerprint = ""
        self.teacher_predictions: list[Any] | None = None

    def do(self, variant: Variant) -> None:
        """Generate a variant; the teacher comes first."""
        with attention_of(self.pipe, variant) as impl:
            name = fingerprint(self.pipe)
            images = self._images(variant, name)
            self.sets[variant.folder] = images
            self.generated += generate_missing(
                self.pipe, self.request, variant, images, self.texts, impl, self.progress
            )
        if not self.output_mse:
            return
        if variant.kind == "teacher":
            self.points = output_error.make_points(self.request, images)
            self.teacher_fingerprint = name
            return
        asked = output_error.question(self.request, self.points, self.teacher_fingerprint, name)
        value = output_error.read_value(images.folder, asked)
        if value is None:
            if self.teacher_predictions is None:
                self.teacher_predictions = self._predictions()
            with attention_of(self.pipe, variant):
                student = self._predictions()
            value = output_error.mean_squared_error(self.teacher_predictions, student)
            output_error.write_value(images.folder, asked, value)
        self.values[variant.folder]["output_mse"] = value

    def _predictions(self) -> list[Any]:
        return output_error.predict_all(
            self.pipe, self.request, self.points, self.texts, self.progress
        )

    def _images(self, variant: Variant, pipe_fingerprint: str) -> ImageSet:
        generation = self.request.generation
        common = {
            key: value
            for key, value in asdict(generation).items()
            if key in ("height", "width", "steps", "guidance", "dtype")
        }
        common |= {
            "radius": variant.radius,
            "down_factor": variant.down_factor,
            "fingerprint": pipe_fingerprint,
        }
        wanted = [
            {"prompt": prompt, "seed": generation.seed + index, **common}
            for index, prompt in enumerate(self.request.prompts)
        ]
        keep = output_error.IMAGES if variant.kind == "teacher" else 0
        folder = self.out / "images" / variant.folder
        return ImageSet(folder, wanted, (generation.height, generation.width), keep)


def _impl(images: ImageSet) -> str:
    """The attention that generated, as the first image says."""
    with open_image(images.path(0)) as image:
        return str(json.loads(image.info[METADATA_KEY])["impl"])


def _write(
    report: dict[str, Any], request: EvaluateRequest, sets: dict[str, ImageSet], out: Path
) -> None:
    with whole_file(out / REPORT) as file:
        file.write(json.dumps(report, indent=2, ensure_ascii=False).encode())
    with whole_file(out / TABLE) as file:
        file.write(markdown(report).encode())
    rows = min(SHEET_ROWS, len(request.prompts))
    columns = [
        (variant.label, [_thumbnail(sets[variant.folder], index) for index in range(rows)])
        for variant in request.variants
    ]
    sheet = contact_sheet(columns, request.prompts[:rows])
    save_png(sheet, out / SHEET, report["settings"])


def _thumbnail(images: ImageSet, index: int) -> Image.Image:
    with open_image(images.path(index)) as image:
        image.thumbnail((1024, 1024))
        return image.copy()
