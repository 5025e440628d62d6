"""`clear-dit render` killed while it makes an image, again and again: as if never killed.

Each process is forked from a server that has imported the libraries, runs the whole command, and
loads the demo itself.
"""

import json
import logging
import os
import random
import signal
import time
from itertools import count

import pytest
from support.processes import shared_integers, start
from support.rendering import (
    assert_complete,
    assert_same,
    assert_true_so_far,
    images,
    render_command,
)
from support.slow import slow

# The long version: CLEAR_DIT_KILLS=50.
KILLS = int(os.environ.get("CLEAR_DIT_KILLS", "6"))
JOBS = 10
FLAGS = ("--radius", 4, "--weights", "none", "--device", "cpu", "--dtype", "float32")
PATIENCE = 300

logger = logging.getLogger(__name__)


class Renders:
    """Processes that render one job file.

    Attributes:
        within: how many were killed while they made an image.
        writing: how many of those while they wrote it.
        between: how many were killed at another time.
    """

    def __init__(self, jobs):
        self.jobs = jobs
        self.within = self.writing = self.between = 0
        self.chance = random.Random(7)
        self.running = []

    def start(self, out):
        """One that renders into a folder: the process, and its state (see `render_command`)."""
        state = shared_integers(2)
        arguments = (self.jobs, "--out", out, *FLAGS)
        process = start(render_command, arguments, state, self.jobs.with_suffix(".log"))
        self.running.append(process)
        return process, state

    def finish(self, process):
        process.join(timeout=PATIENCE)
        assert process.exitcode == 0

    def kill(self, out, process, state, seconds):
        """Kill one while it makes its first or second image; False if it ends before.

        Args:
            seconds: that an image takes, at most.
        """
        image, end = self.chance.choice((1, 1, 2)), time.monotonic() + PATIENCE
        while state[0] < image:
            if process.exitcode is not None:
                assert process.exitcode == 0
                return False
            assert time.monotonic() < end
            time.sleep(0.002)
        time.sleep(self.chance.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return False
        assert process.exitcode == -signal.SIGKILL
        self.within += state[1] > 0
        self.writing += state[1] == 2
        self.between += state[1] == 0
        assert_true_so_far(out)
        return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A job file, its folder by an undisturbed process, and the seconds of an image."""
    folder = tmp_path_factory.mktemp("whole")
    jobs = folder / "jobs.jsonl"
    with jobs.open("w") as file:
        for number in range(JOBS):
            side = 256 if number % 4 else 192
            line = {"prompt": f"a house, number {number}", "height": 256, "width": side}
            line |= {"id": f"house-{number}", "seed": number, "steps": 2 + number % 3}
            file.write(f"{json.dumps(line)}\n")
    out, renders = folder / "out", Renders(jobs)
    renders.finish(renders.start(out)[0])
    assert_complete(out, JOBS)
    sidecars = (json.loads(path.read_text()) for path in out.glob("*.json"))
    return jobs, images(out), max(one["seconds"]["total"] for one in sidecars)


@pytest.fixture
def renders(whole):
    made = Renders(whole[0])
    yield made
    for process in made.running:
        process.kill()
        process.join()


@slow
@pytest.mark.parametrize("others", [0, 1])
def test_killed_while_it_makes_an_image(renders, whole, tmp_path, others):
    """Alone, and beside a process that goes on."""
    _, expected, seconds = whole
    for turn in count():
        assert turn <= KILLS
        out = tmp_path / str(turn)
        steady = [renders.start(out)[0] for _ in range(others)]
        ended = False
        while not ended and renders.within < KILLS:
            ended = not renders.kill(out, *renders.start(out), seconds)
        for process in [*steady, renders.start(out)[0]]:
            renders.finish(process)
        assert_same(out, expected)
        assert_complete(out, JOBS)
        if renders.within == KILLS:
            break
    logger.info(
        "%d killed while they made an image (%d while they wrote it), %d at another time; %d turns",
        renders.within,
        renders.writing,
        renders.between,
        turn + 1,
    )
