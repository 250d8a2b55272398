# SPDX-License-Identifier: Apache-2.0
"""The route class that leaves an audit line for every change made, refused or broken off. Every router that changes
something has it as its `route_class`, by itself or through `StrictJsonRoute`; a test walks the routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ppec_contract.api_vms import VmAction
from ppec_contract.errors import PpecError, http_status
from ppec_orchestrator.api.auth import caller_of
from ppec_orchestrator.api.queries import Handler, StrictQueryRoute
from ppec_orchestrator.audit import audit

CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
# Where the JSON route leaves the body it has parsed.
BODY = "ppec.body"
# Where an endpoint leaves the names of what it changed, when path and body may not have them.
_CHANGED = "ppec.changed"
# Where it leaves what else the line is to say.
_TELLS = "ppec.tells"
# What names the thing in a body, first found first taken.
_NAMES = ("name", "names", "vms", "cidr", "host")
# Of the names in a subject, in characters; how many were left out is said.
_MOST_OF_NAMES = 200
_FORBIDDEN = 403
_OURS = 500
_OPERATIONS = "/v1/operations/"
_ACTIONS = frozenset(VmAction)


def changes(request: Request, names: Sequence[str]) -> None:
    """For endpoints: these are what the request changes, whatever it called them."""
    request.scope[_CHANGED] = names


def tells(request: Request, **more: str) -> None:
    """For endpoints: this is to be said besides, as far as there is anything in it."""
    request.scope[_TELLS] = {name: value for name, value in more.items() if value}


class AuditedRoute(StrictQueryRoute):
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
                status = http_status(error.code)
                if status == _FORBIDDEN:
                    audit(**_told(request, self.name), outcome="refused", code=error.code)
                elif status >= _OURS:
                    audit(**_told(request, self.name), outcome="failed", code=error.code)
                raise
            except (RequestValidationError, HTTPException, ClientDisconnect):
                raise  # A request that is not understood, or not there: nothing was begun.
            except Exception:
                # It may have come after a commit.
                audit(**_told(request, self.name), outcome="failed", code="internal.error")
                raise
            audit(**_told(request, self.name), outcome="done", **_operation(response))
            return response

        return audited


def _told(request: Request, action: str) -> dict[str, Any]:
    client = request.client.host if request.client is not None else ""
    told = {"caller": caller_of(request), "action": action, "subject": _subject(request), "client": client}
    told |= request.scope.get(_TELLS, {})
    asked = _body(request).get("action")
    # Also where the body was not validated: what is none of these is not said.
    return {**told, "asked": asked} if isinstance(asked, str) and asked in _ACTIONS else told


def _operation(response: Response) -> dict[str, str]:
    """The operation that the change is made by, where one was accepted."""
    place = response.headers.get("location", "")
    return {"operation": place.removeprefix(_OPERATIONS)} if place.startswith(_OPERATIONS) else {}


def _body(request: Request) -> Mapping[str, Any]:
    body = request.scope.get(BODY)
    return body if isinstance(body, Mapping) else {}


def _subject(request: Request) -> str:
    if changed := request.scope.get(_CHANGED):
        return _shortened(changed)
    if request.path_params:
        return " ".join(str(value) for value in request.path_params.values())
    body = _body(request)
    found = next((body[name] for name in _NAMES if body.get(name)), "")
    several = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, str)]
    return _shortened(several)


def _shortened(names: Sequence[str]) -> str:
    told = ""
    for number, name in enumerate(names):
        if number and len(told) + len(name) >= _MOST_OF_NAMES:
            return f"{told} and {len(names) - number} more"
        told = f"{told} {name}" if number else name
    return told
