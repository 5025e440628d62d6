"""A part's file: JSON lines, appended as they come, by several processes at once.

A line is a row, {"task": ..., what was found}, or tells what became of a task, {"event": ...}:

    tasks    labels: of all the part's tasks, and the hardware and software they run on
    begin    task, shard, at: seconds since the epoch, alone: see `Task`
    end      task
    failed   task, problem, lost: whether its process is; or, of the whole part, problem alone
    before   tasks: that failed in earlier commands
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .parts import CHOSEN, PARTS

# What a row has that was not found right, or could not be measured; and what was not tried.
PROBLEM, SKIPPED = "problem", "skipped"


@dataclass
class Record:
    """What a part's file says.

    Attributes:
        environment: hardware and software.
        labels: of all tasks, in their order; empty where the part never started.
        rows: as they came.
        ended: tasks that ran to their end.
        failed: tasks that did not, and why.
        running: (task, since when) by shard.
        alone, lost: tasks that began alone, and that took their process along.
        failed_before: tasks that failed in an earlier command.
        problem: why the part as a whole failed.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[int, tuple[str, float]] = field(default_factory=dict)
    alone: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    failed_before: set[str] = field(default_factory=set)
    problem: str | None = None

    @property
    def complete(self) -> set[str]:
        """Tasks that ended and found nothing wrong."""
        wrong = {row["task"] for row in self.rows if PROBLEM in row}
        return self.ended - wrong - self.failed.keys()

    @property
    def done(self) -> set[str]:
        """Of these, tasks that were not skipped: what another run need not try."""
        done = self.complete - {row["task"] for row in self.rows if SKIPPED in row}
        if done == set(self.labels):
            return done
        return {task for task in done if not task.startswith(CHOSEN)}  # it may be another then

    @property
    def missing(self) -> list[str]:
        """Tasks that did not end, nor fail."""
        return [label for label in self.labels if label not in self.ended | self.failed.keys()]

    @property
    def good_rows(self) -> list[dict[str, Any]]:
        """Rows of what is right."""
        return [row for row in self.rows if PROBLEM not in row and SKIPPED not in row]

    @property
    def problems(self) -> dict[str, str]:
        """Why a task, or the part under the name "all", is not right or not there."""
        found = {"all": self.problem} if self.problem else {}
        for row in self.rows:
            if PROBLEM in row:
                found.setdefault(row["task"], row[PROBLEM])
        return found | self.failed

    @property
    def all_is_right(self) -> bool:
        """Whether every task ended and found nothing wrong."""
        return bool(self.labels) and self.complete == set(self.labels)


def lost_alone(folder: Path) -> str | None:
    """Which task, that was to run alone, was lost with its process, and why; None if none was."""
    for name in PARTS:
        record = PartFile(folder, name).read()
        for task in sorted(record.alone & record.lost):
            return f"{name}: {task}: {record.failed[task]}"
    return None


class PartFile:
    """DIR/NAME.jsonl."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.jsonl"

    def append(self, line: dict[str, Any]) -> None:
        """In one write, so that lines of several processes do not mix."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)

    def read(self) -> Record:
        """All that is there; a last line cut short is left out."""
        record = Record()
        for line in self._lines():
            event = line.get("event")
            if event is None:
                record.rows.append(line)
            elif event == "tasks":
                record.labels = line["labels"]
                record.environment = line["environment"]
            elif event == "begin":
                record.running[line["shard"]] = line["task"], line["at"]
                if line["alone"]:
                    record.alone.add(line["task"])
            elif event == "before":
                record.failed_before = set(line["tasks"])
            else:
                task = line.get("task")
                record.running = {k: v for k, v in record.running.items() if v[0] != task}
                if event == "end":
                    record.ended.add(task)
                elif task is None:
                    record.problem = line[PROBLEM]
                else:
                    record.failed[task] = line[PROBLEM]
                    if line["lost"]:
                        record.lost.add(task)
        return record

    def keep_done(self) -> None:
        """Leave out all that another run should try again, but for what failed."""
        record = self.read()
        kept = [
            line
            for line in self._lines()
            if line.get("event") == "tasks" or line.get("task") in record.done
        ]
        if failed := sorted((record.failed.keys() | record.failed_before) - record.done):
            kept.append({"event": "before", "tasks": failed})
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        whole = self.path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]
