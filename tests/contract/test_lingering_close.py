# SPDX-License-Identifier: Apache-2.0
"""A client that is still sending when it is refused must be able to read why: its connection lingers for a moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from ppec_contract.peer_protocol import MAX_LINGER_BYTES, PeerCertificateProtocol

WHOLE = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}"
NOT_WHOLE = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 99\r\n\r\n{}"


class Wire(asyncio.Transport):
    """The network's side of a connection: what was written, and whether it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.reading = True
        self.wrote = asyncio.Event()

    def write(self, data: Any) -> None:
        self.written += bytes(data)
        self.wrote.set()

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading the body, and wants the connection closed."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def connected(app: Any) -> AsyncIterator[tuple[PeerCertificateProtocol, Wire]]:
    """A connection to the application; at the end its requests have been answered."""
    config = uvicorn.Config(app, http=PeerCertificateProtocol, ws="none", lifespan="off", log_config=None)
    config.load()
    state, wire = ServerState(), Wire()
    protocol = PeerCertificateProtocol(config=config, server_state=state, app_state={})
    protocol.connection_made(wire)
    yield protocol, wire
    await asyncio.gather(*state.tasks)


def spoken(data: bytes, then: Callable[[Any, Wire], None] = lambda protocol, wire: None) -> Wire:
    """A connection on which this came and was refused; `then` goes on with it."""

    async def speak() -> Wire:
        async with connected(refuse) as (protocol, wire):
            protocol.data_received(data)
        assert wire.written.startswith(b"HTTP/1.1 4")
        then(protocol, wire)
        return wire

    return asyncio.run(speak())


@pytest.mark.parametrize(
    ("sent", "status"), [(b"\x00\x01\r\n\r\n", b"400"), (NOT_WHOLE, b"413")], ids=["not-http", "body-not-read"]
)
def test_connection_stays_open_for_what_still_comes(sent: bytes, status: bytes) -> None:
    def go_on(protocol: Any, wire: Wire) -> None:
        written = wire.written
        for _ in range(10):
            protocol.data_received(b"x" * 1000)
        assert (wire.closed, wire.reading, wire.written) == (False, True, written)

    wire = spoken(sent, then=go_on)
    assert wire.written.split()[1] == status


def test_it_is_not_read_without_end() -> None:
    def flood(protocol: Any, wire: Wire) -> None:
        protocol.data_received(b"x" * MAX_LINGER_BYTES)
        assert not wire.closed
        protocol.data_received(b"x")
        assert wire.closed

    spoken(NOT_WHOLE, then=flood)


def test_what_comes_is_no_further_request() -> None:
    def pipeline(protocol: Any, wire: Wire) -> None:
        protocol.data_received(WHOLE)
        assert wire.written.count(b"HTTP/1.1") == 1

    spoken(NOT_WHOLE, then=pipeline)


def test_client_that_has_sent_everything_is_not_waited_for() -> None:
    assert spoken(WHOLE).closed


def test_nothing_follows_the_refusal_of_what_came_behind_a_request() -> None:
    """Two requests in one go, the second of which is none: the first one's answer would come after the last word."""
    wire = spoken(WHOLE.replace(b"content-length: 2\r\n\r\n{}", b"content-length: 0\r\n\r\n") + b"\x00\x01\r\n\r\n")
    assert wire.written.count(b"HTTP/1.1") == 1
    assert wire.written.endswith(b"}")


def test_refusal_does_not_come_in_the_middle_of_an_answer() -> None:
    gate = asyncio.Event()

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"on", "more_body": True})
        await gate.wait()
        await send({"type": "http.response.body", "body": b"ce"})

    async def speak() -> Wire:
        async with connected(stream) as (protocol, wire):
            protocol.data_received(WHOLE)
            while not wire.written.endswith(b"on"):
                await wire.wrote.wait()
                wire.wrote.clear()
            protocol.data_received(b"\x00\x01\r\n\r\n")
            gate.set()
        return wire

    wire = asyncio.run(speak())
    assert wire.written.endswith(b"\r\n\r\non"), "cut short, which its length tells"
