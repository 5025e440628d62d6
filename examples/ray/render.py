"""`clear-dit render` on a Ray cluster: the jobs of a file, shared by as many actors as asked for.

    python examples/ray/render.py jobs.jsonl --out /shared/images --actors 8 --gpus 1

docs/clusters.md says how, and what happens when an actor or a machine is lost.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clear_dit.errors import RequestError
from clear_dit.generation.runner import PipelineRunner
from clear_dit.render.claims import Claims
from clear_dit.render.jobs import Job, read_jobs
from clear_dit.render.manifest import (
    DONE,
    FILE,
    WAITING,
    Entry,
    check_own,
    entry_of,
    job_file,
    merged,
    of_another_file,
    read_manifest,
    refuse_anothers,
    write_manifest,
)
from clear_dit.render.one_job import finished_before, generate_job
from clear_dit.render.run import remove_unfinished

# Seconds between two looks at a job that another process has, and for which to wait for actors
# that are asked to end.
POLL, ENDING = 0.5, 30.0


class Attempts:
    """Who began which job, on the driver's node: it outlives the actors that are lost."""

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = {}

    def begin(self, job: str, actor: str) -> None:
        self._begun.setdefault(job, []).append(actor)

    def of(self, job: str) -> list[str]:
        return self._begun.get(job, [])


class Generate:
    """What an actor does: one pipeline; a row of the data set in, an entry of the manifest out.

    Args:
        jobs: the job file, on the shared file system.
        out: the folder of the images, there too.
        settings: what lines do not say.
        tell: called with a job's id and what this actor is called before it begins that.
        make_runner: of a request.
    """

    def __init__(
        self,
        jobs: str,
        out: str,
        settings: Mapping[str, Any],
        tell: Callable[[str, str], None],
        make_runner: Any = PipelineRunner.of,
    ) -> None:
        self.jobs = {job.name: job for job in read_jobs(Path(jobs), settings)}
        self.out = Path(out)
        self.tell = tell
        self.name = f"process {os.getpid()} of {socket.gethostname()}"
        self.claims = Claims(self.out)
        with self.claims.arriving():  # until this process ends
            pass
        request = next(iter(self.jobs.values())).request
        self.runner = make_runner(request)

    def __call__(self, row: dict[str, Any]) -> Entry:
        """Generate the job whose id the row has, unless it is done."""
        self.tell(row["id"], self.name)
        # Every row of a data set has the same columns.
        return {"error": None, "seconds": None, **self._generate(self.jobs[row["id"]])}

    def _generate(self, job: Job) -> Entry:
        # Ray gives a row to another actor when it loses sight of one, which may still be at work.
        while True:
            with self.claims.job(job.name) as mine:
                if mine:
                    found = finished_before(self.out, job)
                    return found or generate_job(self.runner, self.out, job)
            time.sleep(POLL)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; another one ends the program with status 2."""
    parser = argparse.ArgumentParser(description="Generate a file of jobs on a Ray cluster.")
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="on the shared file system")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--actors", type=int, default=1, help="that generate at the same time")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor, such as 1")
    options = parser.parse_args(arguments)
    if options.actors < 1:
        parser.error(f"--actors must be at least 1, got {options.actors}.")
    if not 0 <= options.gpus < float("inf"):
        parser.error(f"--gpus must be 0 or more, got {options.gpus}.")
    return options


def prepare(options: argparse.Namespace, settings: Mapping[str, Any], file: str) -> list[Job]:
    """The jobs, all of them checked and told to wait in the manifest.

    Raises:
        RequestError: a bad file, before an actor starts.
    """
    # The device is the actors', not this process's.
    jobs = read_jobs(options.jobs, {**settings, "device": "cpu"})
    manifest = options.out / FILE
    check_own(manifest)
    told = read_manifest(manifest) if manifest.exists() else {}
    for job in jobs:
        refuse_anothers(job, told.get(job.name), file, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    tidy(options.out)
    own = (job for job in jobs if not of_another_file(told.get(job.name, {}), file))
    waiting = [entry_of(job, WAITING) for job in own]
    write_manifest(manifest, merged(manifest, waiting, file))
    return jobs


def tidy(folder: Path) -> bool:
    """Remove what killed processes left half-written; False if somebody is at work there."""
    claims = Claims(folder)
    with claims.arriving() as alone:
        if alone:
            remove_unfinished(folder)
    claims.close()
    return alone


def generate(
    jobs: list[Job], options: argparse.Namespace, settings: Mapping[str, Any]
) -> Iterator[tuple[Entry, list[str]]]:
    """What became of each job, as it is known, and the actors that began it, the last one last."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init()  # the cluster of RAY_ADDRESS or on this machine, else a new one
    ray.data.DataContext.get_current().enable_progress_bars = False
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    attempts = ray.remote(Attempts).options(num_cpus=0, scheduling_strategy=here).remote()

    def tell(job: str, actor: str) -> None:
        ray.get(attempts.begin.remote(job, actor))

    rows = [{"id": job.name} for job in jobs]
    places = (str(options.jobs.resolve()), str(options.out.resolve()))
    generated = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Generate,
        fn_constructor_args=(*places, settings, tell),
        # Ray starts an actor that is lost again, on any node with room for it, and gives it its row
        # again. It has one row at a time: others are for whoever is free.
        compute=ray.data.ActorPoolStrategy(size=options.actors, max_tasks_in_flight_per_actor=1),
        num_gpus=options.gpus,
    )
    for entry in generated.iter_rows():
        yield entry, ray.get(attempts.of.remote(entry["id"]))


def render(options: argparse.Namespace) -> int:
    """Generate what is not done; 0 if every image is there then, else 1."""
    settings = {
        "model": options.model,
        "device": "cuda" if options.gpus else "cpu",
        "dtype": "bfloat16" if options.gpus else "float32",
    }
    file = job_file(options.jobs, options.out)
    jobs = prepare(options, settings, file)
    manifest = options.out / FILE
    entries = {job.name: entry_of(job, WAITING) for job in jobs}
    settled = retried = 0
    try:
        for entry, actors in generate(jobs, options, settings):
            entries[entry["id"]] = entry
            settled += 1
            told = f"{settled} of {len(jobs)}: {entry['image']} {entry['status']}"
            if len(actors) > 1:
                retried += 1
                told += f", begun {len(actors)} times: {', then '.join(actors)}"
            print(told, flush=True)
    finally:
        write_manifest(manifest, merged(manifest, entries.values(), file))
    end = time.monotonic() + ENDING
    while not tidy(options.out) and time.monotonic() < end:
        time.sleep(POLL)
    done = sum(entry["status"] == DONE for entry in entries.values())
    print(f"{options.out}: {done} of {len(jobs)} images done, {retried} begun more than once")
    return int(done < len(jobs))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; its exit status."""
    options = parse(arguments)
    try:
        import ray.data
    except ModuleNotFoundError as error:
        return fail(f'no module {error.name!r}; pip install "ray[data]" on every node.', 2)
    try:
        return render(options)
    except RequestError as error:
        return fail(str(error), 2)
    except ray.exceptions.RayError as error:
        return fail(f"an actor failed: {cause(error)}", 1)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on.", 130)


def fail(text: str, status: int) -> int:
    """One line on standard error, and the exit status."""
    print(f"render.py: {text}", file=sys.stderr)
    return status


def cause(error: BaseException) -> str:
    """What an actor said last before it failed, in one line: Ray gives all of its traceback."""
    said = str(error).partition("\n\nThe above exception")[0]
    return said.strip().splitlines()[-1]


if __name__ == "__main__":
    raise SystemExit(main())
