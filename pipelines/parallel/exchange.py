"""What ranks send each other while they share an image, and how many bytes it is.

Everything is started at once and waited for where it is needed, so that it travels while the rank
computes. Tensors of one kind have one shape on all ranks, or shapes that every rank knows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .bands import Bands

# What attention layers send.
OF_LAYERS = ("halo", "text", "pooled", "far")


@dataclass
class Traffic:
    """Bytes that one rank has sent, by kind, and the attention layers it has computed.

    Halo rows are counted message by message; collectives as rings send them: all-gather the own
    part to every other rank, all-reduce 2 (ranks - 1) / ranks of the tensor.

    Attributes:
        sent: bytes by kind: of every layer "halo", "text", "pooled" and "far", of every forward
            "image" and "guidance".
        layers: number of attention layers computed.
        waiting: whether this process waits for what others send.
    """

    sent: Counter[str] = field(default_factory=Counter)
    layers: int = 0
    waiting: bool = False
    _waited: float = 0.0
    _stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Around every wait."""
        events = None
        if self._stalls is not None:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        self.waiting, start = True, time.perf_counter()
        try:
            yield
        finally:
            self.waiting = False
            self._waited += time.perf_counter() - start
            if self._stalls is not None and events is not None:
                events[1].record()
                self._stalls.append(events)

    def time_waits(self, device: torch.device) -> None:
        """Have `seconds_waited` measure a CUDA device, which waits without its host."""
        if device.type == "cuda":
            self._stalls = []

    def seconds_waited(self) -> float:
        """Seconds in which this rank, or its device (see `time_waits`), waited for others so far.

        Synchronise the device first.
        """
        if self._stalls is None:
            return self._waited
        return sum(start.elapsed_time(end) for start, end in self._stalls) / 1e3

    def per_layer(self, *kinds: str) -> float:
        """Bytes sent per attention layer, of some kinds, or of all that layers send."""
        return sum(self.sent[kind] for kind in kinds or OF_LAYERS) / max(self.layers, 1)


class HaloRows:
    """Rows of tokens on their way: the halo of this rank's band, and its share of others'.

    What travels is the attention layer's input, from which key and value are made again: half the
    bytes of the two. The projections of the halo are the price, and they are exact.

    Args:
        tokens: (batch, own rows * width, channels), this rank's band.
        bands: who has which rows.
        width: of the image, in tokens.
        group: of the ranks, in the order of the bands.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        bands: Bands,
        width: int,
        group: dist.ProcessGroup,
        traffic: Traffic,
    ) -> None:
        batch, _, channels = tokens.shape
        rows = tokens.unflatten(1, (-1, width))
        first = bands.own.start
        self._outgoing = [
            (rank, rows[:, part.start - first : part.stop - first].contiguous())
            for rank, part in bands.sends
        ]
        self._incoming = [
            (rank, tokens.new_empty(batch, len(part), width, channels))
            for rank, part in bands.receives
        ]
        traffic.sent["halo"] += sum(part.nbytes for _, part in self._outgoing)
        operations = [
            dist.P2POp(operation, part, group=group, group_peer=rank)
            for operation, parts in ((dist.isend, self._outgoing), (dist.irecv, self._incoming))
            for rank, part in parts
        ]
        self._traffic = traffic
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> torch.Tensor:
        """(batch, halo rows * width, channels): the rows above, then those below."""
        with self._traffic.wait():
            for work in self._works:
                work.wait()
        self._works, self._outgoing = [], []
        return torch.cat([part for _, part in self._incoming], dim=1).flatten(1, 2)


class MergedText:
    """Attention of the text queries, joined over ranks that hold disjoint keys.

    With out_i and lse_i over each rank's keys the whole is sum(w_i out_i) / sum(w_i) with
    w_i = exp(lse_i - max lse) (FlashAttention, arXiv 2205.14135, section 3.1): two all-reduces, of
    a small maximum and of the sums. Their bytes do not grow with the ranks, and all ranks get the
    same bits, so that their copies of the text do not drift apart.

    Args:
        out: (batch, text, heads, head_dim), lse: (batch, text, heads), float32 or wider, over this
            rank's keys.
    """

    def __init__(
        self, out: torch.Tensor, lse: torch.Tensor, group: dist.ProcessGroup, traffic: Traffic
    ) -> None:
        self._out, self._lse, self._group, self._traffic = out, lse, group, traffic
        self._largest = lse.contiguous().clone()
        self._work = self._reduce(self._largest, dist.ReduceOp.MAX)

    def start_sum(self) -> None:
        """The second half: wait for the maximum and start the sums."""
        with self._traffic.wait():
            self._work.wait()
        weight = torch.exp(self._lse - self._largest).unsqueeze(-1)
        self._sums = torch.cat([self._out * weight, weight], dim=-1)
        self._work = self._reduce(self._sums, dist.ReduceOp.SUM)

    def wait(self) -> torch.Tensor:
        """(batch, text, heads, head_dim) over the keys of all ranks."""
        with self._traffic.wait():
            self._work.wait()
        return self._sums[..., :-1] / self._sums[..., -1:]

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> dist.Work:
        ranks = self._group.size()
        self._traffic.sent["text"] += 2 * (ranks - 1) * tensor.nbytes // ranks
        return dist.all_reduce(tensor, operation, group=self._group, async_op=True)


class Gathered:
    """One tensor of every rank, all of one shape."""

    def __init__(
        self, tensor: torch.Tensor, group: dist.ProcessGroup, traffic: Traffic, kind: str
    ) -> None:
        tensor = tensor.contiguous()
        ranks = group.size()
        traffic.sent[kind] += (ranks - 1) * tensor.nbytes
        self._traffic = traffic
        self._parts = [torch.empty_like(tensor) for _ in range(ranks)]
        self._work = dist.all_gather(self._parts, tensor, group=group, async_op=True)

    def wait(self) -> list[torch.Tensor]:
        """The tensors, by rank."""
        with self._traffic.wait():
            self._work.wait()
        return self._parts
