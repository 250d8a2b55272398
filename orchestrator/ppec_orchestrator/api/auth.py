# SPDX-License-Identifier: Apache-2.0
"""Who calls: people and programs by bearer token, hosts by their client certificate.

A role includes the ones before it: viewer, operator, admin. Endpoints declare the least they need:
`def list_flavors(caller: Viewer, …)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity
from ppec_orchestrator.api.services import Here, Services
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.certificates import serial_of

_MAX_TOKEN = 128


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


def bearer_caller(services: Here, credentials: Credentials) -> Caller:
    token = credentials.credentials if credentials is not None else ""
    if not 0 < len(token) <= _MAX_TOKEN:
        raise _required("no bearer token was given")
    found = services.tokens.find(token, now=services.now())
    if found is None:
        raise _required("the bearer token is unknown or has expired")
    return Caller(found.name, found.role)


def require(role: Role) -> Callable[..., Caller]:
    """A dependency that lets callers of at least this role in."""

    def check(caller: Annotated[Caller, Depends(bearer_caller)]) -> Caller:
        if not caller.role.includes(role):
            raise PpecError(
                "auth.forbidden",
                f"{caller.name} is {caller.role}, wanted {role}",
                hint="Use a token of the wanted role.",
                subject=f"caller {caller.name}",
            )
        return caller

    return check


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
    return identity


def the_host_itself(request: Request, services: Here, host: str) -> str:
    """Lets only the host named in the path in, by its certificate; returns its name."""
    identity = peer_identity(request, services)
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


HostItself = Annotated[str, Depends(the_host_itself)]


def host_or_viewer(request: Request, services: Here, credentials: Credentials) -> str:
    """For what hosts fetch and people may look at: any host's certificate, or a viewer's token. Returns the name."""
    identity = peer_identity(request, services)
    if identity is not None and identity.role == "host":
        return identity.uri
    return require(Role.VIEWER)(bearer_caller(services, credentials)).name


HostOrViewer = Annotated[str, Depends(host_or_viewer)]
