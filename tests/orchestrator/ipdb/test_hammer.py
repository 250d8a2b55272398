# SPDX-License-Identifier: Apache-2.0
"""Processes that allocate and release addresses at once, and are killed: no duplicate, no leak, none lost.

The same hammer finds the duplicates of an allocator that looks for the next free address and then takes it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hammer_worker import image_row
from history import Ownership, duplicates, faults, lines_of, ownerships, written_history
from sqlalchemy import insert, select, update

from ppec_contract.api_ipdb import PrefixCreate
from ppec_orchestrator.store import prefixes, tables
from ppec_orchestrator.store.database import Database

WORKER = Path(__file__).parent / "hammer_worker.py"
BOUND_S = 120.0


@pytest.fixture
def site(database: Database) -> Database:
    """Two VRFs with the same addresses: `red` (host 1) without quarantine, `blue` (host 2) with one second's. There are
    fewer addresses than the workers would like to have."""
    now = datetime.now(UTC)
    with database.write() as conn:
        conn.execute(insert(tables.datacentre).values(id=1, name="d1", region="north"))
        conn.execute(insert(tables.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
        conn.execute(insert(tables.rack).values(id=1, name="r1", cluster_id=1))
        image_row(conn)
        for number, name in ((1, "red"), (2, "blue")):
            conn.execute(insert(tables.vrf).values(id=number, name=name, description=""))
            host = {"id": number, "name": f"h{number}", "rack_id": 1, "vrf_id": number, "port": 1, "address": "x"}
            conn.execute(insert(tables.host).values(host))
            places: dict[str, Any] = {"vrf": name, "bridge": "br0", "quarantine_s": number - 1}
            places |= {"cluster": "c1"} if number == 1 else {"region": "north"}
            four = {"cidr": ip_network("10.0.0.0/26"), "gateway": ip_address("10.0.0.1")}
            six = {"cidr": ip_network("fd00::/64"), "last": ip_address("fd00::40")}
            for family in (four, six):
                prefixes.create_prefix(conn, PrefixCreate(**places, **family), now)
    return database


class Hammer:
    """So many workers at once; `kill` has one killed and another take its place."""

    def __init__(self, url: str, folder: Path, allocator: str, seed: int) -> None:
        self.url, self.folder, self.allocator = url, folder, allocator
        self.rng = random.Random(seed)
        self.stop_file = folder / "stop"
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.kills = 0

    def start(self, slot: int) -> None:
        given = {
            "url": self.url, "slot": slot, "seed": self.rng.getrandbits(32), "stop": str(self.stop_file),
            "log": str(self.folder / f"{slot}.log"), "allocator": self.allocator,
        }  # fmt: skip
        self.workers[slot] = subprocess.Popen([sys.executable, str(WORKER), json.dumps(given)])

    def kill(self) -> None:
        slot = self.rng.choice(sorted(self.workers))
        victim = self.workers[slot]
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait(30) == -signal.SIGKILL, "it had ended by itself"
        self.kills += 1
        self.start(slot)

    def lines(self) -> list[dict[str, Any]]:
        return lines_of(sorted(self.folder.glob("*.log")))

    def granted(self) -> int:
        """So far, as the logs say; without reading what they say."""
        return sum(log.read_bytes().count(b'"granted"') for log in self.folder.glob("*.log"))

    def stop(self) -> None:
        self.stop_file.touch()
        for worker in self.workers.values():
            try:
                worker.wait(60)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait(30)

    def crashed(self) -> list[int]:
        return [slot for slot, worker in self.workers.items() if worker.returncode != 0]


@pytest.fixture
def hammer(database_url: str, tmp_path: Path) -> Iterator[Callable[..., Hammer]]:
    started: list[Hammer] = []

    def start(allocator: str, workers: int) -> Hammer:
        folder = tmp_path / allocator
        folder.mkdir()
        started.append(Hammer(database_url, folder, allocator, seed=11))
        for slot in range(workers):
            started[-1].start(slot)
        return started[-1]

    yield start
    for one in started:
        one.stop()


def hammered(running: Hammer, *, grants: int, kills: int) -> list[dict[str, Any]]:
    """Until so much was granted and so many were killed."""
    deadline = time.monotonic() + BOUND_S * max(1, grants // 2000)
    seen_at_kill = 0
    while True:
        granted = running.granted()
        if granted >= grants and running.kills >= kills:
            break
        # The kills are spread over the work, wherever the worker then is.
        if running.kills < kills and granted >= seen_at_kill + grants // (kills + 1):
            running.kill()
            seen_at_kill = granted
        assert time.monotonic() < deadline, f"{granted} grants and {running.kills} kills by then"
        time.sleep(0.1)
    running.stop()
    assert running.crashed() == []
    return running.lines()


@pytest.mark.slow
def test_no_address_is_granted_twice_leaked_or_lost(site: Database, hammer: Callable[..., Hammer]) -> None:
    lines = hammered(hammer("ipdb", 6), grants=1200, kills=6)
    assert faults(lines, site) == []
    # It was a fight: addresses went through several hands.
    owned = ownerships(lines)
    assert len(owned) > 5 * len({one.address for one in owned})


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_no_address_is_granted_twice_leaked_or_lost_in_the_long_run(
    site: Database, hammer: Callable[..., Hammer]
) -> None:
    assert faults(hammered(hammer("ipdb", 12), grants=30_000, kills=120), site) == []


@pytest.mark.slow
def test_the_hammer_finds_the_duplicates_of_a_naive_allocator(site: Database, hammer: Callable[..., Hammer]) -> None:
    running = hammer("naive", 6)
    deadline = time.monotonic() + BOUND_S
    while not (found := list(duplicates(ownerships(running.lines())))):
        assert time.monotonic() < deadline, "the hammer can't fail"
        time.sleep(0.1)
    assert "was granted to" in found[0]


def owner(address: str, vm: str, begin: int, end: int | None) -> Ownership:
    return Ownership(address, vm, begin, end)


@pytest.mark.parametrize(
    ("history", "count"),
    [
        ([owner("1 a", "x", 1, 5), owner("1 a", "y", 6, None), owner("2 a", "z", 2, None)], 0),
        ([owner("1 a", "x", 1, 5), owner("1 a", "y", 4, None)], 1),
        ([owner("1 a", "x", 1, None), owner("1 a", "y", 4, 5)], 1),
        ([owner("1 a", "x", 1, 9), owner("1 a", "y", 2, 3), owner("1 a", "z", 3, None)], 1),
    ],
)
def test_the_checker_sees_overlaps(history: list[Ownership], count: int) -> None:
    assert len(list(duplicates(history))) == count


def test_the_checker_sees_what_is_wrong_in_the_database(site: Database) -> None:
    """A VM without addresses, an address without a VM, a grant on top of another, a count that lies."""
    first, second = uuid4(), uuid4()

    def event(action: str, vm_id: UUID) -> dict[str, Any]:
        return {
            "at": datetime.now(UTC), "action": action, "vrf": "red", "prefix_id": 1, "cidr": "10.0.0.0/26",
            "address_hex": f"{0x0A000002:032x}", "vm_id": vm_id,
        }  # fmt: skip

    assert faults([], site) == []
    with site.write() as conn:
        conn.execute(insert(tables.address_event), [event("granted", first), event("granted", second)])
        mine = tables.address.c.address_hex == f"{0x0A000002:032x}", tables.address.c.prefix_id == 1
        conn.execute(update(tables.address).where(*mine).values(vm_id=second))
        lowest = select(tables.address.c.id).where(tables.address.c.address_hex == f"{0x0A000003:032x}").limit(1)
        conn.execute(tables.address.delete().where(tables.address.c.id.in_(lowest)))
    told = [{"at": 1, "what": "granted", "vm": str(first), "addresses": ["1 10.0.0.2"]}]
    found = faults(told, site)
    assert len(list(written_history(site))) == 1
    assert len(found) == 4
    for fault, words in zip(found, ("was told", "while", "does not exist", "60 rows for 61"), strict=True):
        assert words in fault
