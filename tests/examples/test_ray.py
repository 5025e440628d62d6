"""The Ray example on a cluster of two nodes, one of which is lost in the middle of an image."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack

from support.command_line import run
from support.ray_cluster import ROOT, environment, locks, ray_cluster, wait_for
from support.rendering import assert_complete
from support.slow import slow

from clear_dit.render.claims import FILE, Claims

EXAMPLE = ROOT / "examples" / "ray" / "render.py"
JOBS = [f"house-{number}" for number in range(6)]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("*.png")}


def claimed(out, stack):
    """Claim all jobs until the stack is left, so that actors wait; the names by their bytes."""
    claims, names = Claims(out), {}
    stack.callback(claims.close)
    for name in JOBS:
        before = locks(out / FILE)
        assert stack.enter_context(claims.job(name))
        ((_, byte),) = locks(out / FILE) - before
        names[byte] = name
    return names


def caught(out, names, actors):
    """An actor that is stopped in the middle of a job, with the name of that; None if none is."""
    for pid, byte in locks(out / FILE):
        if byte in names and pid in actors:
            os.kill(pid, signal.SIGSTOP)
            if (pid, byte) in locks(out / FILE) and not (out / f"{names[byte]}.png").exists():
                return pid, names[byte]
            os.kill(pid, signal.SIGCONT)
    return None


@slow
def test_a_lost_node_costs_no_image(tmp_path):
    path, out, log = tmp_path / "jobs.jsonl", tmp_path / "out", tmp_path / "log"
    line = {"prompt": "a house", "height": 256, "width": 256, "steps": 8}
    texts = [json.dumps(line | {"id": name, "seed": n}) for n, name in enumerate(JOBS)]
    path.write_text("\n".join(texts))
    out.mkdir()
    arguments = [sys.executable, str(EXAMPLE), str(path), "--out", str(out), "--actors", "2"]
    with ray_cluster(tmp_path, workers=2) as (address, nodes), ExitStack() as stack:
        held = stack.enter_context(ExitStack())
        names = claimed(out, held)
        with log.open("w") as file:
            env = environment(RAY_ADDRESS=address)
            driver = subprocess.Popen(arguments, stdout=file, stderr=file, env=env)
        stack.callback(driver.wait)
        stack.callback(driver.kill)

        def present():
            assert driver.poll() is None, log.read_text()
            found = {pid for pid, byte in locks(out / FILE) if byte == 0}
            return found - {driver.pid, os.getpid()}

        actors = wait_for(lambda: len(found := present()) == 2 and found, "both actors wait")
        held.close()
        victim, job = wait_for(lambda: caught(out, names, actors), "an actor is at work")
        (node,) = (node for node in nodes if victim in node.processes())
        assert not actors <= set(node.processes())  # the other is elsewhere
        node.kill()
        assert not (out / f"{job}.png").exists()
        status = driver.wait(timeout=150)
    told = log.read_text()
    assert status == 0, told
    assert_complete(out, len(JOBS))
    assert re.search(rf"{job}\.png done, begun 2 times: process {victim} of ", told), told
    assert re.search(r"^.*out: 6 of 6 images done, [1-6] begun more than once$", told, re.M), told

    assert run("render", path, "--out", tmp_path / "alone") == 0
    assert digests(out) == digests(tmp_path / "alone")
