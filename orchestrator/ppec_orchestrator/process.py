# SPDX-License-Identifier: Apache-2.0
"""The orchestrator as a process: opens what it works with, starts its threads, listens, and takes it all down again.

Order: state folder, database and migrations, CA and certificate, first token, engine (which adopts what runs), and
only then the listener.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import structlog
import uvicorn

from ppec_contract.errors import PpecError
from ppec_contract.peer_protocol import PeerCertificateProtocol
from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.consoles import MAX_TYPED_BYTES
from ppec_orchestrator.api.services import Services, make_services
from ppec_orchestrator.approvals import ApprovalPolicy
from ppec_orchestrator.audit import audit
from ppec_orchestrator.dispatch.dispatcher import AnsibleDispatcher, RunCredentials
from ppec_orchestrator.ipdb.provider import BuiltIn
from ppec_orchestrator.operations.context import Ports
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.operations.replica import Replica
from ppec_orchestrator.operations.service import Operations
from ppec_orchestrator.pki.keys import write_private
from ppec_orchestrator.roles import Role
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.state import opened_database
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.tokens import count_tokens, create_token

_log = structlog.get_logger(__name__)
_GRACE_S = 5


def serve(settings: Settings) -> None:
    """Runs until SIGTERM or SIGINT. Call it in the main thread."""
    stopping = _stop_signals()
    with ExitStack() as stack:
        database = stack.enter_context(opened_database(settings))
        services = make_services(settings, database)
        ensure_admin_token(settings, database)
        services = stack.enter_context(_operating(services))
        stack.enter_context(_flushing(services))
        if services.supply is not None:
            stack.enter_context(_supplying(services.supply, settings.netbox_interval_s))
        sockets = [stack.enter_context(_bound(address, settings.port)) for address in settings.listen]
        server = _Server(_config(services), stopping)
        server.run(sockets)
        if not server.started:
            raise PpecError("internal.error", "the listener did not start; the log says why", subject="listener")


def ensure_admin_token(settings: Settings, database: Database) -> None:
    """At the very first start: an admin's token, in a file only its owner reads."""
    with database.write() as conn:
        if count_tokens(conn):
            return
        token = create_token(conn, "admin", Role.ADMIN, now=utc_now())
        # Before the commit: a token nobody has been told of would lock everybody out.
        write_private(settings.admin_token_path, f"{token}\n".encode("ascii"))
    audit("orchestrator", "create_token", f"admin {Role.ADMIN}", "done")
    _log.info("orchestrator.admin_token_written", path=str(settings.admin_token_path))


def _stop_signals() -> threading.Event:
    """Set by SIGTERM and SIGINT outside the server's loop.

    uvicorn raises the signal it stopped on once more when it is done; by default that would end the process before
    its threads are.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


@contextmanager
def _operating(services: Services) -> Iterator[Services]:
    """With the operations engine started: it adopts what runs before anything new is accepted."""
    settings, pair = services.settings, services.ca.orchestrator_pair
    credentials = RunCredentials(pair.ca_path, pair.certificate_path, pair.key_path)
    with ExitStack() as stack:
        # Before anything is written beside it: another orchestrator may be at work in this directory.
        replica = stack.enter_context(closing(Replica(settings.state_dir)))
        dispatcher = AnsibleDispatcher(
            settings.state_dir,
            credentials,
            fork_server=settings.fork_server,
            most_standing=settings.most_standing_runs,
        )
        ports = Ports(
            database=services.database,
            dispatcher=dispatcher,
            planning=Planning(services.database, silent_after_s=settings.silent_after_s, now=services.now),
            image_url=settings.image_url,
            now=services.now,
            addresses=services.supply or BuiltIn(),
            approvals=ApprovalPolicy(settings.approvals_vms_from),
        )
        operations = Operations(ports)
        dispatcher.open()
        stack.callback(dispatcher.close)
        operations.start(replica)
        stack.callback(operations.stop)
        stack.enter_context(_knowing_the_fleet(ports.planning))
        yield dataclasses.replace(services, operations=operations)


@contextmanager
def _knowing_the_fleet(planning: Planning) -> Iterator[None]:
    """Reads the fleet beside the start: of ten thousand hosts that takes seconds, which the first request would
    wait."""
    thread = threading.Thread(target=_read_fleet, args=(planning,), name="ppec-fleet")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _read_fleet(planning: Planning) -> None:
    try:
        fleet = planning.fleet.current()
    except PpecError as error:
        # The first plan reads it, or says so.
        _log.warning("fleet.not_read", code=error.code, error=error.message)
        return
    # It stays: the garbage collector need not look through it again and again.
    gc.freeze()
    _log.info("fleet.read", hosts=len(fleet.hosts), vms=sum(len(host.vms) for host in fleet.hosts))


@contextmanager
def _flushing(services: Services) -> Iterator[None]:
    stop = threading.Event()
    interval_s = services.settings.liveness_flush_s
    thread = threading.Thread(target=services.liveness.run, args=(stop, interval_s), name="ppec-liveness")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _supplying(supply: AddressSupply, every_s: float) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=supply.run, args=(stop, every_s), name="ppec-addresses")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _bound(address: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind((address, port))
        except OSError as error:
            raise PpecError(
                "request.invalid",
                f"can't listen on {address} port {port}: {error.strerror}",
                hint="Change listen or port in the settings, or stop what uses the port.",
                subject="listener",
            ) from error
        yield sock


def _config(services: Services) -> uvicorn.Config:
    pair = services.ca.orchestrator_pair
    return uvicorn.Config(
        create_app(services),
        http=PeerCertificateProtocol,
        ws="websockets-sansio",
        # What is typed: a message may be a paste, and nothing else. Compressing would mix secrets with what is known.
        ws_max_size=MAX_TYPED_BYTES,
        ws_per_message_deflate=False,
        lifespan="off",
        # Hosts show a certificate, people a token: the endpoint decides which it needs.
        ssl_certfile=pair.certificate_path,
        ssl_keyfile=pair.key_path,
        ssl_ca_certs=pair.ca_path,
        ssl_cert_reqs=ssl.CERT_OPTIONAL,
        ssl_context_factory=_modern,
        timeout_graceful_shutdown=_GRACE_S,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
    )


def _modern(config: uvicorn.Config, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    context = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._stopping.is_set():
            self.should_exit = True  # asked to while we were starting
        if self.started:
            places: Sequence[str] = [f"{s.getsockname()[0]}:{s.getsockname()[1]}" for s in sockets or ()]
            _log.info("orchestrator.ready", listen=places)
            notify_systemd("READY=1")


def notify_systemd(state: str) -> None:
    """Tells systemd, when it started us (sd_notify(3)); otherwise nothing."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.sendall(state.encode("ascii"))
        except OSError as error:
            _log.warning("systemd.notify_failed", error=error.strerror)
