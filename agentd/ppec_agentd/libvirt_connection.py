# SPDX-License-Identifier: Apache-2.0
"""The connection to libvirt: calls in threads, lifecycle events, and coming back after a loss.

libvirt's calls block, so each runs in a thread (`BlockingCalls`). Its default event loop runs in one daemon thread of
the process and hands events to asyncio. The socket notices a daemon that dies: the connection is made again with
back-off, the events are registered again, and listeners are told to look afresh. A daemon that hangs keeps its
connection: calls miss their deadlines, and are answered late or never. libvirt's keepalive would close it under the
calls that wait, and libvirt 9.0's client does not always survive that: the process dies of SIGSEGV. Nor is it needed
on a UNIX socket, which can't be half open.
Errors become PpecError in `_translated`, by code and never by text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from uuid import UUID

import libvirt

from ppec_agentd.blocking_calls import BlockingCalls, CallsExhaustedError, CallTimeoutError
from ppec_agentd.domain_xml.build import DiskCache
from ppec_agentd.hypervisor import EventKind, HypervisorEvent
from ppec_agentd.lifecycle import EventFanout
from ppec_agentd.topology import Topology
from ppec_contract.errors import PpecError

_log = logging.getLogger(__name__)
T = TypeVar("T")

_EVENTS = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: EventKind.DEFINED,
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: EventKind.UNDEFINED,
    libvirt.VIR_DOMAIN_EVENT_STARTED: EventKind.STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: EventKind.PAUSED,
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: EventKind.PAUSED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: EventKind.RESUMED,
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: EventKind.SHUTTING_DOWN,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: EventKind.STOPPED,
    libvirt.VIR_DOMAIN_EVENT_CRASHED: EventKind.CRASHED,
}

# What of a running domain somebody changed; of changes to its next start alone libvirt tells nobody.
_CHANGES = (
    libvirt.VIR_DOMAIN_EVENT_ID_TUNABLE,
    libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE,
    libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
    libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
    libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
)

_CODES = {
    libvirt.VIR_ERR_NO_DOMAIN: "vm.not_found",
    libvirt.VIR_ERR_DOM_EXIST: "vm.exists",
    libvirt.VIR_ERR_OPERATION_INVALID: "vm.wrong_state",
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: "guest.agent_unavailable",
    libvirt.VIR_ERR_AGENT_UNSYNCED: "guest.agent_unavailable",
    # Another call on the same domain holds its job.
    libvirt.VIR_ERR_OPERATION_TIMEOUT: "hypervisor.unavailable",
    libvirt.VIR_ERR_NO_CONNECT: "hypervisor.unavailable",
    libvirt.VIR_ERR_INVALID_CONN: "hypervisor.unavailable",
    libvirt.VIR_ERR_RPC: "hypervisor.unavailable",
}


@dataclass(frozen=True, slots=True)
class LibvirtOptions:
    """`domain_type` None decides from the CPU's flags; `declared_topology` is a lab's (see `Topology.declared`)."""

    uri: str = "qemu:///system"
    domain_type: Literal["kvm", "qemu"] | None = None
    declared_topology: Topology | None = None
    disk_cache: DiskCache = "none"
    workers: int = 8
    call_timeout_s: float = 30.0
    start_timeout_s: float = 120.0
    longest_backoff_s: float = 5.0


class _ClosedError(Exception):
    """The connection was given up before the call began."""


class _Shared:
    """A connection, and the calls that are on it now.

    A call holds no reference to its connection in libvirt's client library: closed under a call, the connection is
    freed while the call still waits on it, and the process dies. So the last call to end closes one that was given up.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._calls = 0
        self._given_up = False
        self._lock = threading.Lock()

    def use(self, work: Callable[[Any], T]) -> T:
        """`work(connection)`, in the calling thread. Raises _ClosedError."""
        with self._lock:
            if self._given_up:
                raise _ClosedError
            self._calls += 1
        try:
            return work(self.connection)
        finally:
            with self._lock:
                self._calls -= 1
                unused = self._unused()
            if unused:
                _release(self.connection)

    def give_up(self) -> None:
        """Closes it now, or leaves that to the last call on it. To be called once."""
        with self._lock:
            self._given_up = True
            unused = self._unused()
        if unused:
            _release(self.connection)

    def _unused(self) -> bool:
        return self._given_up and not self._calls


class LibvirtConnection:
    """One connection that comes back by itself; `fanout` gets its events."""

    def __init__(self, options: LibvirtOptions, fanout: EventFanout) -> None:
        self._options = options
        self._fanout = fanout
        self._calls = BlockingCalls(options.workers)
        self._connection: _Shared | None = None
        self._attempt = 0
        self._reconnecting: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        _run_event_loop()
        self._connection = await self._connect()

    async def close(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            self._reconnecting = None
        connection, self._connection = self._connection, None
        self._attempt += 1
        if connection is not None:
            with contextlib.suppress(CallTimeoutError, CallsExhaustedError):
                await self._calls.run(connection.give_up, self._options.call_timeout_s)

    async def _connect(self) -> _Shared:
        self._attempt += 1
        subject = f"libvirt at {self._options.uri}"
        try:
            return await self._calls.run(partial(self._connect_now, self._attempt), self._options.call_timeout_s)
        except libvirt.libvirtError as error:
            raise _unavailable(f"{subject} can't be reached", _figures(error)) from error
        except (CallTimeoutError, CallsExhaustedError) as error:
            raise _unavailable(f"{subject} can't be reached: {error}") from error

    def _connect_now(self, attempt: int) -> _Shared:
        connection = libvirt.open(self._options.uri)
        # Off, whatever libvirt.conf says: see the head of this file.
        connection.setKeepAlive(0, 0)
        connection.registerCloseCallback(self._on_close, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._on_reboot, None)
        for event in _CHANGES:
            connection.domainEventRegisterAny(None, event, self._on_change, None)
        if attempt != self._attempt:
            # This attempt hung, was given up, and woke: its events would come twice.
            _release(connection)
        return _Shared(connection)

    def _on_close(self, connection: Any, _reason: int, _opaque: None) -> None:
        self._post(self._lost, connection)

    def _on_lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: None) -> None:
        kind = _EVENTS.get(event)
        if kind is EventKind.STOPPED and detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED:
            kind = EventKind.CRASHED
        if kind is not None:
            self._post(self._fanout.send, HypervisorEvent(kind, UUID(domain.UUIDString()), domain.name()))

    def _on_reboot(self, _connection: Any, domain: Any, _opaque: None) -> None:
        self._post(self._fanout.send, HypervisorEvent(EventKind.REBOOTED, UUID(domain.UUIDString()), domain.name()))

    def _on_change(self, _connection: Any, domain: Any, *_details: object) -> None:
        self._post(self._fanout.send, HypervisorEvent(EventKind.CHANGED, UUID(domain.UUIDString()), domain.name()))

    def _post(self, callback: Callable[[Any], None], value: object) -> None:
        """From libvirt's event thread to ours."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(callback, value)

    def _lost(self, connection: Any) -> None:
        if self._connection is None or connection.c_pointer() != self._connection.connection.c_pointer():
            return
        stale, self._connection = self._connection, None
        _log.warning("the connection to libvirt at %s is lost", self._options.uri)
        self._fanout.send(HypervisorEvent(EventKind.DISCONNECTED))
        self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect(stale))

    async def _reconnect(self, stale: _Shared) -> None:
        with contextlib.suppress(CallTimeoutError, CallsExhaustedError):
            await self._calls.run(stale.give_up, self._options.call_timeout_s)
        backoff_s = 0.1
        while True:
            try:
                connection = await self._connect()
            except PpecError as error:
                _log.info("libvirt is still away: %s", error.message)
            else:
                break
            # Jitter keeps the agents of a fleet from knocking together after a fleet-wide restart.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
            backoff_s = min(backoff_s * 2, self._options.longest_backoff_s)
        self._connection = connection
        _log.warning("connected to libvirt at %s again", self._options.uri)
        self._fanout.send(HypervisorEvent(EventKind.RECONNECTED))

    def lingers(self, vm_id: UUID) -> bool:
        return self._calls.lingers(vm_id)

    async def call(self, what: str, vm_id: UUID | None, work: Callable[[Any], T], timeout_s: float | None = None) -> T:
        """Run `work(connection)` in a thread; `what` names it in errors ("start")."""
        connection, timeout_s = self._connection, timeout_s or self._options.call_timeout_s
        subject = "libvirt" if vm_id is None else f"vm {vm_id}"
        if connection is None:
            raise _unavailable(f"{what} {subject}: no connection to libvirt at {self._options.uri}")
        failed = "vm.start_failed" if what == "start" else "hypervisor.failed"

        def worded(connection: Any) -> T:
            try:
                return work(connection)
            except libvirt.libvirtError as error:
                raise _translated(error, what, subject, connection, failed) from error

        try:
            return await self._calls.run(partial(connection.use, worded), timeout_s, about=vm_id)
        except _ClosedError as error:
            raise _unavailable(f"{what} {subject}: the connection to libvirt was lost") from error
        except (CallTimeoutError, CallsExhaustedError) as error:
            raise _unavailable(f"{what} {subject}: {error}") from error


_event_loop_lock = threading.Lock()
_event_loop_runs = False


def _run_event_loop() -> None:
    """Start libvirt's default event loop, once per process; connections opened before it deliver no events."""
    global _event_loop_runs  # noqa: PLW0603 - libvirt's loop is itself a global of the process
    with _event_loop_lock:
        if _event_loop_runs:
            return
        # Without this libvirt prints every error to stderr beside raising it.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_turn_forever, name="libvirt-events", daemon=True).start()
        _event_loop_runs = True


def _turn_forever() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _release(connection: Any) -> None:
    """Close a connection, dead or alive; its callbacks would otherwise keep it."""
    for step in (connection.unregisterCloseCallback, connection.close):
        with contextlib.suppress(libvirt.libvirtError):
            step()


def _figures(error: Any) -> dict[str, Any]:
    """libvirt's codes and its own words, bounded, for whoever has to find out why."""
    words = "".join(c if c.isprintable() else " " for c in error.get_error_message() or "")[:500]
    return {"libvirt_code": error.get_error_code(), "libvirt_domain": error.get_error_domain(), "reason": words}


def _translated(error: Any, what: str, subject: str, connection: Any, otherwise: str) -> PpecError:
    """The one seam where libvirt's errors become ours."""
    code = _CODES.get(error.get_error_code(), otherwise)
    with contextlib.suppress(libvirt.libvirtError):
        if not connection.isAlive():
            code = "hypervisor.unavailable"
    figures = _figures(error)
    _log.warning("libvirt refused to %s %s: %s", what, subject, figures)
    message = f"libvirt could not {what} {subject}"
    hint = "The reason is libvirt's own; its log on the host has more." if code == otherwise else ""
    return PpecError(code, message, hint=hint, subject=subject, details=figures)


def _unavailable(message: str, details: dict[str, Any] | None = None) -> PpecError:
    hint = "The agent connects again by itself; see that libvirtd runs on the host."
    return PpecError("hypervisor.unavailable", message, hint=hint, subject="libvirt", details=details)
