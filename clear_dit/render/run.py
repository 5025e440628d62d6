"""`clear-dit render`: a file of jobs to a folder of images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import RequestError
from ..files import TEMPORARY_PREFIX
from ..generation.checks import find_device
from ..generation.request import GenerateRequest
from ..generation.runner import PipelineRunner
from .claims import Claims
from .jobs import JobReader, Reading, refusal, repetition
from .launch import Launch
from .manifest import DONE, FAILED, FILE, Manifest, check_own, job_file
from .progress import Progress
from .stopping import Stop, stop_by_signal
from .work import POLL, Work

logger: logging.Logger = logging.getLogger(__name__)


def render(
    path: Path,
    out: Path,
    settings: Mapping[str, Any],
    *,
    watch: bool = False,
    progress: bool = True,
    make_runner: Callable[[GenerateRequest], PipelineRunner] = PipelineRunner.of,
) -> dict[str, Any]:
    """Generate every job of a file that is not generated yet.

    Everything is validated first. Each image appears whole, with its settings in it and in
    NAME.json beside it; manifest.jsonl says what became of every job (see `read_manifest`), and
    keeps what it says of jobs of other files. A job is known again by its content: an image that is
    there and tells the same settings is not generated again, wherever its line stands now. Any
    number of processes, on one machine or on
    several that share the folder, generate together; none does what another does.

    Args:
        path: a .jsonl, .csv or .txt file, see `JobReader`.
        out: a folder, made if it is not there.
        settings: what a line does not say, see `JobReader`.
        watch: go on with lines that are written later, until asked to end.
        progress: show a bar on standard error.
        make_runner: of a request.

    Returns:
        out, jobs, done, failed, waiting (numbers of images), generated (by this process), seconds,
        stopped (whether a signal ended it).

    Raises:
        RequestError: a bad file or setting, or a manifest that no render wrote, before any work;
            all lines that are wrong are named.
        OSError: the disk is full or the device broken; the same call goes on.
        KeyboardInterrupt: a second signal.
    """
    start = time.monotonic()
    launch = Launch.from_environment()
    settings = {**settings, "device": str(find_device(launch.device(settings.get("device"))))}
    file = _JobFile(path, settings, watch, speaks=launch.rank == 0)
    jobs, errors, repeated = file.read()
    if errors:
        raise refusal(path, errors)
    if not jobs and not watch:
        raise RequestError(f"{path}: there is no job in it; write a prompt on each line.")
    if path.resolve() == (out / FILE).resolve():
        raise RequestError(f"{path} is the manifest of {out}; give the jobs another name.")
    check_own(out / FILE)
    file.tell_repeated(repeated)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out: there can be no folder {out} ({error.strerror}).") from error
    bar = Progress(progress and launch.rank == 0)
    claims = Claims(out)
    manifest = Manifest(out, claims, job_file(path, out))
    try:
        with stop_by_signal() as stop, logging_redirect_tqdm():
            work = Work(out, claims, manifest, make_runner, stop, bar, launch)
            with claims.arriving() as alone:
                if alone:
                    remove_unfinished(out)
                errors = work.take(jobs, alone)
            if errors:
                raise refusal(path, errors)
            _run(work, file, watch, stop)
    finally:
        bar.close()
        with claims.leaving() as last:
            if last and manifest.path.exists():
                manifest.compact()
                remove_unfinished(out)
    results = list(work.settled.values())
    return {
        "out": str(out),
        "jobs": len(results) + len(work.pending),
        "done": results.count(DONE),
        "failed": results.count(FAILED),
        "waiting": len(work.pending),
        "generated": work.generated,
        "seconds": round(time.monotonic() - start, 3),
        "stopped": stop.asked,
    }


def _run(work: Work, file: _JobFile, watch: bool, stop: Stop) -> None:
    while True:
        work.run(until=file.changed if watch else lambda: False)
        if not watch or stop.asked:
            return
        if file.changed():
            file.tell(_taken_again(work, file))
        else:
            stop.sleep(POLL)


def _taken_again(work: Work, file: _JobFile) -> list[str]:
    """Take the jobs that the file has now; what is wrong with it."""
    try:
        jobs, errors, repeated = file.read()
    except RequestError as error:  # such as a file that is being replaced
        return [str(error)]
    file.tell_repeated(repeated)
    return errors + work.take(jobs, alone=False)


class _JobFile:
    """A job file that may change; of several processes one speaks of what it may have."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], watch: bool, *, speaks: bool
    ) -> None:
        self._path, self._watch, self._speaks = path, watch, speaks
        self._reader = JobReader(settings, path.parent)
        self._state = self._look()
        self._told: set[str] = set()

    def read(self) -> Reading:
        self._state = self._look()
        return self._reader.read(self._path, growing=self._watch)

    def changed(self) -> bool:
        """Whether it is another file than when it was last read."""
        return self._look() != self._state

    def tell(self, errors: list[str]) -> None:
        """Say once what is wrong with it."""
        for error in errors:
            if error not in self._told:
                self._told.add(error)
                logger.error("%s, %s", self._path, error)

    def tell_repeated(self, repeated: Mapping[int, int]) -> None:
        """Say once which of its lines repeat others."""
        text = repetition(self._path, repeated)
        if repeated and self._speaks and text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)

    def _look(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


def remove_unfinished(out: Path) -> None:
    """What killed processes left half-written."""
    for left in out.glob(f"{TEMPORARY_PREFIX}*"):
        left.unlink(missing_ok=True)
