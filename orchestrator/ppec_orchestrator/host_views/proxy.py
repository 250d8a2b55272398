# SPDX-License-Identifier: Apache-2.0
"""The views of real hosts: HTTP/1.1 to their proxies over mutual TLS, with the orchestrator's own certificate.

A host is believed for what its certificate says it is, never for its address, and before it is sent a byte. It is not
trusted beyond that: heads, replies and lines have bounds, every wait has an end, and what comes must be the contract's.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import h11
from pydantic import ValidationError

from ppec_contract.agent import FAILED, NDJSON, Method
from ppec_contract.errors import PpecError, Problem
from ppec_contract.frames import decode_json_object
from ppec_contract.identity import Identity
from ppec_contract.model import Model
from ppec_orchestrator.host_views.port import HostDoor, refused, unreachable, view_of
from ppec_orchestrator.pki.ca import KeyPair

M = TypeVar("M", bound=Model)
CONNECT_S = 10.0
# For an answer, beside what the question lets the host wait for others; and for each reply of one that goes on, of
# which agents send at least one every 10 s.
ANSWER_S = 15.0
SILENCE_S = 30.0
# Below the proxy's 75 s: a connection that has been quiet for longer is not used again, for it may be just ending.
REUSE_S = 30.0
# The longest are a console's first piece, and 256 guests of 64 interfaces, of which no caller asks here.
MAX_REPLY_BYTES = 2 * 1024 * 1024
_READ_BYTES = 64 * 1024
_OK = 200


class ProxyViews:
    """Implements `port.HostViews`."""

    def __init__(self, pair: KeyPair) -> None:
        """Reads the certificate now: it is renewed at a start only."""
        self._tls = ssl.create_default_context(cafile=str(pair.ca_path))
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._tls.check_hostname = False  # peers are known by URI, not by host name
        self._tls.load_cert_chain(pair.certificate_path, pair.key_path)

    @asynccontextmanager
    async def line(self, door: HostDoor) -> AsyncIterator[ProxyLine]:
        line = ProxyLine(door, self._tls)
        try:
            yield line
        finally:
            line.close()


class ProxyLine:
    """Implements `port.HostLine`. Connects when first asked, and again when the connection has been quiet for long."""

    def __init__(self, door: HostDoor, tls: ssl.SSLContext) -> None:
        self._door = door
        self._tls = tls
        self._connection: _Connection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def ask(self, question: Model, answer: type[M], *, patience_s: float = 0.0) -> M:
        method = view_of(question)
        with _told_as_unreachable(self._door):
            connection = await self._connected()
            async with asyncio.timeout(ANSWER_S + patience_s):
                await connection.send(method, question, streamed=False)
                status = await connection.head()
                body = bytearray()
                async for data in connection.body():
                    body += data
                    if len(body) > MAX_REPLY_BYTES:
                        raise _NotTheContractError("its answer has no end")
            connection.done()
        if status != _OK:
            raise self._problem(bytes(body))
        return self._parsed(answer, decode_json(bytes(body)))

    async def follow(self, question: Model, answer: type[M]) -> AsyncGenerator[M, None]:
        method = view_of(question)
        with _told_as_unreachable(self._door):
            connection = await self._connected()
            async with asyncio.timeout(ANSWER_S):
                await connection.send(method, question, streamed=True)
                status = await connection.head()
        lines = _Lines(connection)
        if status != _OK:
            with _told_as_unreachable(self._door):
                body = await lines.rest()
            raise self._problem(body)
        while True:
            with _told_as_unreachable(self._door):
                async with asyncio.timeout(SILENCE_S):
                    line = await lines.next()
            if line is None:
                # Told whole, it has a last reply that says so.
                raise unreachable(self._door, "the stream broke off")
            reply = decode_json(line)
            if "error" in reply:
                raise self._failure(reply)
            yield self._parsed(answer, reply.get("parameters"))
            if not reply.get("continues"):
                return

    async def _connected(self) -> _Connection:
        if self._connection is not None and not self._connection.usable:
            self.close()
        if self._connection is None:
            self._connection = await _Connection.opened(self._door, self._tls)
        return self._connection

    def _problem(self, body: bytes) -> PpecError:
        try:
            return refused(self._door.host, Problem.model_validate_json(body))
        except ValidationError:
            return self._strange("a refusal that is no problem")

    def _failure(self, reply: dict[str, Any]) -> PpecError:
        try:
            if reply["error"] == FAILED:
                return refused(self._door.host, Problem.model_validate(reply.get("parameters")))
        except ValidationError:
            pass
        return self._strange("an error we don't know")

    def _parsed(self, answer: type[M], value: Any) -> M:
        try:
            return answer.model_validate(value)
        except ValidationError as error:
            raise self._strange(f"what is no {answer.__name__}") from error

    def _strange(self, what: str) -> PpecError:
        return unreachable(self._door, f"it answered {what}; host and orchestrator may be of different releases")


def decode_json(text: bytes) -> dict[str, Any]:
    """A host's JSON object; empty where it is none, which is no model's."""
    try:
        return decode_json_object(text)
    except PpecError:
        return {"": None}


class _NotTheContractError(Exception):
    """What comes is not what a proxy sends."""


class _told_as_unreachable:  # noqa: N801 - reads as a statement
    """Maps what can befall a connection, here and nowhere else."""

    def __init__(self, door: HostDoor) -> None:
        self._door = door

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, TimeoutError):
            raise unreachable(self._door, "it did not answer in time") from error
        if isinstance(error, OSError | h11.ProtocolError | _NotTheContractError):
            raise unreachable(self._door, str(error) or type(error).__name__) from error


class _Connection:
    """One TLS connection to a host whose certificate says that it is that host."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_READ_BYTES)
        self._quiet_since = asyncio.get_running_loop().time()

    @classmethod
    async def opened(cls, door: HostDoor, tls: ssl.SSLContext) -> _Connection:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(door.address, door.port, ssl=tls, limit=_READ_BYTES)
        try:
            found = Identity.from_peer_certificate(writer.get_extra_info("peercert")).uri
        except PpecError as error:
            found = error.message
        wanted = Identity("host", door.host).uri
        if found != wanted:
            writer.transport.abort()
            raise _NotTheContractError(f"who listens there is not that host: wanted {wanted}, found {found}")
        return cls(reader, writer, f"{door.host}:{door.port}")

    @property
    def usable(self) -> bool:
        """Whether another question may be sent on it."""
        quiet_s = asyncio.get_running_loop().time() - self._quiet_since
        gone = self._reader.at_eof() or self._writer.is_closing()
        return self._http.our_state is h11.IDLE and not gone and quiet_s < REUSE_S

    async def send(self, method: Method, question: Model, *, streamed: bool) -> None:
        # What has its default is left to the agent, which may be of the previous release.
        body = question.model_dump_json(exclude_unset=True).encode()
        headers = [
            ("host", self._host),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("accept", NDJSON if streamed else "application/json"),
        ]
        request = h11.Request(method="POST", target=method.http_path, headers=headers)
        parts = [self._http.send(part) or b"" for part in (request, h11.Data(data=body), h11.EndOfMessage())]
        self._writer.write(b"".join(parts))
        await self._writer.drain()

    async def head(self) -> int:
        """The status of the answer."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event.status_code
            if not isinstance(event, h11.InformationalResponse):
                raise _NotTheContractError("it hung up without an answer")

    async def body(self) -> AsyncIterator[bytes]:
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise _NotTheContractError("it hung up in the middle of its answer")

    def done(self) -> None:
        """The answer was read to its end: the connection is for the next question, if the host keeps it."""
        self._quiet_since = asyncio.get_running_loop().time()
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()

    def close(self) -> None:
        # Nobody waits for a host to say good-bye.
        with suppress(OSError):
            self._writer.transport.abort()

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_READ_BYTES))
        return event


class _Lines:
    """A body cut into lines, each bounded."""

    def __init__(self, connection: _Connection) -> None:
        self._pieces = connection.body()
        self._buffer = bytearray()
        self._searched = 0

    async def next(self) -> bytes | None:
        """The next line without its end; None at the body's end."""
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if self._searched > MAX_REPLY_BYTES:
                raise _NotTheContractError("a line of its answer has no end")
            piece = await anext(self._pieces, None)
            if piece is None:
                return None
            self._buffer += piece
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    async def rest(self) -> bytes:
        async with asyncio.timeout(ANSWER_S):
            async for piece in self._pieces:
                self._buffer += piece
                if len(self._buffer) > MAX_REPLY_BYTES:
                    raise _NotTheContractError("its answer has no end")
        return bytes(self._buffer)
