# SPDX-License-Identifier: Apache-2.0
"""The route class that leaves an audit line for every change made or refused. Every router that changes something has
it as its `route_class`, by itself or through `StrictJsonRoute`; a test walks the routes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from ppec_contract.errors import PpecError, http_status
from ppec_orchestrator.api.auth import caller_of
from ppec_orchestrator.audit import audit

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# Where the JSON route leaves the body it has parsed.
BODY = "ppec.body"
# What names the thing in a body, first found first taken.
_NAMES = ("name", "names", "vms", "cidr", "host")
_MOST_NAMES = 20
_FORBIDDEN = 403


class AuditedRoute(APIRoute):
    """`handler` is what a subclass overrides: whatever it refuses is seen here."""

    audited: ClassVar[bool] = True

    def handler(self) -> Handler:
        return super().get_route_handler()

    def get_route_handler(self) -> Handler:
        handle = self.handler()
        if not self.audited or not CHANGING & set(self.methods or ()):
            return handle

        async def audited(request: Request) -> Response:
            try:
                response = await handle(request)
            except PpecError as error:
                if http_status(error.code) == _FORBIDDEN:
                    audit(**_told(request, self.name), outcome="refused", code=error.code)
                raise
            audit(**_told(request, self.name), outcome="done")
            return response

        return audited


def _told(request: Request, action: str) -> dict[str, Any]:
    client = request.client.host if request.client is not None else ""
    return {"caller": caller_of(request), "action": action, "subject": _subject(request), "client": client}


def _subject(request: Request) -> str:
    if request.path_params:
        return " ".join(str(value) for value in request.path_params.values())
    body = request.scope.get(BODY)
    if not isinstance(body, Mapping):
        return ""
    found = next((body[name] for name in _NAMES if body.get(name)), "")
    several = found if isinstance(found, list) else [found]
    return " ".join(one for one in several[:_MOST_NAMES] if isinstance(one, str))
