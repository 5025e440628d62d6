"""A server of the web page in a process of its own, as `python app.py` starts it."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from .processes import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 240


class AppServer:
    """Started by `with`, or `start`; ended by SIGTERM.

    Args:
        out: the folder for images.
        options: for the command line.
        log: where its output goes; None for the test's own.
        command: for Python.
    """

    def __init__(
        self,
        out: Path,
        *options: str,
        log: IO[bytes] | None = None,
        command: Sequence[str] = ("app.py",),
    ) -> None:
        self.out, self.options, self._log, self._command = out, options, log, command
        self.port = free_port()
        self.cookie = f"clear-dit-{self.port}"
        self.url = f"http://127.0.0.1:{self.port}/"

    def start(self) -> "AppServer":
        command = [sys.executable, *self._command]
        command += ["--port", str(self.port), "--out", str(self.out)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*command, *self.options], cwd=ROOT, env=environment, stdout=self._log, stderr=self._log
        )
        end = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server does not answer"
            try:
                with urlopen(self.url, timeout=10):
                    return self
            except HTTPError:  # such as one that asks for a login
                return self
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(timeout=60) is not None

    def memory_mb(self) -> float:
        """Resident, in MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def __enter__(self) -> "AppServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
