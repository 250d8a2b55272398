# SPDX-License-Identifier: Apache-2.0
"""Who calls: people and programs by bearer token, hosts by their client certificate.

A role includes the ones before it: viewer, operator, admin. Endpoints declare the least they need:
`def list_flavors(caller: Viewer, …)`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request, Security
from fastapi.dependencies.models import Dependant
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity
from ppec_orchestrator.api.services import Services, services_of
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.certificates import serial_of
from ppec_orchestrator.store.tokens import Token

T = TypeVar("T")
# Lets who makes a request in and says who that is, or refuses it.
Guard = Callable[[Request], Awaitable[T]]
_MAX_TOKEN = 128
# Where a request says who makes it, once that is known; the audit lines are signed with it.
_CALLER = "ppec.caller"
# Where a request keeps what its guards said and when, and for how long that stands: not for as long as it likes to take
# for its body, after which its token may be no more.
_SAID = "ppec.said"
_STANDS_S = 1.0
_GUARDS: dict[Callable[..., Any], Guard[Any]] = {}
D = TypeVar("D", bound=Callable[..., Any])


def stands_for(guard: Guard[Any]) -> Callable[[D], D]:
    """Marks the dependency by which endpoints get what this guard says. Its parameters are for the OpenAPI document."""

    def marked(dependency: D) -> D:
        _GUARDS[dependency] = guard
        return dependency

    return marked


def guard_of(dependency: Callable[..., Any] | None) -> Guard[Any] | None:
    """The guard that a dependency stands for; None for one that lets everybody in."""
    return None if dependency is None else _GUARDS.get(dependency)


def guards_of(dependant: Dependant) -> list[Guard[Any]]:
    """Those that an endpoint declares."""
    found = (guard_of(one.call) for one in dependant.dependencies)
    return [guard for guard in found if guard is not None]


async def let_in(request: Request, guard: Guard[T]) -> T:
    """What the guard says, or has said a moment ago: of a request that is there whole it is asked once."""
    said: dict[Guard[Any], tuple[float, Any]] = request.scope.setdefault(_SAID, {})
    now = time.monotonic()
    if guard not in said or now - said[guard][0] >= _STANDS_S:
        said[guard] = now, await guard(request)
    return cast("T", said[guard][1])


def caller_of(connection: HTTPConnection) -> str:
    """Who makes this request, as far as it is known; empty before that."""
    return str(connection.scope.get(_CALLER, ""))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked; `name` is what operations and the log are signed with."""

    name: str
    role: Role


def _required(why: str) -> PpecError:
    return PpecError(
        "auth.required",
        why,
        hint="Send `Authorization: Bearer <token>`; `ppec-orchestrator token create` makes one.",
        subject="caller",
    )


_SCHEME = HTTPBearer(auto_error=False, scheme_name="token", description="An API token.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_SCHEME)]


async def bearer_caller(request: Request) -> Caller:
    """Of a token that is remembered no thread has to be asked: most requests' are."""
    services, token = await services_of(request), _token_of(await _SCHEME(request))
    found = services.tokens.remembered(token, now=services.now())
    if found is not None:
        return _known(request, found)
    return await run_in_threadpool(_caller, request, services, token)


def _token_of(credentials: HTTPAuthorizationCredentials | None) -> str:
    return credentials.credentials if credentials is not None else ""


def connection_caller(connection: HTTPConnection, services: Services, role: Role) -> Caller:
    """Who opens a WebSocket, by the same header as any request's. Raises `auth.required`, `auth.forbidden`.

    A browser sends a WebSocket no such header on a page's behalf, so no page can use somebody else's token.
    """
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return _at_least(role, _caller(connection, services, token if scheme.lower() == "bearer" else ""))


def _caller(connection: HTTPConnection, services: Services, token: str) -> Caller:
    if not 0 < len(token) <= _MAX_TOKEN:
        raise _required("no bearer token was given")
    found = services.tokens.find(token, now=services.now())
    if found is None:
        raise _required("the bearer token is unknown or has expired")
    return _known(connection, found)


def _known(connection: HTTPConnection, token: Token) -> Caller:
    connection.scope[_CALLER] = token.name
    return Caller(token.name, token.role)


def require(role: Role) -> Callable[..., Any]:
    """A dependency that lets callers of at least this role in."""

    async def guard(request: Request) -> Caller:
        return _at_least(role, await bearer_caller(request))

    # Nothing in it waits, so it needs no thread of the pool.
    @stands_for(guard)
    async def check(request: Request, token: Credentials) -> Caller:
        return await let_in(request, guard)

    return check


def _at_least(role: Role, caller: Caller) -> Caller:
    if not caller.role.includes(role):
        raise PpecError(
            "auth.forbidden",
            f"{caller.name} is {caller.role}, wanted {role}",
            hint="Use a token of the wanted role.",
            subject=f"caller {caller.name}",
        )
    return caller


Viewer = Annotated[Caller, Depends(require(Role.VIEWER))]
Operator = Annotated[Caller, Depends(require(Role.OPERATOR))]
Admin = Annotated[Caller, Depends(require(Role.ADMIN))]


def peer_identity(request: Request, services: Services) -> Identity | None:
    """The verified client certificate's identity; None without a certificate.

    A host's counts only while it is recorded as issued to that host: deleting the host withdraws it.
    """
    certificate = request.scope.get("state", {}).get("peer_certificate")
    if not certificate:
        return None
    identity = Identity.from_peer_certificate(certificate)
    if identity.role == "host" and not services.certificates.holds(
        identity, serial_of(certificate), now=services.now()
    ):
        raise PpecError(
            "auth.required",
            f"the certificate of {identity.uri} is withdrawn or superseded, or was never issued here",
            hint="Enrol the host again with a new token.",
            subject="certificate",
        )
    request.scope[_CALLER] = identity.uri
    return identity


def _known_at_once(request: Request, services: Services) -> bool:
    """Whether `peer_identity` answers without a look at the database."""
    certificate = request.scope.get("state", {}).get("peer_certificate")
    if not certificate:
        return True
    identity = Identity.from_peer_certificate(certificate)
    serial = serial_of(certificate)
    return identity.role != "host" or services.certificates.remembers(identity, serial, now=services.now())


async def _peer(request: Request) -> Identity | None:
    """What `peer_identity` says."""
    services = await services_of(request)
    if _known_at_once(request, services):
        return peer_identity(request, services)
    return await run_in_threadpool(peer_identity, request, services)


async def _named_host(request: Request) -> str:
    """Lets only the host named in the path in, by its certificate; returns its name. Of a certificate that is
    remembered no thread has to be asked: most heartbeats' are."""
    host = str(request.path_params["host"])
    identity = await _peer(request)
    if identity is None:
        raise PpecError(
            "auth.required",
            f"host {host[:63]!r} is known by its client certificate, and none was given",
            hint="Enrol the host and present its certificate.",
            subject="caller",
        )
    if identity.role != "host" or identity.name != host:
        raise PpecError(
            "auth.wrong_identity",
            f"the certificate is {identity.uri}, wanted ppec://host/{host[:63]}",
            hint="A host may speak for itself only.",
            subject="certificate",
        )
    return host


@stands_for(_named_host)
async def the_host_itself(request: Request, host: str) -> str:
    return await let_in(request, _named_host)


HostItself = Annotated[str, Depends(the_host_itself)]


async def _any_host_or_viewer(request: Request) -> str:
    identity = await _peer(request)
    if identity is not None and identity.role == "host":
        return identity.uri
    return _at_least(Role.VIEWER, await bearer_caller(request)).name


@stands_for(_any_host_or_viewer)
async def host_or_viewer(request: Request, credentials: Credentials) -> str:
    """For what hosts fetch and people may look at: any host's certificate, or a viewer's token. Returns the name."""
    return await let_in(request, _any_host_or_viewer)


HostOrViewer = Annotated[str, Depends(host_or_viewer)]
