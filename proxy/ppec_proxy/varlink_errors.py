# SPDX-License-Identifier: Apache-2.0
"""The one seam where the agent's Varlink replies become PPEC errors."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ppec_contract.agent import FAILED
from ppec_contract.errors import PpecError, Problem

# Varlink's own errors, by the standard's interface org.varlink.service.
_STANDARD = {
    "org.varlink.service.MethodNotFound": "request.unknown_method",
    "org.varlink.service.MethodNotImplemented": "request.unknown_method",
    "org.varlink.service.InterfaceNotFound": "request.unsupported_version",
    "org.varlink.service.InvalidParameter": "request.invalid",
    "org.varlink.service.ExpectedMore": "request.invalid",
    "org.varlink.service.PermissionDenied": "auth.peer_refused",
}


def reply_error(reply: dict[str, Any]) -> PpecError | None:
    """The error a reply carries, or None. An error we don't know counts as internal: it's a fault of the pairing."""
    name = reply.get("error")
    if name is None:
        return None
    parameters = reply.get("parameters")
    if name == FAILED:
        try:
            return Problem.model_validate(parameters).error()
        except ValidationError:
            return PpecError("internal.error", "the agent failed without saying why", subject="agent")
    code = _STANDARD.get(name) if isinstance(name, str) else None
    if code is None:
        return PpecError("internal.error", f"the agent answered an unknown error {str(name)[:120]!r}", subject="agent")
    named = ", ".join(f"{key}={str(value)[:120]!r}" for key, value in sorted((parameters or {}).items()))
    return PpecError(
        code,
        f"the agent refused the call: {name.rsplit('.', 1)[-1]}{f' ({named})' if named else ''}",
        hint="Proxy and agent may be of different releases; bring the host to one release.",
        subject="agent",
    )


def error_reply(error: PpecError) -> dict[str, Any]:
    """The Varlink reply that says `error`; ends a stream whose HTTP status has already been sent."""
    return {"error": FAILED, "parameters": error.problem().model_dump(mode="json")}


def agent_unavailable(why: str) -> PpecError:
    return PpecError(
        "agent.unavailable",
        f"the host's agent does not answer: {why}",
        hint="Check ppec-agentd on the host; the request may be repeated as it is.",
        subject="agent",
    )
