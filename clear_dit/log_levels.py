"""What libraries, and this one, say while something is done."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# What importing torchao and bitsandbytes says to all, by logger: which of torchao's libraries are
# for other GPUs, that it registers enums as PyTorch once asked for, that diffusers knows an older
# torchao, and that bitsandbytes has no kernel of the hub's for a CPU with AVX512_BF16.
_CHATTER = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass ",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects.",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward ",
}


def quiet_chatter() -> None:
    """Hide what diffusers and transformers make installed quantisers say, that alone.

    For a program, as it holds for the process.
    """
    for name in _CHATTER:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CHATTER[record.name])


@contextmanager
def at_level(name: str, level: int) -> Iterator[None]:
    """Within it the logger of this name says nothing below a level; afterwards what it said."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
