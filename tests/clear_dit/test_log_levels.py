"""What torchao says when it is imported is hidden from the command line, and nothing else."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.slow import slow

from clear_dit.log_levels import quiet_chatter

OF_DIFFUSERS = "diffusers.quantizers.torchao.torchao_quantizer"
CHATTER = [
    ("torchao", ("Failed to load /site-packages/torchao/_C.so: not here",)),
    ("torch.utils._pytree", ("%s is an Enum subclass and is now natively supported", "<enum>")),
    (
        "bitsandbytes.backends.cpu.ops",
        ("Failed to load CPU gemm_4bit_forward from the hub: %s.", 1),
    ),
    (OF_DIFFUSERS, ("Unable to import `torchao` Tensor objects. This may affect loading",)),
]
# As `main` does.
PROGRAM = """
import logging, sys
from clear_dit.log_levels import quiet_chatter
if "quiet" in sys.argv:
    quiet_chatter()
logging.basicConfig(level=logging.WARNING)
import diffusers.quantizers.torchao
"""


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """What reaches the root logger."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    for name in ("torch", "diffusers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return heard


def test_chatter_is_hidden_and_news_is_not(monkeypatch, heard):
    for name, _ in CHATTER:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    quiet_chatter()
    for name, message in CHATTER:
        logging.getLogger(name).warning(*message)
        logging.getLogger(name).warning("%s: something else", name)
        logging.getLogger(f"{name}.below").warning(*message)
    assert [text for text in heard if "something else" in text] == [
        f"{name}: something else" for name, _ in CHATTER
    ]
    assert len(heard) == 2 * len(CHATTER)  # those below are others' words


@slow
def test_it_is_what_these_libraries_say():
    def said(*arguments):
        command = [sys.executable, "-c", PROGRAM, *arguments]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "torchao" in said()  # else there is nothing to hide any more
    assert said("quiet") == ""
