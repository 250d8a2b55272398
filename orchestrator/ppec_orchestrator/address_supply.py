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
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import Acquired, AddressSource, Outcome, PrefixGoneError, SourcePrefix
from ppec_orchestrator.ipdb.ranges import Address, from_hex
from ppec_orchestrator.store import external_addresses as store
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database

_log = structlog.get_logger(__name__)
# A source that is away may take its time limit for each question, and somebody waits for the answer.
_MOST_SILENT = 2
# Somebody else has the address over there.
_TAKEN = "address.in_use"


@dataclass(frozen=True, eq=False, slots=True)
class _UnderWay:
    """A request that may still be given addresses: how many at most, and which by number."""

    count: int
    fixed: Collection[Address]


class AddressSupply:
    """`standing` free addresses of each prefix are kept ready, up to twice as many are not given back; nor are as many
    more as requests under way may want, and what was not too much at the look before, for another process may just have
    acquired it for a request of its own."""

    def __init__(self, database: Database, source: AddressSource, *, standing: int, now: Clock) -> None:
        self._database = database
        self._source = source
        self._standing = standing
        self._now = now
        # One prefix is settled at a time in this process; of several processes each finds done what another did.
        self._settling = threading.Lock()
        self._under_way: set[_UnderWay] = set()
        # By prefix: how many were too many at the latest look, and stayed.
        self._surplus: dict[int, int] = {}

    def check(self, prefix: SourcePrefix, gateway: Address | None, beside: Sequence[SourcePrefix] = ()) -> None:
        """Whether it may be registered, with those of `beside`; the source knows nothing of our VRFs, so those of all
        count."""
        self._source.check(prefix, gateway, [one for one in (*self._all(), *beside) if one.overlaps(prefix)])

    @contextmanager
    def under_way(self, wanted: Mapping[NetworkWanted, int]) -> Iterator[None]:
        one = _UnderWay(sum(wanted.values()), [each.address for each in wanted if each.address is not None])
        self._under_way.add(one)
        try:
            yield
        finally:
            self._under_way.discard(one)

    def prepare(self, networks: Sequence[NetworkWanted], vrf: str | None) -> None:
        for one in networks:
            if one.address is not None:
                self._prepare_fixed(one, one.address, vrf)

    def _prepare_fixed(self, wanted: NetworkWanted, address: Address, vrf: str | None) -> None:
        """Acquires it in the first prefix of those that are to be asked which gives it, if none has it ready. Refused
        only if no prefix could give it."""
        with self._database.read() as conn:
            chances = store.chances(conn, wanted, vrf, self._now())
        refused: list[PpecError] = []
        for chance in chances:
            if chance.source is None:
                # It is here already. If it is held back, the grant tells whether for this VM.
                return
            try:
                self._adopt(chance.source, [self._source.acquire_fixed(chance.source, address)])
                return
            except PpecError as error:
                refused.append(error)
                if _too_silent(refused):
                    break
        if refused:
            # Where one did not answer, nobody knows yet; one that is gone is no reason.
            raise max(refused, key=lambda error: (error.retryable, error.code == _TAKEN))

    def supply(self, wanted: Mapping[NetworkWanted, int], vrf: str | None, *, scarce: Collection[str] = ()) -> bool:
        with self._database.read() as conn:
            known = store.source_prefixes(conn, vrf)
        of_prefixes: Counter[SourcePrefix] = Counter()
        better = False
        # Those first that are asked for by number: they are here, and nobody else's.
        for one, count in sorted(wanted.items(), key=lambda each: each[0].address is None):
            for prefixes in _by_family(known, one):
                of_prefixes.update(dict.fromkeys(prefixes, count))
                if one.address is None:
                    better |= self._top_up_some(prefixes, of_prefixes, scarce)
        return better

    def _top_up_some(
        self, prefixes: Sequence[SourcePrefix], wanted: Mapping[SourcePrefix, int], scarce: Collection[str]
    ) -> bool:
        """Up to what is wanted of each, the scarce ones first, but in all no more than the one lacks that lacks most:
        which of them serves where the VMs can be is not known here. False if nothing came in, and those that were
        scarce are so still."""
        by_need = sorted(prefixes, key=lambda each: str(each.network) not in scarce)
        lacking = {prefix: self._lacking(prefix, wanted[prefix]) for prefix in by_need}
        enough = any(
            missing <= 0 and (not scarce or str(prefix.network) in scarce) for prefix, missing in lacking.items()
        )
        most = max(lacking.values(), default=0)
        more = 0
        faults: list[PpecError] = []
        for prefix, missing in lacking.items():
            if missing <= 0 or more >= most or _too_silent(faults):
                continue
            try:
                more += self._acquire(prefix, min(missing, most - more))
            except PpecError as error:
                _log.warning("addresses.not_supplied", prefix=str(prefix.network), code=error.code, why=error.message)
                faults.append(error)
        return enough or more > 0

    def _lacking(self, prefix: SourcePrefix, wanted: int) -> int:
        with self._database.read() as conn:
            return wanted - store.count_free(conn, prefix.prefix_id, self._now())

    def _acquire(self, prefix: SourcePrefix, count: int) -> int:
        return self._adopt(prefix, self._source.acquire(prefix, count)) if count > 0 else 0

    def _adopt(self, prefix: SourcePrefix, acquired: Sequence[Acquired]) -> int:
        """How many of them are ours to give now, whoever made their rows."""
        if not acquired:
            return 0
        with self._database.write() as conn:
            adopted = store.adopt(conn, prefix, acquired)
        if adopted.elsewhere:
            # Two prefixes overlap over there. Whose row it is has it, and it is not given back.
            texts = [str(one.address) for one in adopted.elsewhere]
            _log.error("addresses.of_another_prefix", prefix=str(prefix.network), addresses=texts)
        useless = [*adopted.useless, *self._renumber(adopted.renumbered)]
        if useless:
            _log.warning("addresses.useless", prefix=str(prefix.network), addresses=[str(o.address) for o in useless])
            outcome = self._source.give_back([one.source_id for one in useless])
            self._log_refused("addresses.not_given_back", prefix, outcome)
        return adopted.count + adopted.known

    def _renumber(self, changed: Sequence[store.Renumbered]) -> list[Acquired]:
        """The rows whose number is gone over there get the new one: another process has just entered the address
        again. What is left has a second entry, which is of no use."""
        if not changed:
            return []
        still = self._source.still_ours([one.before for one in changed])
        with self._database.write() as conn:
            return [
                one.acquired
                for one in changed
                if one.before in still or not store.renumber(conn, one.row_id, one.before, one.acquired.source_id)
            ]

    def retire(self, prefix_id: int, *, force: bool) -> None:
        """Gives back all there is, before a prefix is deleted. Raises `resource.in_use` while a VM has an address, and
        without `force` while one rests."""
        for prefix in self._all():
            if prefix.prefix_id == prefix_id:
                with self._settling:
                    self._retire(prefix, force=force)

    def _retire(self, prefix: SourcePrefix, *, force: bool) -> None:
        try:
            self._reconcile(prefix)
        except PrefixGoneError:
            # What we have rows of is given back by its number all the same.
            _log.warning("addresses.prefix_gone", prefix=str(prefix.network), source_id=prefix.source_id)
        with self._database.write() as conn:
            store.close_all(conn, prefix.prefix_id, self._now(), force=force)
        self._give_back(prefix)

    def settle(self, stopping: threading.Event | None = None) -> list[PpecError]:
        """Once over all prefixes: what is ours there has a row here, enough stands ready, the rest goes back.

        What is wrong with one is no reason to leave out the others; the faults are logged, and the first one of each
        prefix is returned."""
        faults: list[PpecError] = []
        for prefix in self._all():
            if stopping is not None and stopping.is_set():
                break
            faults += self._settle(prefix)[:1]
        return faults

    def _settle(self, prefix: SourcePrefix) -> list[PpecError]:
        """Each part by itself: what NetBox does not let go of keeps nobody from being told, or supplied."""
        parts: Sequence[Callable[[SourcePrefix], object]] = (
            self._reconcile, self._top_up, self._tell, self._give_back_surplus,
        )  # fmt: skip
        faults: list[PpecError] = []
        with self._settling:
            for part in parts:
                if _too_silent(faults):
                    break
                try:
                    part(prefix)
                except PpecError as error:
                    _log.warning(
                        "addresses.not_settled", prefix=str(prefix.network), code=error.code, why=error.message
                    )
                    faults.append(error)
                except Exception as error:
                    _log.error("addresses.settling_failed", prefix=str(prefix.network), exc_info=error)
        return faults

    def _top_up(self, prefix: SourcePrefix) -> None:
        self._acquire(prefix, self._lacking(prefix, self._standing))

    def _give_back_surplus(self, prefix: SourcePrefix) -> None:
        left = self._lasting_surplus(prefix)
        while left > 0:
            under_way = self._under_way.copy()
            spared = [address for one in under_way for address in one.fixed]
            with self._database.write() as conn:
                keep = self._kept(under_way)
                marked = store.begin_return(conn, prefix.prefix_id, keep, self._now(), most=left, spared=spared)
            if not marked:
                break
            left -= marked
        self._give_back(prefix)

    def _lasting_surplus(self, prefix: SourcePrefix) -> int:
        """How many may go: not those that were none too many at the look before. The first look knows of none."""
        surplus = max(0, -self._lacking(prefix, self._kept(self._under_way.copy())))
        lasting = min(surplus, self._surplus.get(prefix.prefix_id, surplus))
        self._surplus[prefix.prefix_id] = surplus - lasting
        return lasting

    def _kept(self, under_way: Collection[_UnderWay]) -> int:
        """Of each prefix: which of them gives a request its addresses is not known here."""
        return 2 * self._standing + sum(one.count for one in under_way)

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
        missing = [row for row in rows if row.source_id not in there and not row.going_back]
        faults: list[tuple[store.SourceRow, PpecError]] = []
        for row in missing:
            if (fault := self._restore(prefix, row)) is not None:
                faults.append((row, fault))
            if _too_silent([fault for _, fault in faults]):
                break
        with self._database.read() as conn:
            known = {row.source_id for row in store.rows_of(conn, prefix.prefix_id)}
        if faults or there - known:
            again = self._source.owned(prefix)
            # What another process has entered again meanwhile is not taken.
            ours = {one.address for one in again}
            self._close_taken(
                prefix, [row for row, fault in faults if fault.code == _TAKEN and _address(prefix, row) not in ours]
            )
            self._adopt(prefix, [one for one in again if one.source_id in there - known])
        for _, fault in faults:
            if fault.code != _TAKEN:
                raise fault

    def _restore(self, prefix: SourcePrefix, row: store.SourceRow) -> PpecError | None:
        """Somebody deleted over there what is ours, or has taken it over. A free one is let go; one that a VM has, or
        that rests, is entered again. Returns why it wasn't."""
        with self._database.write() as conn:
            if not row.used and store.forget_free(conn, row.row_id, self._now()):
                return None
        address = _address(prefix, row)
        try:
            acquired = self._source.acquire_fixed(prefix, address)
        except PpecError as error:
            if error.code != _TAKEN:
                _log.warning("addresses.not_restored", address=str(address), code=error.code, why=error.message)
            return error
        with self._database.write() as conn:
            store.renumber(conn, row.row_id, row.source_id, acquired.source_id)
        return None

    def _close_taken(self, prefix: SourcePrefix, rows: Sequence[store.SourceRow]) -> None:
        """Others have them over there. Of those that no VM has nobody is given any; of the others two have one."""
        for row in rows:
            with self._database.write() as conn:
                closed = store.close_lost(conn, row.row_id)
            told = {"address": str(_address(prefix, row)), "prefix": str(prefix.network)}
            if closed:
                _log.warning("addresses.lost", **told)
            else:
                _log.error("addresses.taken_by_others", **told)

    def _give_back(self, prefix: SourcePrefix) -> None:
        """What is closed already. Raises the first of the faults of what the source did not let go."""
        after = 0
        faults: list[PpecError] = []
        while True:
            with self._database.read() as conn:
                going = store.returning(conn, prefix.prefix_id, after, self._now())
            if not going:
                break
            after = max(going)
            outcome = self._source.give_back(list(going.values()))
            with self._database.write() as conn:
                store.returned(conn, [row for row, number in going.items() if number not in outcome.refused])
            self._log_refused("addresses.not_given_back", prefix, outcome)
            faults += outcome.refused.values()
            if len(outcome.refused) == len(going):
                # Then it is no single one that is stubborn, and not each is asked for.
                break
        if faults:
            raise faults[0]

    def _tell(self, prefix: SourcePrefix) -> None:
        """What is not ours any more is left alone; the next look at the rows finds it."""
        after = 0
        faults: list[PpecError] = []
        while True:
            with self._database.read() as conn:
                untold = store.untold(conn, prefix.prefix_id, after)
            if not untold:
                break
            after = untold[-1].row_id
            outcome = self._source.tell([(one.source_id, one.vm) for one in untold])
            left = outcome.not_ours | outcome.refused.keys()
            with self._database.write() as conn:
                store.told(conn, [one for one in untold if one.source_id not in left])
            self._log_refused("addresses.not_told", prefix, outcome)
            faults += outcome.refused.values()
            if len(outcome.refused) == len(untold):
                break
        if faults:
            raise faults[0]

    @staticmethod
    def _log_refused(event: str, prefix: SourcePrefix, outcome: Outcome) -> None:
        if outcome.refused:
            why = next(iter(outcome.refused.values())).message
            _log.warning(event, prefix=str(prefix.network), source_ids=sorted(outcome.refused), why=why)

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


def _by_family(known: Sequence[SourcePrefix], wanted: NetworkWanted) -> list[list[SourcePrefix]]:
    """The prefixes that could give an address that is wanted. Without a prefix named one of each family is."""
    mine = [
        one
        for one in known
        if wanted.prefix in (None, one.network) and (wanted.address is None or wanted.address in one.network)
    ]
    return [[one for one in mine if one.network.version == family] for family in (4, 6)]


def _address(prefix: SourcePrefix, row: store.SourceRow) -> Address:
    return from_hex(row.address_hex, prefix.network.version)


def _too_silent(faults: Sequence[PpecError]) -> bool:
    """Whether it is away, rather than that it stumbles over one prefix."""
    return sum(fault.retryable for fault in faults) >= _MOST_SILENT
