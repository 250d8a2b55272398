# SPDX-License-Identifier: Apache-2.0
"""The outermost layer of the application: the caller's identity, every error as problem+json, one access line.

Nothing gets past it: an exception of ours becomes `internal.error` with a reference into the log, never a traceback to
the client. The access line says who, from where, what, how it ended and how long it took, and nothing of the bodies.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppec_contract.errors import PpecError
from ppec_contract.peer_protocol import PROBLEM_TYPE
from ppec_proxy.callers import require_caller
from ppec_proxy.request_body import ClientGoneError

log = structlog.get_logger("ppec.proxy.access")
# After these the rest of the body may still be on its way; reading it to the end would serve nobody.
_CLOSING_CODES = frozenset(("request.too_large", "request.deadline_exceeded"))


def problem_response(error: PpecError) -> Response:
    problem = error.problem()
    headers = {"connection": "close"} if error.code in _CLOSING_CODES else {}
    if error.code == "request.method_not_allowed":
        headers["allow"] = error.details.get("allow", "POST")
    return Response(problem.model_dump_json(), problem.status, headers, media_type=PROBLEM_TYPE)


class Edge:
    """Wraps the routes."""

    def __init__(self, routes: ASGIApp) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        seen = _Seen(send)
        # The routes add what they know (the operation) here.
        noted: dict[str, Any] = scope["state"].setdefault("access", {})
        try:
            caller = require_caller(scope["state"].get("peer_certificate"))
            noted["identity"] = caller.uri
            await self._routes(scope, receive, seen.send)
        except ClientGoneError:
            noted["error"] = "client gone"
        except PpecError as error:
            await self._answer(error, scope, receive, seen)
        except Exception:  # the boundary: whatever it was, the client gets a problem and the log the traceback
            await self._answer(_internal(), scope, receive, seen)
        finally:
            _access_line(scope, seen, noted)

    async def _answer(self, error: PpecError, scope: Scope, receive: Receive, seen: _Seen) -> None:
        scope["state"]["access"]["error"] = error.code
        if seen.status is None:
            await problem_response(error)(scope, receive, seen.send)


class _Seen:
    """Passes messages on and remembers the status and the time."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.started = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _internal() -> PpecError:
    reference = uuid.uuid4().hex[:12]
    log.exception("request failed", reference=reference)
    return PpecError(
        "internal.error", f"the proxy failed on the request; its log has the details under {reference}", subject="proxy"
    )


def _access_line(scope: Scope, seen: _Seen, noted: dict[str, Any]) -> None:
    client = Request(scope).client
    log.info(
        "request",
        client=client.host if client else None,
        method=scope["method"],
        path=scope["path"][:200],
        status=seen.status,
        duration_ms=round((time.monotonic() - seen.started) * 1000, 1),
        **noted,
    )
