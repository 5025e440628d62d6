"""Connections that ask for nothing, or slowly: they do not keep others out."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager, suppress

import httpx
import uvicorn

from clear_dit.app.connections import Connection


class Few(Connection):
    of_address = 5
    patience = 0.5
    unread_looks = 6


@contextmanager
def running(seconds, body=b"here"):
    """A server that answers after so many seconds; its port."""

    async def app(scope, receive, send):
        await asyncio.sleep(seconds)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(app, port=0, http=Few, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def is_closed(connection):
    with connection:
        connection.settimeout(10)
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True


def test_connections_that_ask_for_nothing_are_closed():
    """Four hundred of them kept everybody out, for ever."""
    with running(0) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        silent[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
        assert is_closed(socket.create_connection(("127.0.0.1", port))), "one of too many"
        assert all(map(is_closed, silent))
        assert httpx.get(f"http://127.0.0.1:{port}").text == "here"


def test_slow_answers_and_connections_in_use_stay():
    with running(1.2) as port, httpx.Client() as client:
        for _ in range(2):
            assert client.get(f"http://127.0.0.1:{port}", timeout=30).text == "here"


def test_who_reads_nothing_of_an_answer_is_closed_and_who_reads_slowly_is_not():
    """A connection held a finished image of any size, for ever."""
    body = b"x" * 2**26
    with running(0, body) as port:
        none, slow = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        with none, slow:
            for one in (none, slow):
                one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            # In 5 s, where 3.5 with nothing read are the most.
            received = sum(_read(slow, 2**22, after=0.5) for _ in range(10))
            assert received + _read(slow, 2**27) > len(body)
            assert _read(none, 2**27) < len(body)


def _read(connection, most, after=0.0):
    """How many bytes come, in a while, until the end."""
    time.sleep(after)
    received = 0
    with suppress(ConnectionResetError):
        while received < most and (block := connection.recv(most - received)):
            received += len(block)
    return received
