# SPDX-License-Identifier: Apache-2.0
"""The one error table: a stable code, who has to act, and how each boundary shows it.

A code is `subject.condition`. Its class says what the caller should do; HTTP status, retry rule and exit code follow
from the class unless the row says otherwise. Bodies are problem+json (RFC 9457), made by `Problem`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import Field

from ppec_contract.model import Model


class ErrorClass(StrEnum):
    """What the caller should do about it."""

    FIX_REQUEST = "fix-request"
    NOT_ALLOWED = "not-allowed"
    NOT_FOUND = "not-found"
    CONFLICT = "conflict"
    NO_CAPACITY = "no-capacity"
    TRY_AGAIN = "try-again"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class _ClassRule:
    http_status: int
    retry: bool
    exit_code: int


# Exit codes: 2 is what argument parsers already use for "fix the request"; 1 is left to crashes.
CLASS_RULES: dict[ErrorClass, _ClassRule] = {
    ErrorClass.FIX_REQUEST: _ClassRule(422, False, 2),
    ErrorClass.NOT_ALLOWED: _ClassRule(403, False, 3),
    ErrorClass.NOT_FOUND: _ClassRule(404, False, 4),
    ErrorClass.CONFLICT: _ClassRule(409, False, 5),
    ErrorClass.NO_CAPACITY: _ClassRule(409, False, 6),
    ErrorClass.TRY_AGAIN: _ClassRule(503, True, 7),
    ErrorClass.INTERNAL: _ClassRule(500, False, 8),
}


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One row of the table. `http_status` is set only where the class's status is not the right one."""

    error_class: ErrorClass
    title: str
    http_status: int | None = None


_F, _A, _N = ErrorClass.FIX_REQUEST, ErrorClass.NOT_ALLOWED, ErrorClass.NOT_FOUND
_C, _P, _T, _I = ErrorClass.CONFLICT, ErrorClass.NO_CAPACITY, ErrorClass.TRY_AGAIN, ErrorClass.INTERNAL

ERROR_TABLE: dict[str, ErrorRow] = {
    # The request itself
    "request.invalid": ErrorRow(_F, "The request does not match the contract"),
    "request.too_large": ErrorRow(_F, "The request body is larger than allowed", 413),
    "request.malformed": ErrorRow(_F, "The request is not well-formed JSON", 400),
    "request.unknown_method": ErrorRow(_N, "There is no such method"),
    "request.unsupported_version": ErrorRow(_F, "The peer speaks another version of the contract"),
    "request.method_not_allowed": ErrorRow(_F, "The resource does not take this HTTP method", 405),
    "request.idempotency_mismatch": ErrorRow(_C, "The idempotency key was used for another request"),
    "request.deadline_exceeded": ErrorRow(_T, "The request was not answered in time", 504),
    # Who asks
    "auth.required": ErrorRow(_A, "No valid credentials were given", 401),
    "auth.forbidden": ErrorRow(_A, "The caller may not do this"),
    "auth.wrong_identity": ErrorRow(_A, "The certificate belongs to somebody else"),
    "auth.outside_ring_fence": ErrorRow(_A, "The client's address is not on the allow-list"),
    "auth.peer_refused": ErrorRow(_A, "The socket's peer is not allowed to connect"),
    "enrolment.token_invalid": ErrorRow(_A, "The enrolment token is unknown, used or expired"),
    # VMs
    "vm.not_found": ErrorRow(_N, "There is no such VM"),
    "vm.exists": ErrorRow(_C, "A VM with this name or id exists"),
    "vm.wrong_state": ErrorRow(_C, "The VM is in a state that does not allow this"),
    "vm.odd_vcpus": ErrorRow(_F, "A VM has an even number of vCPUs"),
    "vm.exceeds_socket": ErrorRow(_F, "The VM is larger than any socket"),
    "vm.start_failed": ErrorRow(_I, "The hypervisor could not start the VM"),
    "vm.stop_timeout": ErrorRow(_T, "The guest did not shut down in time"),
    "vm.reboot_timeout": ErrorRow(_T, "The guest did not reboot in time"),
    "vm.went_off": ErrorRow(_C, "The VM was to reboot, and is off"),
    "vm.create_failed": ErrorRow(_I, "The VM could not be created"),
    "console.busy": ErrorRow(_T, "The console's input is in other hands"),
    "guest.agent_unavailable": ErrorRow(_T, "The agent inside the guest does not answer"),
    "guest.agent_failed": ErrorRow(_C, "The agent inside the guest refused or failed"),
    # Hosts
    "host.not_found": ErrorRow(_N, "There is no such host"),
    "host.exists": ErrorRow(_C, "A host with this name exists"),
    "host.in_use": ErrorRow(_C, "The host still holds VMs"),
    "host.no_capacity": ErrorRow(_P, "The host has not enough free resources"),
    "host.unreachable": ErrorRow(_T, "The host can't be reached"),
    "host.not_enrolled": ErrorRow(_C, "The host has not enrolled yet"),
    "host.bridge_missing": ErrorRow(_C, "The host has no such bridge"),
    "host.pool_missing": ErrorRow(_C, "The host has no such storage pool"),
    "retune.not_possible": ErrorRow(_P, "No retune within its bounds gives the room that is wanted"),
    "retune.outdated": ErrorRow(_C, "The host has moved on since the retune was planned"),
    "retune.failed": ErrorRow(_I, "The retune failed and was taken back"),
    # Placement
    "placement.no_capacity": ErrorRow(_P, "No host can take the VM"),
    "placement.conflict": ErrorRow(_T, "Another request took the capacity first"),
    "plan.not_found": ErrorRow(_N, "There is no such plan, or it has expired"),
    "plan.ambiguous": ErrorRow(_F, "Several plans begin with this"),
    "plan.outdated": ErrorRow(_C, "The fleet has moved on since the plan was made"),
    "approval.required": ErrorRow(_A, "Somebody else has to approve this first"),
    "approval.by_maker": ErrorRow(_A, "Nobody approves what they asked for themselves"),
    "approval.given": ErrorRow(_C, "Somebody has approved this already"),
    "group.mismatch": ErrorRow(_C, "The group of VMs is defined otherwise"),
    # Fleets in files
    "fleet.unreadable": ErrorRow(_F, "The file is in no format of fleets"),
    "fleet.invalid": ErrorRow(_F, "The fleet's file contradicts itself, or its format"),
    # Catalogue
    "datacentre.not_found": ErrorRow(_N, "There is no such data centre"),
    "datacentre.exists": ErrorRow(_C, "A data centre with this name exists"),
    "cluster.not_found": ErrorRow(_N, "There is no such cluster"),
    "cluster.exists": ErrorRow(_C, "A cluster with this name exists"),
    "cluster.exposed": ErrorRow(_P, "A loss in the cluster could not be made good any more"),
    "rack.not_found": ErrorRow(_N, "There is no such rack"),
    "rack.exists": ErrorRow(_C, "A rack with this name exists"),
    "flavor.not_found": ErrorRow(_N, "There is no such flavor"),
    "flavor.exists": ErrorRow(_C, "A flavor with this name exists"),
    "image.not_found": ErrorRow(_N, "There is no such image"),
    "image.exists": ErrorRow(_C, "An image with this name exists"),
    "image.checksum_mismatch": ErrorRow(_C, "The image is not what its checksum says"),
    "image.fetch_failed": ErrorRow(_T, "The image could not be fetched"),
    "image.invalid": ErrorRow(_F, "The file is not an image PPEC can use"),
    "resource.in_use": ErrorRow(_C, "Something still refers to this"),
    # Addresses
    "vrf.not_found": ErrorRow(_N, "There is no such VRF"),
    "vrf.exists": ErrorRow(_C, "A VRF with this name exists"),
    "prefix.not_found": ErrorRow(_N, "There is no such prefix"),
    "prefix.overlaps": ErrorRow(_C, "The prefix overlaps another one of its VRF"),
    "prefix.not_serving": ErrorRow(_C, "The prefix does not serve the place asked for"),
    "prefix.invalid": ErrorRow(_F, "The prefix, gateway or range is not usable"),
    "address.exhausted": ErrorRow(_P, "No address is left for the host's VRF"),
    "address.in_use": ErrorRow(_C, "The address is in use"),
    "address.reserved": ErrorRow(_C, "The address is reserved or excluded"),
    "address.quarantined": ErrorRow(_C, "The address was released a short while ago"),
    "address.not_usable": ErrorRow(_F, "The address is none that a VM could be given"),
    "import.invalid": ErrorRow(_F, "Some of the rows can't be imported"),
    "netbox.unavailable": ErrorRow(_T, "NetBox does not answer"),
    "netbox.refused": ErrorRow(_C, "NetBox refused"),
    "hold.not_found": ErrorRow(_N, "There is no such hold"),
    "hold.overlaps": ErrorRow(_C, "The addresses are held back already"),
    # Operations
    "operation.not_found": ErrorRow(_N, "There is no such operation"),
    "operation.finished": ErrorRow(_C, "The operation has already ended"),
    "operation.cancelled": ErrorRow(_C, "The operation was cancelled"),
    "operation.fenced": ErrorRow(_C, "A newer owner of the operation has taken over"),
    "run.failed": ErrorRow(_I, "The Ansible run failed"),
    "run.lost": ErrorRow(_T, "The Ansible run ended without a result"),
    # Ours to fix
    "hypervisor.failed": ErrorRow(_I, "libvirt refused or failed"),
    "hypervisor.unavailable": ErrorRow(_T, "libvirt does not answer"),
    "agent.unavailable": ErrorRow(_T, "The host's agent does not answer"),
    "agent.busy": ErrorRow(_T, "The agent has too many requests under way"),
    "agent.recovering": ErrorRow(_T, "The agent is still rebuilding its state"),
    "orchestrator.busy": ErrorRow(_T, "The orchestrator has too many requests of this kind under way"),
    "orchestrator.unavailable": ErrorRow(_T, "The orchestrator does not answer"),
    "store.unavailable": ErrorRow(_T, "The database does not answer"),
    "disk.full": ErrorRow(_P, "The storage has no room left"),
    "disk.not_erased": ErrorRow(_I, "The drive could not be erased"),
    "internal.error": ErrorRow(_I, "An error of ours; the log has the details"),
}


def http_status(code: str) -> int:
    row = ERROR_TABLE[code]
    return row.http_status or CLASS_RULES[row.error_class].http_status


def exit_code(code: str) -> int:
    """The CLI's exit code; an unknown code (from a newer server) counts as internal."""
    row = ERROR_TABLE.get(code)
    return CLASS_RULES[row.error_class if row else ErrorClass.INTERNAL].exit_code


def retryable(code: str) -> bool:
    row = ERROR_TABLE.get(code)
    return row is not None and CLASS_RULES[row.error_class].retry


class Problem(Model):
    """problem+json (RFC 9457) as PPEC fills it: `code` is stable, `detail` is for people, `hint` says what to do."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    hint: str = ""
    subject: str = ""
    details: dict[str, Any] = Field(default_factory=dict)

    def error(self) -> PpecError:
        """The exception this body stands for, on the receiving side."""
        code = self.code if self.code in ERROR_TABLE else "internal.error"
        return PpecError(code, self.detail, hint=self.hint, subject=self.subject, details=self.details)


class PpecError(Exception):
    """An error with a row in the table.

    `message` says what failed on which subject, wanted against found; `hint` what to do; `subject` names the thing
    ("vm web-1", "host h3"); `details` carries counts and figures a program may want. All of it may be shown to the
    caller: what must stay in the log belongs in the exception's cause.
    """

    def __init__(
        self, code: str, message: str, *, hint: str = "", subject: str = "", details: dict[str, Any] | None = None
    ) -> None:
        if code not in ERROR_TABLE:
            raise KeyError(f"error code {code!r} has no row in ERROR_TABLE")
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.subject = subject
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    @property
    def retryable(self) -> bool:
        return retryable(self.code)

    def problem(self) -> Problem:
        row = ERROR_TABLE[self.code]
        return Problem(
            type=f"urn:ppec:error:{self.code}",
            title=row.title,
            status=http_status(self.code),
            code=self.code,
            detail=self.message,
            hint=self.hint,
            subject=self.subject,
            details=self.details,
        )
