"""One image by several ranks: joining them, and what they do once for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..errors import RequestError
from .denoising import Text, encode
from .models import TOKEN_PIXELS, text_length

if TYPE_CHECKING:
    from ..pipelines.flux import CLEARFluxPipeline
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
        Bands(request.height // TOKEN_PIXELS, ranks.mesh.size(-1), 0, 0)
    except ValueError as error:
        raise RequestError(str(error)) from error
    if request.attention == "full":
        raise RequestError("--parallel shares rows by local attention; leave --attention full out.")


def encode_once(pipe: CLEARFluxPipeline, prompt: str, ranks: Ranks | None) -> Text:
    """A prompt's embeddings; of several ranks the first has the encoders, and sends."""
    if ranks is None:
        return encode(pipe, [prompt])
    if ranks.is_first:
        text = encode(pipe, [prompt])
    else:
        config = pipe.transformer.config
        text = Text(
            torch.empty(1, text_length(pipe), config.joint_attention_dim),
            torch.empty(1, config.pooled_projection_dim),
        )
    text = Text(*(part.to(pipe.device, pipe.dtype).contiguous() for part in text))
    for part in text:
        ranks.process_group.broadcast(part, 0)
    return text
