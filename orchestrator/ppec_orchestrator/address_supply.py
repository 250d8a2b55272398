# SPDX-License-Identifier: Apache-2.0
"""Keeps prefixes supplied whose addresses come from outside: an `AddressProvider` over an `AddressSource`.

In this order, so that nothing is lost or given twice whoever dies when:

    acquire     the source marks it as ours, then it gets a row      died between: it bears our mark and is adopted
    grant       row and VM in one transaction, as everywhere         the source is told afterwards, again until it knows
    give back   the row is closed, the source frees it, then the     died between: closed rows are given back again
                row goes

No transaction is open while the source is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime

import structlog

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import Acquired, AddressSource, PrefixGoneError, SourcePrefix
from ppec_orchestrator.ipdb.ranges import Address, from_hex
from ppec_orchestrator.store import external_addresses as store
from ppec_orchestrator.store.database import Database

_log = structlog.get_logger(__name__)


class AddressSupply:
    """`standing` free addresses of each prefix are kept ready, up to twice as many are not given back."""

    def __init__(
        self, database: Database, source: AddressSource, *, standing: int, now: Callable[[], datetime]
    ) -> None:
        self._database = database
        self._source = source
        self._standing = standing
        self._now = now
        # One prefix is settled at a time in this process; of several processes each finds done what another did.
        self._settling = threading.Lock()

    def check(self, prefix: SourcePrefix, gateway: Address | None) -> None:
        self._source.check(prefix, gateway)

    def prepare(self, networks: Sequence[NetworkWanted], vrf: str | None) -> None:
        for one in networks:
            if one.address is not None:
                for prefix in self._prefixes(one, vrf):
                    self._prepare_fixed(prefix, one.address)

    def _prepare_fixed(self, prefix: SourcePrefix, address: Address) -> None:
        with self._database.read() as conn:
            known = store.is_known(conn, prefix, address)
        if not known:
            self._adopt(prefix, [self._source.acquire_fixed(prefix, address)])

    def supply(self, networks: Sequence[NetworkWanted], vrf: str | None, count: int) -> bool:
        wanted: dict[SourcePrefix, int] = {}
        for one in networks:
            if one.address is None:
                for prefix in self._prefixes(one, vrf):
                    wanted[prefix] = wanted.get(prefix, 0) + count
        return sum(self._supplied(prefix, needed) for prefix, needed in wanted.items()) > 0

    def _supplied(self, prefix: SourcePrefix, wanted: int) -> int:
        """How many more there are now: none of a prefix that the source gives none of, for whatever reason."""
        try:
            return self._top_up(prefix, wanted)
        except PpecError as error:
            _log.warning("addresses.not_supplied", prefix=str(prefix.network), code=error.code, why=error.message)
            return 0

    def _prefixes(self, wanted: NetworkWanted, vrf: str | None) -> list[SourcePrefix]:
        with self._database.read() as conn:
            found = store.source_prefixes(conn, vrf)
        return [
            one
            for one in found
            if wanted.prefix in (None, one.network) and (wanted.address is None or wanted.address in one.network)
        ]

    def _top_up(self, prefix: SourcePrefix, wanted: int) -> int:
        with self._database.read() as conn:
            free = store.count_free(conn, prefix.prefix_id, self._now())
        return self._adopt(prefix, self._source.acquire(prefix, wanted - free)) if free < wanted else 0

    def _adopt(self, prefix: SourcePrefix, acquired: Sequence[Acquired]) -> int:
        if not acquired:
            return 0
        with self._database.write() as conn:
            count, useless = store.adopt(conn, prefix, acquired)
        if useless:
            _log.warning("addresses.useless", prefix=str(prefix.network), addresses=[str(o.address) for o in useless])
            self._source.give_back([one.source_id for one in useless])
        return count

    def retire(self, prefix_id: int) -> None:
        """Gives back all there is, before a prefix is deleted. Raises `resource.in_use` while a VM has an address."""
        for prefix in self._all():
            if prefix.prefix_id == prefix_id:
                with self._settling:
                    self._retire(prefix)

    def _retire(self, prefix: SourcePrefix) -> None:
        try:
            self._reconcile(prefix)
        except PrefixGoneError:
            # What we have rows of is given back by its number all the same.
            _log.warning("addresses.prefix_gone", prefix=str(prefix.network), source_id=prefix.source_id)
        with self._database.write() as conn:
            store.close_all(conn, prefix.prefix_id)
        self._give_back(prefix)

    def settle(self, stopping: threading.Event | None = None) -> list[PpecError]:
        """Once over all prefixes: what is ours there has a row here, enough stands ready, the rest goes back.

        What is wrong with one is no reason to leave out the others; the faults are logged and returned."""
        faults: list[PpecError] = []
        for prefix in self._all():
            if stopping is not None and stopping.is_set():
                break
            try:
                self._settle(prefix)
            except PpecError as error:
                _log.warning("addresses.not_settled", prefix=str(prefix.network), code=error.code, why=error.message)
                faults.append(error)
            except Exception as error:
                _log.error("addresses.settling_failed", prefix=str(prefix.network), exc_info=error)
        return faults

    def _settle(self, prefix: SourcePrefix) -> None:
        with self._settling:
            self._reconcile(prefix)
            self._give_back(prefix, keep=2 * self._standing)
            self._top_up(prefix, self._standing)
            self._tell(prefix)

    def _all(self) -> list[SourcePrefix]:
        with self._database.read() as conn:
            return store.source_prefixes(conn)

    def _reconcile(self, prefix: SourcePrefix) -> None:
        """Rows are read before the source is asked, because what has a row was entered there before; and what has none
        is adopted only if it is still there afterwards, because what is given back keeps its row until it is gone."""
        with self._database.read() as conn:
            rows = store.rows_of(conn, prefix.prefix_id)
        owned = self._source.owned(prefix)
        there = {one.source_id for one in owned}
        for row in rows:
            if row.source_id not in there and not row.going_back:
                self._restore(prefix, row.row_id, from_hex(row.address_hex, prefix.network.version), used=row.used)
        with self._database.read() as conn:
            known = {row.source_id for row in store.rows_of(conn, prefix.prefix_id)}
        if there - known:
            self._adopt(prefix, [one for one in self._source.owned(prefix) if one.source_id in there - known])

    def _restore(self, prefix: SourcePrefix, row_id: int, address: Address, *, used: bool) -> None:
        """Somebody deleted over there what is ours. A free one is let go; one that a VM has, or that rests, is entered
        again."""
        with self._database.write() as conn:
            if not used and store.forget_free(conn, row_id, self._now()):
                return
        try:
            acquired = self._source.acquire_fixed(prefix, address)
        except PpecError as error:
            _log.error("addresses.taken_by_others", address=str(address), prefix=str(prefix.network), why=error.message)
            return
        with self._database.write() as conn:
            store.renumber(conn, row_id, acquired.source_id)

    def _give_back(self, prefix: SourcePrefix, *, keep: int | None = None) -> None:
        """What is closed already, and what is free beyond `keep`."""
        while True:
            with self._database.write() as conn:
                if keep is not None:
                    store.begin_return(conn, prefix.prefix_id, keep, self._now())
                going = store.returning(conn, prefix.prefix_id)
            if not going:
                return
            self._source.give_back(list(going.values()))
            with self._database.write() as conn:
                store.returned(conn, going)

    def _tell(self, prefix: SourcePrefix) -> None:
        while True:
            with self._database.read() as conn:
                untold = store.untold(conn, prefix.prefix_id)
            if not untold:
                return
            self._source.tell([(one.source_id, one.vm) for one in untold])
            with self._database.write() as conn:
                store.told(conn, untold)

    def run(self, stopping: threading.Event, every_s: float) -> None:
        while not stopping.is_set():
            try:
                self.settle(stopping)
            except PpecError as error:
                _log.warning("addresses.not_settled", code=error.code, why=error.message)
            except Exception as error:
                # The next one tries again; the thread must not end.
                _log.error("addresses.settling_failed", exc_info=error)
            stopping.wait(every_s)
