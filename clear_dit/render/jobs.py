"""Jobs from a file: complete, checked, each with its name and identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError
from ..generation.models import model_defaults
from ..generation.request import GenerateRequest, make_request
from ..generation.weights import settled, weights_file
from .identity import files_digest, identity, model_digest
from .lines import read_lines
from .names import name_from

MAX_JOBS = 100_000
# Errors, and lines that repeat others, that are told one by one.
_TOLD = 20


@dataclass(frozen=True)
class Job:
    """One image.

    Attributes:
        name: of its files in the folder, without suffix: the line's id, where it has one.
        line: its number in the file, from 1.
        request: what to generate.
        identity: see `identity`; two jobs that have the same are the same image.
    """

    name: str
    line: int
    request: GenerateRequest
    identity: str

    @property
    def image(self) -> str:
        """The name of its image's file."""
        return f"{self.name}.png"

    @property
    def sidecar(self) -> str:
        """The name of the file that has its settings and how it went."""
        return f"{self.name}.json"


class Reading(NamedTuple):
    """A job file, as it was read.

    Attributes:
        jobs: all of them, in its order.
        errors: what is wrong with it, by line.
        repeated: lines of jobs that an earlier line has too, which are left out, to those lines.
    """

    jobs: list[Job]
    errors: list[str]
    repeated: dict[int, int]


class JobReader:
    """Makes jobs of lines.

    Args:
        settings: what a line does not say, as `make_request` takes it, and "seeds", the number of
            images of a line; None for the model's default.
        folder: what relative paths of images and weights in lines start from.

    Raises:
        RequestError: the settings alone are wrong, or the model is not found.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path) -> None:
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._seeds = self._settings.pop("seeds", 1)
        self._folder = folder
        self._model = self._settings.get("model", "demo")
        self._defaults = model_defaults(self._model)
        make_request("settings only", defaults=self._defaults, **self._settings)
        self._model_digest = model_digest(self._model)
        self._weights: dict[tuple[Any, ...], tuple[str, bool]] = {}
        self._files: dict[str, str] = {}

    def read(self, path: Path, *, growing: bool = False) -> Reading:
        """All jobs of a file, and what is wrong with it, line by line.

        A line that repeats another without an id of its own is the same job, and left out.

        Args:
            path, growing: see `read_lines`.

        Raises:
            RequestError: the file cannot be read at all, or has more than MAX_JOBS jobs.
        """
        jobs: dict[str, Job] = {}
        errors = []
        repeated: dict[int, int] = {}
        for number, entry in read_lines(path, growing=growing):
            try:
                if isinstance(entry, RequestError):
                    raise entry
                found = self.jobs_of(entry, number)
                for job in found:
                    _refuse_taken(job, jobs, "id" in entry)
            except RequestError as error:
                errors.append(f"line {number}: {error}")
                continue
            for job in found:
                first = jobs.setdefault(job.name.lower(), job)
                if first is not job:
                    repeated.setdefault(number, first.line)
            if len(jobs) > MAX_JOBS:
                raise RequestError(f"{path}: at most {MAX_JOBS:,} images in one file; split it.")
        return Reading(list(jobs.values()), errors, repeated)

    def jobs_of(self, entry: Mapping[str, Any], line: int) -> list[Job]:
        """The jobs of one line: one for each of its seeds.

        Args:
            entry: what `check_values` returns.
            line: its number.

        Raises:
            RequestError: the first thing that is wrong.
        """
        values = dict(entry)
        label, seeds = values.pop("id", None), values.pop("seeds", self._seeds)
        for name in ("image", "weights", "lora", "schedule", "upscaler"):
            if name in values and (self._folder / values[name]).exists():
                values[name] = str(self._folder / values[name])
        first = make_request(defaults=self._defaults, **(self._settings | values))
        weights, far = self._weights_digest(first)
        files = (first.image, first.upscaler, first.lora)
        image, upscaler, lora = (self._file_digest(path) for path in files)
        first = replace(first, far=far)
        jobs = []
        for seed in range(first.seed, first.seed + seeds):
            request = replace(first, seed=seed)
            key = identity(request, self._model_digest, weights, image, upscaler, lora)
            if label is None:
                name = name_from(request.prompt, key)
            else:
                name = label if seeds == 1 else f"{label}-{seed}"
            jobs.append(Job(name, line, request, key))
        return jobs

    def _weights_digest(self, request: GenerateRequest) -> tuple[str, bool]:
        """Of the file that will be loaded, and whether there will be far keys.

        It is fetched for that where it is on the hub.
        """
        if request.attention == "full":
            return "", False
        key = (request.weights, request.radius, request.down_factor, request.far)
        if key not in self._weights:
            weights, far = settled(request)
            digest = "" if weights is None else files_digest([weights_file(weights, request)])
            self._weights[key] = digest, far
        return self._weights[key]

    def _file_digest(self, path: str | None) -> str:
        if path is None:
            return ""
        if path not in self._files:
            self._files[path] = files_digest([Path(path)])
        return self._files[path]


def _refuse_taken(job: Job, jobs: Mapping[str, Job], labelled: bool) -> None:
    """Refuse a name that another line has, where they are not the same job without ids."""
    other = jobs.get(job.name.lower())
    if other is not None and (labelled or other.identity != job.identity):
        raise RequestError(
            f"the id {job.name!r} is that of line {other.line} too; files on some systems do not "
            "tell upper from lower case. Give every line its own."
        )


def read_jobs(path: Path, settings: Mapping[str, Any]) -> list[Job]:
    """The jobs of a file, in its order.

    Args:
        path: a .jsonl, .csv or .txt file.
        settings: see `JobReader`.

    Raises:
        RequestError: something is wrong; names every line, up to twenty of them.
    """
    jobs, errors, _ = JobReader(settings, path.parent).read(path)
    if errors:
        raise refusal(path, errors)
    if not jobs:
        raise RequestError(f"{path}: there is no job in it; write a prompt on each line.")
    return jobs


def repetition(path: Path, repeated: Mapping[int, int]) -> str:
    """What is said of lines that repeat others, bounded, in one line."""
    told = [f"{line} (as {first})" for line, first in list(repeated.items())[:_TOLD]]
    if len(repeated) > _TOLD:
        told.append(f"and {len(repeated) - _TOLD:,} more")
    lines = "1 line repeats" if len(repeated) == 1 else f"{len(repeated):,} lines repeat"
    return f"{path}: {lines} what another asks for, which is generated once: {', '.join(told)}."


def refusal(path: Path, errors: list[str]) -> RequestError:
    """All errors of a file in one, bounded."""
    told = [f"  {error}" for error in errors[:_TOLD]]
    if len(errors) > _TOLD:
        told.append(f"  and {len(errors) - _TOLD:,} more")
    lines = "1 line" if len(errors) == 1 else f"{len(errors):,} lines"
    return RequestError("\n".join([f"{path}: {lines} cannot be generated:", *told]))
