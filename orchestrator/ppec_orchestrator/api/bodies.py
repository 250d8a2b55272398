# SPDX-License-Identifier: Apache-2.0
"""Request bodies: how large they may be, and what counts as JSON."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppec_contract.errors import PpecError
from ppec_contract.frames import decode_json_object
from ppec_orchestrator.api.problems import problem_response


class _StrictRequest(Request):
    async def json(self) -> Any:
        return decode_json_object(await self.body())


class StrictJsonRoute(APIRoute):
    """A route whose body is one strict JSON object: no duplicate keys, NaN, endless nesting or numbers over 64 bits."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


def too_large(limit_bytes: int) -> PpecError:
    return PpecError(
        "request.too_large",
        f"the body is larger than {limit_bytes} bytes",
        hint="Split the request, or raise the limit in the orchestrator's settings.",
    )


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
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit_bytes:
                raise too_large(self._limit_bytes)
            return message

        await self._app(scope, counted, send)


def _is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "PUT" and scope["path"].startswith("/v1/images/"))
