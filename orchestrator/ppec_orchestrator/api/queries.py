# SPDX-License-Identifier: Apache-2.0
"""Query strings: whatever a route doesn't declare is refused, as unknown fields of bodies are.

FastAPI leaves out what it doesn't know, and of a parameter that is given twice takes the last. A misspelt filter would
then be none, and somebody may delete what such a list shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin
from urllib.parse import unquote_to_bytes

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from ppec_contract.validation import faults_problem
from ppec_orchestrator.api.auth import guards_of, let_in

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
# What wraps the type of a parameter without being it.
_WRAPPERS = (Annotated, Union, UnionType)
_SEVERAL = (list, tuple, set, frozenset)


@dataclass(frozen=True, slots=True)
class QueryParameters:
    """The parameters that a query may have, by name, and whether each `may_repeat`."""

    may_repeat: Mapping[str, bool]

    @classmethod
    def of_route(cls, dependant: Dependant) -> Self:
        """Those that the endpoint or one of its dependencies declares."""
        return cls(dict(_declared(dependant)))

    @classmethod
    def of_model(cls, model: type[BaseModel]) -> Self:
        return cls(dict(_fields(model)))

    def check(self, connection: HTTPConnection, what: str) -> None:
        """Raises `request.invalid`, which tells what `what` takes."""
        query: bytes = connection.scope.get("query_string", b"")
        faults = [*_not_text(query), *self._faults(connection)] if query else []
        if faults:
            raise faults_problem(faults, hint=f"{what} takes {self._told()}.")

    def _faults(self, connection: HTTPConnection) -> Iterator[dict[str, Any]]:
        given = Counter(name for name, _ in connection.query_params.multi_items())
        for name, times in given.items():
            if name not in self.may_repeat:
                yield _fault("there is no such parameter", name)
            elif times > 1 and not self.may_repeat[name]:
                yield _fault(f"it is given {times} times, wanted once", name)

    def _told(self) -> str:
        return f"these query parameters: {', '.join(self.may_repeat)}" if self.may_repeat else "no query parameters"


def _declared(dependant: Dependant) -> Iterator[tuple[str, bool]]:
    for field in dependant.query_params:
        annotation = field.field_info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _fields(annotation)
        else:
            yield field.alias, _may_repeat(annotation)
    for dependency in dependant.dependencies:
        yield from _declared(dependency)


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, bool]]:
    for name, field in model.model_fields.items():
        yield field.alias or name, _may_repeat(field.annotation)


def _may_repeat(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    return origin in _SEVERAL or (origin in _WRAPPERS and any(_may_repeat(one) for one in get_args(annotation)))


def _not_text(query: bytes) -> Iterator[dict[str, Any]]:
    """Starlette would read what is no text as replacement characters, and bytes that aren't escaped as Latin-1."""
    try:
        query.decode("ascii")
        unquote_to_bytes(query).decode("utf-8")
    except UnicodeDecodeError:
        yield _fault("it is no UTF-8 with everything beyond ASCII percent-encoded")


def _fault(what: str, *name: str) -> dict[str, Any]:
    return {"loc": ("query", *name), "type": "query", "msg": what}


class StrictQueryRoute(APIRoute):
    """A route that takes the query parameters it declares, and no others.

    Who may not call is told that before what is wrong with the query, the path or the body, and before any of the body
    is read, which FastAPI would do first. So the guards are asked here, and the endpoint gets what they said, unless
    the body takes its time.
    """

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        known, guards = QueryParameters.of_route(self.dependant), guards_of(self.dependant)

        async def handled(request: Request) -> Response:
            for guard in guards:
                await let_in(request, guard)
            # Hosts' heartbeats have none, and come by the thousand.
            if request.scope.get("query_string"):
                known.check(request, f"{request.method} {self.path_format}")
            return await handle(request)

        return handled
