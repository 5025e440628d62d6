"""A Ray cluster on this machine whose nodes can be lost, and who holds which lock in a folder."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
# Of a node to start, in seconds.
PATIENCE = 120


def environment(**more):
    """For the processes of Ray: they find this package, and nothing outside this machine."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # other tests need memory too
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | settings | more


def wait_for(condition, what, seconds=PATIENCE):
    """What a condition returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


class Node:
    """`ray start --block` with all that it starts, which has a session of its own."""

    def __init__(self, log, *options):
        self.log = log
        ray = Path(sys.executable).with_name("ray")
        memory = f"--object-store-memory={100 * 2**20}"
        arguments = [ray, "start", "--block", "--disable-usage-stats", memory, *options]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                arguments, stdout=file, stderr=file, env=environment(), start_new_session=True
            )

    def started(self):
        assert self.process.poll() is None, self.log.read_text()
        return "Ray runtime started" in self.log.read_text()

    def processes(self):
        """All of its processes, itself first."""
        found = [self.process.pid]
        for process in psutil.process_iter():
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid != process.pid:
                    found.append(process.pid)
        return found

    def kill(self):
        """As if the machine were unplugged."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_for(lambda: len(self.processes()) == 1, "the processes of a node end")


@contextmanager
def ray_cluster(logs, workers):
    """A head without a core, and nodes of one core; yields its address and these nodes."""
    # Sockets have names of at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    nodes = []

    def start(*options):
        nodes.append(Node(logs / f"node-{len(nodes)}.log", *options))
        wait_for(nodes[-1].started, "a node starts")

    try:
        ports = ["--port=0", "--include-dashboard=false"]
        start("--head", "--num-cpus=0", *ports, f"--temp-dir={folder}")
        address = (folder / "ray_current_cluster").read_text().strip()
        for _ in range(workers):
            start(f"--address={address}", "--num-cpus=1")
        yield address, nodes[1:]
    finally:
        for node in reversed(nodes):
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def locks(path):
    """Who holds which byte of a file: pairs of the process and the byte."""
    if not path.exists():
        return set()
    inode = str(path.stat().st_ino)
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "POSIX" and fields[5].rpartition(":")[2] == inode:
            found.add((int(fields[4]), int(fields[6])))
    return found
