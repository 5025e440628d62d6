"""The processes ("ranks") that generate one image together: their start, mesh, agreement and end.

Started by torchrun, or by anything that sets its variables, on one node or many:

    with start_ranks() as ranks:
        pipe = CLEARFluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev").to(ranks.device)
        apply_clear(pipe, radius=16)
        pipe.enable_patch_parallel(ranks.mesh)
        ranks.follow(pipe)
        image = pipe("a fox", height=8192, width=8192, generator=torch.Generator().manual_seed(0))
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection, Listener
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from clear_dit.errors import first_line
from clear_dit.process_group import RankGroup

from .progress import Followed, GenerationProgress
from .watch import SILENCE_LIMIT, Member, Watch

# Dimensions of the mesh: passes of guidance, and bands of rows.
GUIDANCE, PATCH = "guidance", "patch"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Seconds in which all ranks must have met once the first connection of all stands.
_MEET = 60.0


@dataclass(frozen=True)
class Ranks:
    """This process among those that generate together.

    Attributes:
        rank: its number, from 0.
        members: all processes, by rank.
        mesh: of two dimensions, "guidance" and "patch".
        device: of this process.
        watch: stops the run if a rank fails.
    """

    rank: int
    members: Sequence[Member]
    mesh: DeviceMesh
    device: torch.device
    watch: Watch

    def follow(self, pipe: Followed) -> None:
        """Have the watch say which step a failure came in, and find a rank that hangs in one."""
        self.watch.progress = GenerationProgress(pipe)

    @property
    def process_group(self) -> RankGroup:
        """All ranks."""
        return RankGroup(dist.group.WORLD)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0


@contextmanager
def start_ranks(
    device: str | None = None,
    *,
    guidance: int = 1,
    silence_limit: float = SILENCE_LIMIT,
    hang_limit: float | None = None,
) -> Iterator[Ranks]:
    """Join the other ranks, which call this, too; leave when all have finished.

    An error inside, a rank that dies and one that hangs end all ranks, with exit statuses other
    than 0 and a line on standard error that names the rank, what it was doing and why.

    Args:
        device: "cuda" (one GPU for each rank of a node, NCCL) or "cpu" (gloo); None for CUDA where
            there is a GPU.
        guidance: 2 to compute the two passes of classifier-free guidance on two halves of the
            ranks; 1 to compute them one after the other.
        silence_limit: seconds without a sign of life after which a rank counts as lost.
        hang_limit: seconds without progress after which a rank counts as hanging; None for ten
            times as long as a layer usually takes, at least 40.

    Yields:
        The ranks, all of them met.

    Raises:
        ValueError: variables that torchrun sets are missing or wrong, a number of ranks that does
            not fit the mesh, or fewer GPUs than ranks on this node.
        ConnectionError: the others cannot be reached.
    """
    rank, world, local = _place()
    if guidance not in (1, 2):
        raise ValueError(f"start_ranks: guidance must be 1 or 2, got {guidance}.")
    if world % guidance:
        raise ValueError(
            f"start_ranks: {world} ranks do not divide into {guidance} halves of guidance; start "
            "an even number, or with guidance=1."
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    own = _own_device(kind, local)
    try:
        # Small things travel between CPUs even where NCCL carries the large ones.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    except (dist.DistError, RuntimeError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(
            f"start_ranks: rank {rank} of {world} did not meet the others at {address}: "
            f"{first_line(error)}"
        ) from error
    mesh = init_device_mesh(kind, (guidance, world // guidance), mesh_dim_names=(GUIDANCE, PATCH))
    members, connect = _meeting(rank)
    watch = Watch(members, rank, connect, silence_limit, hang_limit)
    if not watch.wait_connected(_MEET):
        raise ConnectionError(f"start_ranks: not all {world} ranks met within {_MEET:.0f} s.")
    with _termination_raises(watch):
        try:
            yield Ranks(rank, members, mesh, own, watch)
            watch.finish()
        except BaseException as error:
            watch.report(error)
            raise
    dist.destroy_process_group()


def _place() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this node."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"start_ranks: {', '.join(missing)} not set; start with torchrun, such as `torchrun "
            "--nproc-per-node 2 -m clear_dit generate ... --parallel patch`."
        )
    numbers = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ[name]
        if not text.isdecimal():
            raise ValueError(f"start_ranks: {name} must be a number from 0, got {text!r}.")
        numbers.append(int(text))
    rank, world, local = numbers
    if rank >= world:
        raise ValueError(f"start_ranks: RANK {rank} is not below WORLD_SIZE {world}.")
    return rank, world, local


def _own_device(kind: str, local: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ValueError(
            f"start_ranks: the device must be cuda or cpu, got {kind!r}; each rank takes the GPU "
            "of its number on its node."
        )
    count = torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"start_ranks: rank {local} of this node has no GPU: {count} can be seen; start one "
            "rank for each GPU."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _meeting(rank: int) -> tuple[list[Member], Callable[[], dict[int, Connection]]]:
    """The members of the run, and a function that connects their watches with rank 0's."""
    here: dict[str, Any] = {"member": asdict(Member.here())}
    address = os.environ["MASTER_ADDR"]
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        address = "127.0.0.1"  # one node: nothing needs to be reached from elsewhere
    key = secrets.token_hex(16)
    listener = None
    if rank == 0:
        local = address in ("127.0.0.1", "localhost")
        listener = Listener((address if local else "", 0), backlog=128, authkey=key.encode())
        here |= {"port": listener.address[1], "key": key}
    everyone = RankGroup(dist.group.WORLD).gather(here)
    members = [Member(**other["member"]) for other in everyone]

    def connect() -> dict[int, Connection]:
        if listener is None:
            first = everyone[0]
            connection = Client((address, first["port"]), authkey=first["key"].encode())
            connection.send_bytes(json.dumps(rank).encode())
            return {0: connection}
        found: dict[int, Connection] = {}
        with listener:
            while len(found) < len(members) - 1:
                connection = listener.accept()
                found[json.loads(connection.recv_bytes())] = connection
        return found

    return members, connect


@contextmanager
def _termination_raises(watch: Watch) -> Iterator[None]:
    """SIGTERM unwinds the work, so that no file stays half written; torchrun sends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if not watch.reporting:
            raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
