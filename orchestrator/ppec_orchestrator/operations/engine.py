# SPDX-License-Identifier: Apache-2.0
"""The engine of one replica: claims operations, runs each in a thread, and keeps their leases.

Replicas share nothing but the database. One that dies stops renewing; when its leases end, any other (or itself,
started again) claims its operations under a higher fence. A process that was only asleep finds itself fenced at its
next check-point.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import structlog

from ppec_contract.errors import PpecError
from ppec_orchestrator.operations.context import Context, Ports, Signals
from ppec_orchestrator.operations.execution import Execution
from ppec_orchestrator.operations.journal import Journal
from ppec_orchestrator.operations.limits import Limits
from ppec_orchestrator.operations.live import Live
from ppec_orchestrator.operations.registry import KINDS
from ppec_orchestrator.operations.replica import Replica
from ppec_orchestrator.operations.retention import Retention
from ppec_orchestrator.operations.steps import HandedOverError
from ppec_orchestrator.store import claims
from ppec_orchestrator.store.claims import Claim, Claimant
from ppec_orchestrator.store.operations import CHANGED, WORK

_log = structlog.get_logger(__name__)
_STOP_S = 15.0
# However long `poll_s` is: a limit that is put right is taken over before long.
_LONGEST_POLL_S = 5.0
# After this part of the time leases are renewed again of which somebody held one: it may be our own long transaction.
_AGAIN = 0.1


@dataclass(frozen=True)
class _Running:
    thread: threading.Thread
    signals: Signals


class Engine:
    """`start` after the migrations, `stop` before the database closes."""

    def __init__(self, ports: Ports, live: Live) -> None:
        self._ports = ports
        self._live = live
        self._replica: Replica | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._threads: list[threading.Thread] = []
        self._limits = Limits()
        self._strange: frozenset[str] = frozenset()
        self._retention = Retention(ports.database, ports.now, self._stopping)

    @property
    def running(self) -> tuple[str, ...]:
        """The operations this replica has under way."""
        with self._lock:
            return tuple(self._running)

    def start(self, replica: Replica) -> None:
        """Claims as this replica from now on, which it closes when it stops."""
        self._replica = replica
        # A process that had this name before is dead, whatever its leases say.
        with self._ports.database.write() as conn:
            found = claims.give_up(conn, owner_prefix=f"{self._replica.name}:", now=self._ports.now())
            self._limits = Limits.read(conn)
        _log.info("engine.started", owner=self._replica.owner, taken_over=found)
        work = ((self._claims, "claims"), (self._renewals, "leases"), (self._retention.run, "retention"))
        for target, name in work:
            thread = threading.Thread(target=target, name=f"ppec-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Lets go of everything: runs under way go on, and are adopted by whoever claims their operations next."""
        self._stopping.set()
        self._ports.database.notify(WORK)
        with self._lock:
            workers = [one.thread for one in self._running.values()]
        for thread in (*self._threads, *workers):
            thread.join(timeout=_STOP_S)
        if self._replica is not None:
            with suppress(PpecError), self._ports.database.write() as conn:
                claims.give_up(conn, owner_prefix=self._replica.owner, now=self._ports.now())
            self._replica.close()

    def cancel_now(self, operation_id: str) -> None:
        """Tells an operation of this replica at once what the database says already."""
        with self._lock:
            running = self._running.get(operation_id)
        if running is not None:
            running.signals.cancel.set()

    # --- threads -----------------------------------------------------------------------------------------------------

    def _claims(self) -> None:
        looked = -math.inf
        while not (self._stopping.is_set() or self._ports.database.closed):
            try:
                # Not before every claim: what it reads changes seldom, and somebody waits for the claim.
                if time.monotonic() - looked >= self._poll_s:
                    self._look()
                    looked = time.monotonic()
                while self._claim_one():
                    pass
            except Exception as error:
                # Whatever it was, an engine that no longer claims is worse.
                _log.error("engine.claim_failed", exc_info=error)
                self._stopping.wait(self._poll_s)
            self._ports.database.wait(WORK, self._poll_s)

    @property
    def _poll_s(self) -> float:
        return min(self._limits.poll_s, _LONGEST_POLL_S)

    def _claim_one(self) -> bool:
        if self._stopping.is_set() or self._replica is None:
            return False
        database, now = self._ports.database, self._ports.now()
        claimant = Claimant(self._replica.owner, KINDS, self.running)
        with database.read() as conn:
            if not claims.claimable(conn, claimant, now=now, max_running=self._limits.max_running):
                return False
        with database.write() as conn:
            claimed = claims.claim(
                conn,
                claimant,
                now=now,
                lease_s=self._limits.lease_s,
                max_running=self._limits.max_running,
            )
            if claimed is not None:
                database.notify(CHANGED, claimed.operation_id, within=conn)
        if claimed is None:
            return False
        self._launch(claimed)
        return True

    def _look(self) -> None:
        """Takes over changed limits, and says once of each kind that only a newer replica's operations can have."""
        with self._ports.database.read() as conn:
            self._limits = Limits.read(conn)
            strange = claims.unknown_kinds(conn, KINDS)
        for kind in sorted(strange - self._strange):
            _log.warning("engine.kind_unknown", kind=kind)
        self._strange |= strange

    def _launch(self, claimed: Claim) -> None:
        signals = Signals(self._stopping)
        context = Context(self._ports, Journal(self._ports.database, claimed), self._live, self._limits, signals)
        name = f"ppec-{claimed.operation_id[:16]}"
        thread = threading.Thread(target=self._work, args=(context,), name=name, daemon=True)
        with self._lock:
            self._running[claimed.operation_id] = _Running(thread, signals)
        thread.start()

    def _work(self, context: Context) -> None:
        log = _log.bind(operation=context.operation_id, kind=context.claimed.kind, fence=context.claimed.fence)
        log.info("operation.claimed", resumed=context.claimed.fence > 1)
        try:
            Execution(KINDS[context.claimed.kind], context).run()
        except HandedOverError:
            log.info("operation.handed_over")
        except PpecError as error:
            # Fenced, or the database is away: the lease ends, and whoever claims it next carries on.
            log.warning("operation.let_go", code=error.code, detail=error.message)
        except Exception as error:
            log.error("operation.worker_failed", exc_info=error)
        finally:
            with self._lock:
                mine = self._running.get(context.operation_id)
                # Not so when the lease ended and this very replica has claimed the operation again since.
                if mine is not None and mine.thread is threading.current_thread():
                    del self._running[context.operation_id]
                    self._live.forget(context.operation_id)
            # A place is free, for one that waited because of the limit.
            with suppress(PpecError):
                self._ports.database.notify(WORK)

    def _renewals(self) -> None:
        whole = True
        while not self._stopping.wait(self._limits.renewal_s * (1 if whole else _AGAIN)):
            try:
                whole = self._renew()
            except Exception as error:
                _log.error("engine.renewal_failed", exc_info=error)

    def _renew(self) -> bool:
        """False: somebody holds the rows of some, which are to be tried again soon."""
        with self._lock:
            mine = dict(self._running)
        if not mine or self._replica is None:
            return True
        until = self._ports.now() + timedelta(seconds=self._limits.lease_s)
        with self._ports.database.write() as conn:
            held = claims.renew(conn, mine, owner=self._replica.owner, until=until)
        for operation_id, lease in held.items():
            if lease.cancel:
                mine[operation_id].signals.cancel.set()
        return all(lease.renewed for lease in held.values())
