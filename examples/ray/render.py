"""`clear-dit render` on a Ray cluster: the jobs of a file, shared by as many actors as asked for.

    python examples/ray/render.py jobs.jsonl --out /shared/images --actors 8 --gpus 1

See README.md beside this file. Ray is needed by `main` only.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


class Generate:
    """What an actor does: one pipeline; a row of the data set in, an entry of the manifest out.

    Args:
        jobs: the job file, on the shared file system.
        out: the folder of the images, there too.
        settings: what lines do not say.
        make_runner: of a request.
    """

    def __init__(
        self, jobs: str, out: str, settings: Mapping[str, Any], make_runner: Any = PipelineRunner.of
    ) -> None:
        self.jobs = {job.name: job for job in read_jobs(Path(jobs), settings)}
        self.out = Path(out)
        self.claims = Claims(self.out)
        with self.claims.arriving():  # until this process ends
            pass
        request = next(iter(self.jobs.values())).request
        self.runner = make_runner(request)

    def __call__(self, row: dict[str, Any]) -> Entry:
        """Generate the job whose id the row has, unless it is done."""
        # Every row of a data set has the same columns.
        return {"error": None, "seconds": None, **self._generate(self.jobs[row["id"]])}

    def _generate(self, job: Job) -> Entry:
        # Ray gives a row to another actor when it loses sight of one, which may still be at work.
        with self.claims.job(job.name) as mine:
            if not mine:
                return entry_of(job, WAITING)
            return finished_before(self.out, job) or generate_job(self.runner, self.out, job)


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate a file of jobs on a Ray cluster.")
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="on the shared file system")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    options = parser.parse_args()
    import ray

    settings = {
        "model": options.model,
        "device": "cuda" if options.gpus else "cpu",
        "dtype": "bfloat16" if options.gpus else "float32",
    }
    # A bad file is refused before an actor starts. The device is the actors', not this process's.
    jobs = read_jobs(options.jobs, settings | {"device": "cpu"})
    manifest, file = options.out / FILE, job_file(options.jobs, options.out)
    check_own(manifest)
    told = read_manifest(manifest) if manifest.exists() else {}
    for job in jobs:
        refuse_anothers(job, told.get(job.name), file, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    own = (job for job in jobs if not of_another_file(told.get(job.name, {}), file))
    waiting = [entry_of(job, WAITING) for job in own]
    write_manifest(manifest, merged(manifest, waiting, file))
    rows = [{"id": job.name} for job in jobs]
    generated = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Generate,
        fn_constructor_args=(str(options.jobs.resolve()), str(options.out.resolve()), settings),
        concurrency=options.actors,
        num_gpus=options.gpus,
    )
    entries = {}
    for entry in generated.iter_rows():
        entries[entry["id"]] = entry
        print(f"{len(entries)} of {len(jobs)}: {entry['image']} {entry['status']}", flush=True)
    settled = [entries[job.name] for job in jobs]
    write_manifest(manifest, merged(manifest, settled, file))
    return int(any(entry["status"] != DONE for entry in entries.values()))


if __name__ == "__main__":
    raise SystemExit(main())
