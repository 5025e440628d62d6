"""Processes of a test, forked from a server that imported everything once: no seconds to start.

Torch's threads do not survive a fork, so that what the server imports computes nothing.
"""

import multiprocessing
import os
import socket
import sys
from unittest import mock

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "support.distilling",
        "support.family_ranks",
        "support.patches",
        "support.rank_tasks",
        "support.rendering",
        "clear_dit.render.run",
    ]
)


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def shared_integers(count):
    """Integers that processes see each other write: zeros."""
    return _CONTEXT.RawArray("q", count)


def start(task, *arguments):
    """Start `task(*arguments)` in a process of its own, and return that."""
    process = _CONTEXT.Process(target=task, args=arguments)
    # The server's own `sys.path` is not this one, in Python 3.11.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        process.start()
    return process


def launch(task, world, *arguments):
    """Start `task(*arguments)` in several processes, in the environment that torchrun gives them.

    Returns:
        The processes, rank 0 first. Each has one thread.
    """
    port = free_port()
    return [start(_rank, rank, world, port, task, arguments) for rank in range(world)]


def _rank(rank, world, port, task, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    task(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
