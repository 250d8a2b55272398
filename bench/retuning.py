# SPDX-License-Identifier: Apache-2.0
"""Retune: the CPU time of a plan on hosts of several sizes, and how long it takes to carry one out."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
import uuid
from pathlib import Path
from typing import Any

from bench.agent_client import AgentClient, one_vm
from bench.figures import Figures
from bench.ledger import fake_agent
from bench.released_host import released_host
from ppec_agentd.ledger import Claim, Ledger
from ppec_agentd.retune.plan import HostState, plan_retune
from ppec_agentd.retune.tenants import host_state
from ppec_agentd.topology import declare_topology
from ppec_contract.errors import PpecError
from ppec_contract.retune import MAX_MOVES, RetuneBounds, RetuneWant

# Sockets and cells of each: two, four and eight cells.
SHAPES = ((2, 1), (2, 2), (2, 4))
# VMs on a host, and how many such hosts: the search on a full large one goes to the end of what it may try.
VMS = ((20, 5), (100, 1))
# Cores of a VM; the part of a host that was taken; and of its VMs, those that have gone since.
LARGEST_CORES = 4
FULL = 0.8
GONE = 0.45
# A cell that holds all of the VMs that move, and one to move them to.
TOPOLOGY = "sockets=2,cores=24,threads=1,memory_mib=65536"
MOVING = 8
RETUNES = 5


def run(figures: Figures) -> None:
    dice = random.Random(20)
    for sockets, cells in SHAPES:
        for vms, hosts in VMS:
            shape = (sockets, cells)
            states = [_host(dice, shape, vms) for _ in range(hosts)]
            _plans(figures, states, f"cells_{sockets * cells}.vms_{vms}")
    with fake_agent(TOPOLOGY) as path, contextlib.closing(AgentClient(path)) as client:
        _carried_out(figures, "fake", client, path.parent / "image.raw")
    # A declared topology: libvirt is asked for every change, and no CPU of this machine is bound to.
    with released_host() as host, contextlib.closing(host.client()) as client:
        _carried_out(figures, "libvirt", client, host.image)


def _plans(figures: Figures, hosts: list[HostState], name: str) -> None:
    """To open one whole cell, in as many moves as it takes."""
    taken_ms, found = [], 0
    for state in hosts:
        started_s = time.process_time()
        try:
            plan_retune(state, RetuneWant(), RetuneBounds(moves=MAX_MOVES))
            found += 1
        except PpecError as error:
            if error.code != "retune.not_possible":
                raise
        taken_ms.append((time.process_time() - started_s) * 1000)
    figures.add(f"retune.plan.{name}", statistics.median(taken_ms), "CPU-ms")
    figures.add(f"retune.plan.{name}.found", found / len(hosts), "of hosts")


def _host(dice: random.Random, shape: tuple[int, int], vms: int) -> HostState:
    """A host that was filled by chance, and of which then some VMs have gone; `vms` are left."""
    started = round(vms / (1 - GONE))
    sockets, cells = shape
    cores = max(LARGEST_CORES, round(started * (1 + LARGEST_CORES) / 2 / FULL / sockets / cells))
    ledger = Ledger(
        declare_topology(f"sockets={sockets},cells={cells},cores={cores},threads=2,memory_mib=1048576"), 10**7
    )
    held: list[uuid.UUID] = []
    for number in range(started):
        wanted = dice.randint(1, LARGEST_CORES)
        order = dice.sample(range(sockets * cells), sockets * cells)
        for cell in order:
            claim = Claim(uuid.UUID(int=number + 1), f"vm-{number}", 2 * wanted, 2048 * wanted, 10, (cell,))
            with contextlib.suppress(PpecError):
                ledger.reserve(claim)
                ledger.commit(claim.vm_id)
                held.append(claim.vm_id)
                break
    for vm_id in dice.sample(held, max(0, len(held) - vms)):
        ledger.release(vm_id)
    return host_state(ledger)


def _carried_out(figures: Figures, name: str, client: AgentClient, image: Path) -> None:
    """Milliseconds of a whole RetuneHost per VM that it moves: there and back again, the same VMs."""
    image.write_bytes(b"PPEC" + bytes(65532))
    vms = [one_vm(f"vm-{number}", image, 0, memory_mib=64) for number in range(MOVING)]
    _done(client.call("CreateVms", {"operation_id": "bench-create", "fence": 1, "vms": vms}))
    taken_ms = []
    for turn in range(RETUNES):
        planned = client.call("PlanRetune", {"want": {"cells": [turn % 2]}})["plan"]
        if len(planned["moves"]) != MOVING:
            raise RuntimeError(f"{len(planned['moves'])} moves were planned, {MOVING} wanted")
        started_s = time.monotonic()
        _done(client.call("RetuneHost", {"operation_id": f"bench-{turn}", "fence": 1, "plan": planned}))
        taken_ms.append((time.monotonic() - started_s) * 1000 / MOVING)
    figures.add(f"retune.move.{name}", statistics.median(taken_ms), "ms per VM")


def _done(reply: dict[str, Any]) -> None:
    problems = [result["problem"] for result in reply["results"] if result.get("problem")]
    if problems:
        raise RuntimeError(f"the agent refused: {problems[0]}")
