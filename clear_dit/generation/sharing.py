"""One image by several ranks: joining them, and what they do once for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RequestError
from ..pipelines.text import Texts
from ..process_group import RankGroup
from .models import find_model
from .timing import Timer

if TYPE_CHECKING:
    from ..pipelines.parallel.start import Ranks
    from .request import GenerateRequest

# How ranks share an image: its rows; and the passes of guidance, too, each on half of the ranks.
PARALLEL = ("patch", "guidance")


@contextmanager
def joined_ranks(parallel: str | None, device: str | None) -> Iterator[Ranks | None]:
    """The ranks that generate an image together; None for this process alone.

    Args:
        parallel: one of PARALLEL, or None.
        device: "cuda" or "cpu", see `start_ranks`.

    Raises:
        RequestError: an unknown choice, none under torchrun, or see `start_ranks`.
    """
    if parallel is None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RequestError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: every rank would generate the same; "
                "add --parallel patch, or start without torchrun."
            )
        yield None
        return
    if parallel not in PARALLEL:
        raise RequestError(f"--parallel must be {' or '.join(PARALLEL)}, got {parallel!r}.")
    from ..pipelines.parallel.start import start_ranks

    with ExitStack() as stack:
        try:
            started = start_ranks(device, guidance=2 if parallel == "guidance" else 1)
            ranks = stack.enter_context(started)
        except ValueError as error:
            raise RequestError(f"--parallel {parallel}: {error}") from error
        yield ranks


def check_shared(request: GenerateRequest, ranks: Ranks) -> None:
    """Refuse a request that ranks cannot share, or that is not the same on all.

    Raises:
        RequestError: which; on every rank.
    """
    from ..pipelines.parallel.agreement import agree
    from ..pipelines.parallel.bands import Bands

    facts = {name: repr(value) for name, value in asdict(request).items() if name != "device"}
    try:
        agree(ranks.process_group, facts)
        Bands(request.height // find_model(request.model).token_pixels, ranks.mesh.size(-1), 0, 0)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if request.attention == "full":
        raise RequestError("--parallel shares rows by local attention; leave --attention full out.")
    if request.lora is not None:
        raise RequestError("--parallel: ranks share no LoRA; leave --lora out.")
    if request.offload != "none":
        raise RequestError("--parallel keeps all parts on the devices; leave --offload out.")
    if request.quantize == "nvfp4":
        raise RequestError(
            "--quantize nvfp4: its scales are of many rows, of which each rank has its own: "
            "ranks would not agree on the text; use fp8 or int8 with --parallel."
        )
    if request.schedule is not None:
        raise RequestError("--parallel shares one radius of all layers; leave --schedule out.")


class RequestTexts(Texts):
    """The texts of one request, timed; of several ranks the first has the encoders, and sends.

    Args:
        ranks: that share the request, which all encode the same in the same order.
        timer: whose "text" it is.
        device: of the embeddings.
    """

    def __init__(self, ranks: Ranks | None, timer: Timer, device: torch.device) -> None:
        super().__init__()
        self._ranks, self._timer, self._device = ranks, timer, device

    def encoded(self, encode: Callable[[], Any]) -> Any:
        """What the first rank makes of it, on all ranks."""
        with self._timer.measure("text", self._device):
            if self._ranks is None:
                return encode()
            made = encode() if self._ranks.is_first else None
            group = self._ranks.process_group
            shape = group.gather(_description(made))[0]
            return _exchanged(shape, made, group, self._device)


def _description(value: Any) -> Any:
    """Of nested tuples, lists and dicts of tensors, texts and None, as JSON."""
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"names": list(value), "values": _description(list(value.values()))}
    if isinstance(value, (tuple, list)):
        return [isinstance(value, tuple), *map(_description, value)]
    assert value is None or isinstance(value, str), type(value)
    return value


def _exchanged(shape: Any, made: Any, group: RankGroup, device: torch.device) -> Any:
    """The first rank's value on every rank; `made` is it there, and None elsewhere."""
    if shape is None or isinstance(shape, str):
        return shape
    if isinstance(shape, list):
        is_tuple, *parts = shape
        given = [None] * len(parts) if made is None else made
        pairs = zip(parts, given, strict=True)
        found = [_exchanged(part, value, group, device) for part, value in pairs]
        return tuple(found) if is_tuple else found
    if "names" in shape:
        values = None if made is None else list(made.values())
        found = _exchanged(shape["values"], values, group, device)
        return dict(zip(shape["names"], found, strict=True))
    if made is None:
        made = torch.empty(shape["shape"], dtype=getattr(torch, shape["dtype"]), device=device)
    tensor: torch.Tensor = made.to(device).contiguous()
    group.broadcast(tensor, 0)
    return tensor
