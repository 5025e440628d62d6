"""Ranks that watch each other: when one dies, hangs or fails, all stop and say which and why.

Every rank has a thread with a connection to rank 0's, besides torch.distributed's own, which say
nothing while a collective waits. The system closes the connection of a process that dies, however
it dies; one that is stopped, or whose host is gone, falls silent; one that runs but gets no further
reports itself. Rank 0 decides which rank failed first and tells all the others.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from clear_dit.errors import first_line

from .progress import GenerationProgress, HangDetector, Progress

Item = TypeVar("Item")

# Seconds between two signs of life, and between two looks for a failure.
BEAT, _POLL = 1.0, 0.2
# Seconds between two looks at a rank's own progress.
_LOOK = 0.1
# Without a sign of life for so many seconds a rank counts as lost.
SILENCE_LIMIT = 20.0
# Seconds in which other reports of one failure may arrive before its cause is chosen, and of ranks
# that get no further, which find out one after the other.
_SETTLE, _SETTLE_HANG = 0.5, 3.0
# Seconds a failing run is given to clean up, such as to remove a file half written.
_GRACE = 5.0
# Which of several reports is believed to name the cause: an error or a death, then a rank that got
# no further (of several the one that got least far), then one that only waited for others.
_CAUSE, _HANGS, _WAITS, _FOLLOWS = range(4)
# What a failed rank leaves to those who were talking to it.
_CONNECTION_WORDS = ("connection", "gloo", "nccl")


@dataclass(frozen=True)
class Member:
    """A process of the run."""

    rank: int
    host: str
    pid: int

    @classmethod
    def here(cls) -> Member:
        """This process, once it has joined the others."""
        return cls(dist.get_rank(), socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Failure:
    """Which rank failed, what it was doing and why."""

    rank: int
    where: str
    reason: str


class Watch:
    """A rank's thread that watches the others and its own progress.

    Args:
        members: of the run, by rank.
        rank: this process's own.
        connect: makes the connections: of rank 0 to all others, of those to rank 0, by rank. It is
            called in the thread.
        silence_limit, hang_limit: in seconds, see SILENCE_LIMIT and `HangDetector`.

    Attributes:
        progress: of this rank; may be replaced.
        failure: of the run, once it is known.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rank: int,
        connect: Callable[[], Mapping[int, Connection]],
        silence_limit: float,
        hang_limit: float | None,
    ) -> None:
        self._progress: Progress | GenerationProgress = Progress("the start")
        self.failure: Failure | None = None
        self._members = members
        self._rank = rank
        self._silence_limit = silence_limit
        self._hangs = HangDetector(hang_limit)
        self._to_thread, from_main = Pipe()
        self._connections: dict[int, Connection] = {rank: from_main}
        self._wheres = ["the start"] * len(members)
        self._heard: dict[int, float] = {}
        self._suspects: list[tuple[list[int], Failure]] = []
        self._decide_at = float("inf")
        self._done: set[int] = set()
        self._reported: Failure | None = None
        self._connected, self._over = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._run, args=(connect,), daemon=True)
        thread.start()

    @property
    def progress(self) -> Progress | GenerationProgress:
        return self._progress

    @progress.setter
    def progress(self, progress: Progress | GenerationProgress) -> None:
        self._progress = progress
        self._send(self._to_thread, {"kind": "progress"})  # others hear of it at once

    @property
    def reporting(self) -> bool:
        """Whether this rank fails and is telling the others."""
        return self._reported is not None

    def wait_connected(self, seconds: float) -> bool:
        """Whether all ranks have met."""
        return self._connected.wait(seconds)

    def finish(self) -> None:
        """Wait until all ranks have finished; a failure until then ends the process."""
        self.progress = Progress("the end")
        self._send(self._to_thread, {"kind": "done"})
        self._over.wait()
        if self.failure is not None:
            _end_process(1)

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank fails.

        Returns if it is the first that did; else the process ends here.
        """
        own = Failure(self._rank, self.progress.where(), _reason(error))
        self._reported = own
        order = [_FOLLOWS if _follows(error) else _CAUSE]
        self._send(self._to_thread, {"kind": "failure", "order": order, **asdict(own)})
        if not self._over.wait(_GRACE) or self.failure in (None, own):
            return
        same = self.failure is not None and self.failure.reason == own.reason
        _end_process(2 if same and isinstance(error, ValueError) else 1)

    def _run(self, connect: Callable[[], Mapping[int, Connection]]) -> None:
        self._connections |= connect()
        self._heard = dict.fromkeys(self._connections, time.monotonic())
        del self._heard[self._rank]
        self._connected.set()
        beat_at = 0.0
        while not self._over.is_set() and self.failure is None:
            now = time.monotonic()
            # What a rank was doing when it died is what it last told.
            if now >= beat_at or self.progress.where() != self._wheres[self._rank]:
                self._beat()
                beat_at = now + BEAT
            rank_of = {connection: rank for rank, connection in self._connections.items()}
            timeout = max(0.0, min(beat_at, self._decide_at, now + _LOOK) - now)
            for connection in wait(list(rank_of), timeout):
                assert isinstance(connection, Connection)
                self._receive(rank_of[connection], connection)
            self._look_for_silence()
            if self.failure is None and time.monotonic() >= self._decide_at:
                self._decide(min(self._suspects, key=lambda suspect: suspect[0])[1])
        if self.failure is not None:
            self._stop(self.failure)

    def _beat(self) -> None:
        where = self._wheres[self._rank] = self.progress.where()
        self._to_others({"kind": "beat", "where": where})
        stuck = self._hangs.overdue(self.progress.count, self.progress.waiting, time.monotonic())
        if stuck is not None:
            waits = " (it waits for others)" if self.progress.waiting else ""
            reason = f"no progress for {stuck:.0f} s{waits}, in {_main_thread()}"
            order = [_WAITS if self.progress.waiting else _HANGS, self.progress.count]
            self._suspect(Failure(self._rank, where, reason), order)

    def _receive(self, rank: int, connection: Connection) -> None:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            del self._connections[rank]
            self._heard.pop(rank, None)
            # One that reported a failure, or was told of one, may go.
            if all(suspect.rank != rank for _, suspect in self._suspects):
                self._suspect(Failure(rank, self._wheres[rank], "its process ended"), [_CAUSE])
            return
        self._heard[rank] = time.monotonic()
        match message.pop("kind"):
            case "progress":
                self._beat()
            case "beat":
                self._wheres[rank] = message["where"]
            case "failure":
                order = message.pop("order")
                self._suspect(Failure(**message), order)
            case "verdict":
                self._decide(Failure(**message))
            case "done":
                self._done.add(rank)
                if self._rank:
                    self._to_others({"kind": "done"})
                elif len(self._done) == len(self._members):
                    self._to_others({"kind": "over"})
                    self._over.set()
            case "over":
                self._over.set()

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        for rank, heard in list(self._heard.items()):
            silent = now - heard
            if rank != self._rank and silent > self._silence_limit:
                del self._heard[rank]
                reason = f"no sign of life for {silent:.0f} s (stopped, or its host is unreachable)"
                self._suspect(Failure(rank, self._wheres[rank], reason), [_CAUSE])

    def _suspect(self, failure: Failure, order: list[int]) -> None:
        """Note a failure; rank 0 hears of it and decides, unless it is lost itself."""
        if any(suspect == failure for _, suspect in self._suspects):
            return
        self._suspects.append((order, failure))
        settle = _SETTLE_HANG if order[0] in (_HANGS, _WAITS) else _SETTLE
        if self._rank and failure.rank == self._rank:
            self._to_others({"kind": "failure", "order": order, **asdict(failure)})
            settle += 2 * _SETTLE
        self._decide_at = min(self._decide_at, time.monotonic() + settle)

    def _decide(self, failure: Failure) -> None:
        if self._rank == 0:
            self._to_others({"kind": "verdict", **asdict(failure)})
        self.failure = failure

    def _stop(self, failure: Failure) -> None:
        """Say what happened, and end the process if its work does not end by itself."""
        own = self._reported
        if own is None or own.reason != failure.reason:
            print(
                f"clear-dit: {self._members[failure.rank]} failed in {failure.where}: "
                f"{failure.reason}; rank {self._rank} stops.",
                file=sys.stderr,
                flush=True,
            )
        self._over.set()
        if failure != own:
            time.sleep(_GRACE)
            _end_process(1)

    def _to_others(self, message: Mapping[str, Any]) -> None:
        for rank, connection in self._connections.items():
            if rank != self._rank:
                self._send(connection, message)

    @staticmethod
    def _send(connection: Connection, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # receiving finds out
            connection.send_bytes(json.dumps(message).encode())


def until_failure(items: Iterable[Item], watch: Watch) -> Iterator[Item]:
    """The same items, made in a thread: a wait for a rank that failed does not hold up the end.

    Raises:
        RuntimeError: a rank has failed.
    """
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=1)

    def make() -> None:
        try:
            for item in items:
                made.put((True, item))
            made.put((False, None))
        except BaseException as error:
            made.put((False, error))

    threading.Thread(target=make, daemon=True).start()
    while True:
        if watch.failure is not None:
            raise RuntimeError("another rank has failed")
        try:
            is_item, value = made.get(timeout=_POLL)
        except queue.Empty:
            continue
        if is_item:
            yield value
        elif value is None:
            return
        else:
            raise value


def _end_process(status: int) -> NoReturn:
    """At once: leaving Python would wait for messages that nobody sends any more."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"exit status {error.code}"
    return f"{type(error).__name__}: {first_line(error)}"


def _follows(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone, or that a launcher stops them all."""
    if isinstance(error, RuntimeError):
        return any(word in str(error).lower() for word in _CONNECTION_WORDS)
    return isinstance(error, SystemExit)


def _main_thread() -> str:
    """Where the main thread is: a file and a line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}" if frame else "no Python code"
