# SPDX-License-Identifier: Apache-2.0
"""One process of the hammer: makes and deletes VMs with their addresses until it is told to stop, or killed.

    python hammer_worker.py '{"url": …, "slot": 3, "seed": 7, "log": path, "stop": path, "allocator": "ipdb"}'

Its log has a line for each thing it is sure of: `granted` after the commit, `releasing` before the transaction that
takes the addresses back. So between the two the VM surely had them, whoever was killed when. Times are of the
machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Connection, insert, select, update

from ppec_contract.api_ipdb import HoldCreate, NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.store import holds, ipdb, tables, vms
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.serving import prefixes_serving
from ppec_orchestrator.store.vms import NewVm

MOST_HELD = 14
# Asked for by number again and again.
POPULAR = ("10.0.0.9", "fd00::9")
EXPECTED = {
    "address.exhausted", "address.in_use", "address.quarantined", "address.reserved", "hold.overlaps",
    "store.unavailable",
}  # fmt: skip
Granted = dict[UUID, list[str]]


class Allocator(Protocol):
    """Makes VMs with addresses on a host, and unmakes them."""

    def create(self, host_id: int, new: Sequence[NewVm], networks: Sequence[NetworkWanted], fail: bool) -> Granted: ...

    def delete(self, vm_ids: Sequence[UUID]) -> None: ...


class Ipdb:
    """The product's: VM and addresses in one transaction. `fail`: the transaction is rolled back at its end."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, host_id: int, new: Sequence[NewVm], networks: Sequence[NetworkWanted], fail: bool) -> Granted:
        with self.database.write() as conn:
            vms.insert_vms(conn, new, datetime.now(UTC))
            ids = [one.vm_id for one in new]
            ipdb.grant(conn, dict.fromkeys(ids, host_id), dict.fromkeys(ids, networks))
            granted = dict.fromkeys(ids, ()) | ipdb.addresses_of(conn, ids)
            if fail:
                raise KeyError
        return {vm_id: [f"{one.prefix_id} {one.address.ip}" for one in mine] for vm_id, mine in granted.items()}

    def delete(self, vm_ids: Sequence[UUID]) -> None:
        with self.database.write() as conn:
            ipdb.release(conn, vm_ids)
            vms.forget(conn, vm_ids)


class NaiveNextFree:
    """What one writes first: look for the lowest free address, then take it. IPv4 only; the hammer must catch it."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, host_id: int, new: Sequence[NewVm], networks: Sequence[NetworkWanted], fail: bool) -> Granted:
        with self.database.read() as conn:
            (prefix,) = [one for one in prefixes_serving(conn, [host_id])[host_id] if one.family == 4]
            free = select(tables.address.c.address_hex).where(
                tables.address.c.prefix_id == prefix.prefix_id, tables.address.c.vm_id.is_(None)
            )
            found = conn.execute(free.order_by(tables.address.c.address_hex).limit(len(new))).scalars().all()
        if len(found) < len(new):
            raise PpecError("address.exhausted", "naive")
        with self.database.write() as conn:
            vms.insert_vms(conn, new, datetime.now(UTC))
            for one, text in zip(new, found, strict=True):
                self._set(conn, prefix.prefix_id, text, one.vm_id)
        return {
            one.vm_id: [f"{prefix.prefix_id} {prefix.granted(text).address.ip}"]
            for one, text in zip(new, found, strict=True)
        }

    @staticmethod
    def _set(conn: Connection, prefix_id: int, text: str, vm_id: UUID) -> None:
        mine = tables.address.c.prefix_id == prefix_id, tables.address.c.address_hex == text
        conn.execute(update(tables.address).where(*mine).values(vm_id=vm_id))

    def delete(self, vm_ids: Sequence[UUID]) -> None:
        with self.database.write() as conn:
            conn.execute(update(tables.address).where(tables.address.c.vm_id.in_(vm_ids)).values(vm_id=None))
            vms.forget(conn, vm_ids)


ALLOCATORS = {"ipdb": Ipdb, "naive": NaiveNextFree}


class Worker:
    def __init__(self, given: dict[str, Any]) -> None:
        self.database = Database(given["url"])
        self.allocator: Allocator = ALLOCATORS[given["allocator"]](self.database)
        self.plain = given["allocator"] == "naive"
        self.slot, self.stop = given["slot"], Path(given["stop"])
        self.rng = random.Random(given["seed"])
        self.log = os.open(given["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.held: Granted = {}

    def tell(self, what: str, vms_of: Granted) -> None:
        at = time.monotonic_ns()
        lines = [
            json.dumps({"at": at, "what": what, "vm": str(vm_id), "addresses": mine}) for vm_id, mine in vms_of.items()
        ]
        if lines:
            os.write(self.log, ("\n".join(lines) + "\n").encode())

    def adopt(self) -> None:
        """What an earlier process of this slot made, and was killed before it could tell or delete."""
        with self.database.read() as conn:
            names = select(tables.vm.c.id).where(tables.vm.c.name.like(f"w{self.slot}-%"))
            ids = conn.execute(names).scalars().all()
            found = ipdb.addresses_of(conn, ids)
        self.held = {vm_id: [f"{one.prefix_id} {one.address.ip}" for one in mine] for vm_id, mine in found.items()}
        self.tell("granted", self.held)

    def run(self) -> None:
        self.adopt()
        while not self.stop.exists():
            try:
                self.act()
            except KeyError:
                pass
            except PpecError as error:
                if error.code not in EXPECTED:
                    raise

    def act(self) -> None:
        if not self.plain and self.rng.random() < 0.02:
            self.hold_back()
        elif len(self.held) < self.rng.randint(1, MOST_HELD):
            self.create()
        else:
            self.delete()

    def create(self) -> None:
        new = [self.new_vm() for _ in range(self.rng.choice((1, 1, 2, 3)))]
        networks: Sequence[NetworkWanted] = ipdb.ANY_NETWORK
        if len(new) == 1 and not self.plain and self.rng.random() < 0.2:
            networks = (NetworkWanted(), NetworkWanted(address=ip_address(self.rng.choice(POPULAR))))
        host_id = 1 if self.plain else self.rng.choice((1, 1, 1, 2))
        made = self.allocator.create(host_id, new, networks, not self.plain and self.rng.random() < 0.1)
        self.tell("granted", made)
        self.held.update(made)

    def new_vm(self) -> NewVm:
        vm_id = uuid.UUID(int=self.rng.getrandbits(64) << 64 | uuid.uuid4().int & (2**64 - 1))
        return NewVm(vm_id, f"w{self.slot}-{vm_id.hex}", "f", 1, 2, 1, 1, "", {}, "op-hammer")

    def delete(self) -> None:
        chosen = self.rng.sample(sorted(self.held), min(len(self.held), self.rng.choice((1, 2, 3))))
        mine = {vm_id: self.held[vm_id] for vm_id in chosen}
        self.tell("releasing", mine)
        self.allocator.delete(chosen)
        self.held = {vm_id: addresses for vm_id, addresses in self.held.items() if vm_id not in mine}

    def hold_back(self) -> None:
        """Excludes an address that nobody has, and gives it back at once."""
        number = self.rng.randint(2, 60)
        prefix_id, text = self.rng.choice(((1, f"10.0.0.{number}"), (2, f"fd00::{number % 40 + 1:x}")))
        wanted = HoldCreate(kind="excluded", first=ip_address(text))
        with self.database.write() as conn:
            made = holds.create_hold(conn, prefix_id, wanted, "hammer", utc_now)
        with self.database.write() as conn:
            holds.delete_hold(conn, prefix_id, made.hold_id, "hammer", utc_now)


def image_row(conn: Connection) -> None:
    """That the VMs' rows refer to."""
    conn.execute(
        insert(tables.image).values(
            id=1, name="i", format="raw", architecture="x86_64", sha256="0" * 64, size_bytes=1, virtual_size_mib=1
        )
    )


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        Worker(json.loads(sys.argv[1])).run()
