# SPDX-License-Identifier: Apache-2.0
"""Request bodies: whose are read at all, how large they may be, and what counts as JSON."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppec_contract.errors import PpecError
from ppec_contract.frames import decode_json_object
from ppec_orchestrator.api.audited import BODY, CHANGING
from ppec_orchestrator.api.auth import guards_of
from ppec_orchestrator.api.bulkheads import BulkheadRoute
from ppec_orchestrator.api.problems import problem_response
from ppec_orchestrator.api.queries import Handler

# Of a body that is taken from strangers: a signing request and a token, the request escaped as JSON likes it.
MAX_STRANGERS_BYTES = 32 * 1024


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = decode_json_object(await self.body())
        self.scope[BODY] = body
        return body


class StrictJsonRoute(BulkheadRoute):
    """A route whose body is one strict JSON object: no duplicate keys, NaN, endless nesting or numbers over 64 bits.

    A route without guards, which are asked before, takes a short body only.
    """

    def handler(self) -> Handler:
        handle = super().handler()
        if not CHANGING & set(self.methods or ()):
            return handle
        guarded = bool(guards_of(self.dependant))

        async def strictly(request: Request) -> Response:
            receive = request.receive if guarded else at_most(request.receive, MAX_STRANGERS_BYTES)
            return await handle(_StrictRequest(request.scope, receive))

        return strictly


def too_large(limit_bytes: int) -> PpecError:
    return PpecError(
        "request.too_large",
        f"the body is larger than {limit_bytes} bytes",
        hint="Split the request, or raise the limit in the orchestrator's settings.",
    )


def at_most(receive: Receive, limit_bytes: int) -> Receive:
    """Raises `request.too_large` once more than this has come."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit_bytes:
            raise too_large(limit_bytes)
        return message

    return counted


class BodyLimit:
    """Refuses bodies over the limit: at once when the header says so, else as soon as the bytes exceed it.

    Image uploads have a limit of their own and count themselves.
    """

    def __init__(self, app: ASGIApp, *, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_upload(scope):
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > self._limit_bytes:
            await problem_response(too_large(self._limit_bytes))(scope, receive, send)
            return
        await self._app(scope, at_most(receive, self._limit_bytes), send)


class UnreadBodies:
    """Closes the connection after an answer to a request whose body was not read to its end, whoever answered: the
    server would read what is left and throw it away, however long it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        read = False

        async def watched() -> Message:
            nonlocal read
            message = await receive()
            read = not message.get("more_body", False)
            return message

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start" and not read:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, watched, answered)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "PUT" and scope["path"].startswith("/v1/images/"))
