# SPDX-License-Identifier: Apache-2.0
"""What accepting VMs writes, written by the database's own driver and nothing else: the floor of `accepting`."""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import psycopg

# By table, a row of it for one VM (`operation` and `step`: for one request). `?` as SQLite has it.
_INSERTS = {
    "vm": (
        "INSERT INTO vm (id, name, record, flavor, image_id, vcpus, memory_mib, disk_mib, user_data, labels, "
        "created_at, operation_id, observed, numa) "
        "VALUES (?, ?, 'creating', 'c2.4', 1, 2, 4096, 40960, '', '{}', ?, ?, 'unknown', '{}')"
    ),
    "allocation": "INSERT INTO allocation (vm_id, host_id, disk_mib) VALUES (?, ?, 40960)",
    "allocation_cell": "INSERT INTO allocation_cell (vm_id, cell, cores, memory_mib) VALUES (?, 0, 2, 4096)",
    "vm_search": "INSERT INTO vm_search (name, vm_id, text) VALUES (?, ?, ?)",
    "address_event": (
        "INSERT INTO address_event (at, action, vrf, prefix_id, cidr, address_hex, vm_id, vm, operation_id) "
        "VALUES (?, 'granted', ?, ?, ?, ?, ?, ?, ?)"
    ),
    "operation_item": (
        "INSERT INTO operation_item (operation_id, vm_id, position, name, state, host, attempt, excluded_hosts, "
        "stage_ms) VALUES (?, ?, ?, ?, 'pending', ?, 1, '[]', '{}')"
    ),
}
_HOST = "UPDATE host SET disk_used_mib = disk_used_mib + 40960, generation = generation + 1, changed = {} WHERE id = ?"
_MARKS = {
    True: "(SELECT coalesce(max(changed), 0) + 1 FROM host)",
    False: "CAST(CAST(pg_current_xact_id() AS text) AS bigint)",
}
_CELL = (
    "UPDATE host_cell SET cores_used = cores_used + 2, memory_used_mib = memory_used_mib + 4096 "
    "WHERE host_id = ? AND cell = 0"
)
_FREE_ADDRESSES = (
    "SELECT address.id, vrf.name, prefix.id, prefix.cidr, address.address_hex FROM address "
    "JOIN prefix ON prefix.id = address.prefix_id JOIN vrf ON vrf.id = prefix.vrf_id "
    "WHERE address.vm_id IS NULL ORDER BY address_hex DESC LIMIT 20000"
)
_ADDRESS = "UPDATE address SET vm_id = ? WHERE id = ?"
_OPERATION = (
    "INSERT INTO operation (id, kind, state, priority, created_by, created_at, input, counters, cancel_requested, "
    "fence) VALUES (?, 'vm.create', 'queued', 0, 'bench', ?, ?, '{}', ?, 0)"
)
_STEP = "INSERT INTO step (operation_id, ordinal, name, state, data, detail) VALUES (?, ?, ?, 'pending', '{}', '')"
_INPUT = json.dumps(
    {"request": {"flavor": "c2.4", "image": "debian-12", "name": "x" * 12}, "vcpus": 2, "more": "x" * 600}
)


class BareCommits:
    """On the orchestrator's own database, beside it."""

    def __init__(self, url: str) -> None:
        self._sqlite = url.startswith("sqlite")
        if self._sqlite:
            self._connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=30)
            self._connection.execute("PRAGMA synchronous=FULL")
        else:
            self._connection = psycopg.connect(url, autocommit=True)
        self._cursor = self._connection.cursor()
        self._cursor.execute("SELECT id FROM host WHERE enrolled_at IS NOT NULL")
        self._hosts = [row[0] for row in self._cursor.fetchall()]
        self._cursor.execute(_FREE_ADDRESSES)
        # The id, and what the history tells of it.
        self._addresses = iter([(row[0], row[1:]) for row in self._cursor.fetchall()])
        self._dice = random.Random(1)

    def rate(self, vms: int, requests: int) -> float:
        """VMs per second, when each of `requests` transactions has so many."""
        started_s = time.monotonic()
        for _ in range(requests):
            self._request(vms)
        return vms * requests / (time.monotonic() - started_s)

    def close(self) -> None:
        self._connection.close()

    def _request(self, vms: int) -> None:
        now: Any = datetime.now(UTC)
        if self._sqlite:
            now = now.replace(tzinfo=None).isoformat(" ")
        operation = f"op-{uuid.uuid4().hex}"
        ids = [uuid.uuid4() for _ in range(vms)]
        keys: list[Any] = [one.hex for one in ids] if self._sqlite else list(ids)
        names = [f"b{one.hex[:16]}" for one in ids]
        hosts = self._dice.sample(self._hosts, vms)
        taken = list(itertools.islice(self._addresses, vms))
        self._run("BEGIN IMMEDIATE" if self._sqlite else "BEGIN")
        self._many(_INSERTS["vm"], [(key, name, now, operation) for key, name in zip(keys, names, strict=True)])
        self._many(_HOST.format(_MARKS[self._sqlite]), [(host,) for host in sorted(hosts)])
        self._many(_CELL, [(host,) for host in sorted(hosts)])
        self._many(_INSERTS["allocation"], list(zip(keys, hosts, strict=True)))
        self._many(_INSERTS["allocation_cell"], [(key,) for key in keys])
        searched = [(name, key, f"{name} debian-12 c2.4") for name, key in zip(names, keys, strict=True)]
        self._many(_INSERTS["vm_search"], searched)
        self._many(_ADDRESS, [(key, address) for key, (address, _) in zip(keys, taken, strict=True)])
        granted = zip(keys, names, taken, strict=True)
        self._many(_INSERTS["address_event"], [(now, *told, key, name, operation) for key, name, (_, told) in granted])
        self._run(_OPERATION, (operation, now, _INPUT, 0 if self._sqlite else False))
        self._many(_STEP, [(operation, at, name) for at, name in enumerate(("reserve", "create"))])
        items = zip(keys, itertools.count(), names, hosts, strict=False)
        self._many(
            _INSERTS["operation_item"], [(operation, key, at, name, f"h{host}") for key, at, name, host in items]
        )
        self._run("COMMIT")

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> None:
        self._cursor.execute(self._spelt(statement), values)

    def _many(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        self._cursor.executemany(self._spelt(statement), rows)

    def _spelt(self, statement: str) -> str:
        return statement if self._sqlite else statement.replace("?", "%s")
