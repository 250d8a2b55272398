# SPDX-License-Identifier: Apache-2.0
"""Every error leaves as application/problem+json (RFC 9457), and none with a traceback."""

from __future__ import annotations

import uuid
from typing import cast

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppec_contract.errors import PpecError
from ppec_contract.validation import faults_problem

PROBLEM_JSON = "application/problem+json"
_RETRY_AFTER_S = "1"
_log = structlog.get_logger(__name__)


def problem_response(error: PpecError) -> Response:
    problem = error.problem()
    headers = {"Cache-Control": "no-store"}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if problem.status == 503:
        headers["Retry-After"] = _RETRY_AFTER_S
    # A lone surrogate in an echoed name has no UTF-8 form: JSON escapes carry it.
    body = problem.model_dump_json(ensure_ascii=True)
    return Response(body, status_code=problem.status, media_type=PROBLEM_JSON, headers=headers)


def internal_error(error: Exception, where: str) -> PpecError:
    """Logs the exception under an incident id and returns what the caller may see of it."""
    incident = uuid.uuid4().hex
    _log.error("request.failed", incident=incident, where=where, exc_info=error)
    return PpecError(
        "internal.error",
        "the request failed by a fault of the orchestrator's own",
        hint=f"Look for incident {incident} in the orchestrator's log.",
        details={"incident": incident},
    )


def _ppec_error(request: Request, error: Exception) -> Response:
    response = problem_response(cast("PpecError", error))
    if response.status_code == 401 and _with_certificate(request):
        # A certificate is shown once per connection: on the next one the caller may show a newer.
        response.headers["Connection"] = "close"
    return response


def _with_certificate(request: Request) -> bool:
    return bool(request.scope.get("state", {}).get("peer_certificate"))


def _validation_error(request: Request, error: Exception) -> Response:
    faults = []
    for fault in cast("RequestValidationError", error).errors():
        place, *path = fault["loc"]
        # The body's fields are named as the caller wrote them; the others with where they stand.
        faults.append({**fault, "loc": path if place == "body" else [place, *path]})
    return problem_response(faults_problem(faults))


def _http_error(request: Request, error: Exception) -> Response:
    http = cast("HTTPException", error)
    # FastAPI wraps what reading the body raised.
    if isinstance(http.__cause__, PpecError):
        return problem_response(http.__cause__)
    where = f"{request.method} {request.url.path[:200]}"
    if http.status_code == 404:
        hint = "The OpenAPI document at /v1/openapi.json lists the paths."
        return problem_response(PpecError("request.unknown_method", f"there is no {where}", hint=hint))
    if http.status_code == 405:
        response = problem_response(PpecError("request.method_not_allowed", f"{where} is not offered"))
        response.headers.update(http.headers or {})
        return response
    if http.status_code < 500:
        return problem_response(PpecError("request.malformed", f"{where}: {http.detail}"))
    return problem_response(internal_error(error, where))


def _gone(request: Request, error: Exception) -> Response:
    # Nobody reads this answer: the caller closed the connection in mid-body.
    return problem_response(PpecError("request.malformed", "the body ended before it was complete"))


class UnhandledErrors:
    """The outermost layer: whatever nothing else caught becomes `internal.error`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            where = f"{scope['method']} {scope['path'][:200]}"
            response = problem_response(internal_error(error, where))
            if started:
                raise  # Half an answer is out: cutting the connection is all that is left.
            await response(scope, receive, send)


def install_problems(app: FastAPI) -> None:
    app.add_exception_handler(PpecError, _ppec_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
