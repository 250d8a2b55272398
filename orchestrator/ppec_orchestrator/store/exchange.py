# SPDX-License-Identifier: Apache-2.0
"""Import and export: the whole of what is decided of addresses. What belongs to VMs stays with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, select

from ppec_contract.api_ipdb import (
    MAX_IMPORT_ADDRESSES,
    MAX_IMPORT_ROWS,
    ExchangedPrefix,
    HoldCreate,
    HoldKind,
    ImportCounts,
    IpdbDocument,
    IpdbImported,
    PrefixCreate,
    VrfCreate,
)
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.exchange import Fault, PlacedHold, told
from ppec_orchestrator.ipdb.exchange import Row as ImportRow
from ppec_orchestrator.ipdb.ranges import Network, from_hex, usable_range
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.holds import create_hold, held_edges
from ppec_orchestrator.store.prefixes import Places, as_created, insert_prefix, select_prefixes
from ppec_orchestrator.store.serving import range_of
from ppec_orchestrator.store.tables import address_hold, prefix, vrf
from ppec_orchestrator.store.vrfs import VRFS

_MOST_IN_WORDS = 3
_ORDER: Final = {VrfCreate: "vrfs", PrefixCreate: "prefixes", PlacedHold: "holds"}


def export_document(conn: Connection, vrf_name: str | None = None) -> IpdbDocument:
    """Everything, or what one VRF has. Raises `vrf.not_found`."""
    vrfs = select(vrf).order_by(vrf.c.name)
    prefixes = select_prefixes().order_by(vrf.c.name, prefix.c.family, prefix.c.id)
    if vrf_name is not None:
        vrfs, prefixes = vrfs.where(vrf.c.name == vrf_name), prefixes.where(vrf.c.name == vrf_name)
    found = conn.execute(vrfs).all()
    if vrf_name is not None and not found:
        raise not_found("vrf", "VRF", vrf_name)
    holds: dict[int, list[Row[Any]]] = defaultdict(list)
    for row in conn.execute(select(address_hold).order_by(address_hold.c.first_hex)):
        holds[row.prefix_id].append(row)
    return IpdbDocument(
        vrfs=tuple(VrfCreate(name=row.name, description=row.description) for row in found),
        prefixes=tuple(
            ExchangedPrefix(**as_created(row), holds=tuple(_hold(hold, row.family) for hold in holds[row.id]))
            for row in conn.execute(prefixes)
        ),
    )


def _hold(row: Row[Any], family: int) -> HoldCreate:
    return HoldCreate(
        kind=HoldKind(row.kind),
        first=from_hex(row.first_hex, family),
        last=from_hex(row.last_hex, family),
        reserved_for=row.reserved_for,
        note=row.note,
    )


@dataclass(frozen=True)
class Importer:
    """Imports rows in the caller's transaction, in the name of `caller`."""

    conn: Connection
    caller: str
    now: Clock

    @cached_property
    def _places(self) -> Places:
        return Places(self.conn)

    def carry_out(self, rows: Sequence[ImportRow], faults: Sequence[Fault], *, dry_run: bool) -> IpdbImported:
        """All of it, or `import.invalid` with every row that can't be; `faults` are those found before. After an error
        the transaction must be rolled back. A dry run leaves nothing."""
        check_size(self.conn, rows, faults)
        whole = self.conn.begin_nested()
        found = list(faults)
        known = {fault.place for fault in faults}
        created: Counter[str] = Counter()
        unchanged: Counter[str] = Counter()
        # VRFs, then their prefixes, then what is held back of these, in whatever order they were written down.
        for row in sorted(rows, key=lambda row: list(_ORDER).index(type(row.item))):
            try:
                made = self._attempted(row.item)
            except PpecError as error:
                if row.place not in known:
                    found.append(Fault(row.place, error.message))
                continue
            (created if made else unchanged)[_ORDER[type(row.item)]] += 1
        if found:
            raise _invalid(found, _count(rows, faults))
        if dry_run:
            whole.rollback()
        else:
            whole.commit()
        return IpdbImported(dry_run=dry_run, created=ImportCounts(**created), unchanged=ImportCounts(**unchanged))

    def _attempted(self, item: VrfCreate | PrefixCreate | PlacedHold) -> bool:
        """A row that is refused leaves nothing; a prefix is refused before it is begun."""
        if isinstance(item, PrefixCreate):
            return self._row(item)
        with self.conn.begin_nested():
            return self._row(item)

    def _row(self, item: VrfCreate | PrefixCreate | PlacedHold) -> bool:
        """False: it is there already, just so."""
        if isinstance(item, VrfCreate):
            return self._vrf(item)
        if isinstance(item, PrefixCreate):
            return self._prefix(item)
        return self._placed_hold(item)

    def _vrf(self, wanted: VrfCreate) -> bool:
        there = self.conn.execute(select(vrf).where(vrf.c.name == wanted.name)).one_or_none()
        if there is None:
            VRFS.create(self.conn, wanted)
            return True
        _require_same(f"VRF {wanted.name}", {"description": there.description}, {"description": wanted.description})
        return False

    def _prefix(self, wanted: PrefixCreate) -> bool:
        there = self._find(wanted.vrf, wanted.cidr)
        if there is None:
            insert_prefix(self.conn, wanted, self._places)
            return True
        usable = usable_range(wanted.cidr, gateway=wanted.gateway, first=wanted.first, last=wanted.last)
        whole = dict(wanted) | {"first": usable.first, "last": usable.last}
        _require_same(f"prefix {wanted.cidr}", as_created(there), whole)
        return False

    def _placed_hold(self, wanted: PlacedHold) -> bool:
        there = self._find(wanted.vrf, wanted.cidr)
        if there is None:
            raise PpecError("prefix.not_found", f"there is no prefix {wanted.cidr} in VRF {wanted.vrf}")
        hold = wanted.hold
        first, last = held_edges(range_of(there), hold)
        same = self.conn.execute(_SAME_HOLD, {"which": there.id, "first": first, "last": last}).one_or_none()
        if same is None:
            create_hold(self.conn, there.id, hold, self.caller, self.now)
            return True
        found = {"kind": same.kind, "reserved_for": same.reserved_for, "note": same.note}
        _require_same(f"hold of {hold.first}", found, {name: getattr(hold, name) for name in found})
        return False

    def _find(self, vrf_name: str, cidr: Network) -> Row[Any] | None:
        return self.conn.execute(_FOUND, {"vrf_name": vrf_name, "network": str(cidr)}).one_or_none()


# Made once: a row's statements take longer to be put together than to be carried out.
_FOUND = select_prefixes().where(vrf.c.name == bindparam("vrf_name"), prefix.c.cidr == bindparam("network"))

_SAME_HOLD = select(address_hold).where(
    address_hold.c.prefix_id == bindparam("which"),
    address_hold.c.first_hex == bindparam("first"),
    address_hold.c.last_hex == bindparam("last"),
)


def _require_same(what: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [name for name in there if there[name] != wanted[name]]
    if differing:
        shown = ", ".join(f"{name} wanted {wanted[name]}, found {there[name]}" for name in differing)
        raise PpecError("resource.in_use", f"{what} exists and differs: {shown}")


def new_prefixes(conn: Connection, rows: Sequence[ImportRow]) -> list[tuple[str, PrefixCreate]]:
    """Those that are not there yet, each once, with their places."""
    wanted = [(row.place, row.item) for row in rows if isinstance(row.item, PrefixCreate)]
    names = {item.vrf for _, item in wanted}
    there = conn.execute(select(vrf.c.name, prefix.c.cidr).join(prefix).where(vrf.c.name.in_(names))).all()
    known = {(name, cidr) for name, cidr in there}
    found: dict[tuple[str, Network], tuple[str, PrefixCreate]] = {}
    for place, item in wanted:
        if (item.vrf, str(item.cidr)) not in known:
            found.setdefault((item.vrf, item.cidr), (place, item))
    return list(found.values())


def check_size(conn: Connection, rows: Sequence[ImportRow], faults: Sequence[Fault]) -> None:
    """Raises `import.invalid` if it is more than one transaction should make: others wait for it."""
    check_rows(rows, faults)
    total = sum(_made(item) for _, item in new_prefixes(conn, rows))
    if total > MAX_IMPORT_ADDRESSES:
        raise _too_much(f"its new IPv4 prefixes have {total} addresses, more than {MAX_IMPORT_ADDRESSES}", faults)


def check_rows(rows: Sequence[ImportRow], faults: Sequence[Fault]) -> None:
    """Raises `import.invalid` if there are more than are read of a table."""
    if _count(rows, faults) > MAX_IMPORT_ROWS:
        raise _too_much(f"it has more than {MAX_IMPORT_ROWS} rows", faults)


def _made(wanted: PrefixCreate) -> int:
    """How many addresses are made with it: IPv6 and NetBox make theirs when they are wanted."""
    if wanted.cidr.version == 6 or wanted.netbox_id is not None:
        return 0
    try:
        return usable_range(wanted.cidr, gateway=wanted.gateway, first=wanted.first, last=wanted.last).size
    except PpecError:
        # Its row will be told as a fault.
        return 0


def _count(rows: Sequence[ImportRow], faults: Sequence[Fault]) -> int:
    """Of the import's rows; some that are faulty can be understood, others can't."""
    return len({row.place for row in rows} | {fault.place for fault in faults})


def _too_much(why: str, faults: Sequence[Fault]) -> PpecError:
    """Rows may not all have been read, so they are not counted."""
    return _refused("it can't be imported", [Fault("the import", f"{why}: split it"), *faults])


def _invalid(faults: Sequence[Fault], total: int) -> PpecError:
    """With all of them: there are no more than rows."""
    return _refused(f"{len(faults)} of {total} rows can't be imported", faults)


def _refused(what: str, faults: Sequence[Fault]) -> PpecError:
    return PpecError(
        "import.invalid",
        f"{what}: {told(faults, _MOST_IN_WORDS)}",
        hint="Nothing was changed. Correct them and import again; a dry run shows what would be done.",
        subject="import",
        details={"count": len(faults), "faults": [asdict(fault) for fault in faults]},
    )
