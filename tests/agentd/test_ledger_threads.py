# SPDX-License-Identifier: Apache-2.0
"""The ledger under real threads, and beside slow work: its locks are never held over anything slow."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ppec_agentd.actions.batch import Actions
from ppec_agentd.assembly import make_context, prepare_state
from ppec_agentd.fake_hypervisor import FakeHypervisor, FakeOptions
from ppec_agentd.hypervisor import DomainDefinition
from ppec_agentd.ledger import Claim, Ledger, Move
from ppec_agentd.numa import PinRequest, plan_pins
from ppec_agentd.settings import Settings
from ppec_agentd.topology import declare_topology
from ppec_contract.agent import CreateVms
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy

TOPOLOGY = declare_topology("sockets=2,cells=2,cores=6,threads=2,memory_mib=4000,huge_2m=500")
POLICIES = [NumaPolicy(), NumaPolicy(huge_page_kib=2048), NumaPolicy(cpus=CpuPolicy.SHARED)]
THREADS = 8
_numbers = itertools.count(1)


def new_ledger() -> Ledger:
    return Ledger(TOPOLOGY, 10**6, reserved_cores_per_cell=1, shared_cores_per_cell=1)


def claim(cell: int, policy: NumaPolicy | None = None, vcpus: int = 2, memory_mib: int = 100) -> Claim:
    number = next(_numbers)
    return Claim(
        uuid.UUID(int=number), f"vm-{number}", vcpus, memory_mib, 10, (cell,), policy or NumaPolicy(), max_vcpus=12
    )


class Client:
    """One thread's VMs, and what it does to them in an order of its own."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger = ledger
        self.dice = random.Random(seed)
        self.mine: list[uuid.UUID] = []
        self.refusals: Counter[str] = Counter()

    def run(self, steps: int) -> Client:
        for _ in range(steps):
            try:
                self.dice.choice([self.reserve, self.reserve, self.resize, self.move, self.settle, self.release])()
            except PpecError as refusal:
                self.refusals[refusal.code] += 1
        return self

    def reserve(self) -> None:
        wanted = claim(self.dice.randrange(4), self.dice.choice(POLICIES), 2 * self.dice.randint(1, 2))
        self.ledger.reserve(wanted)
        self.mine.append(wanted.vm_id)

    def resize(self) -> None:
        if self.mine:
            self.ledger.resize(self.dice.choice(self.mine), 2 * self.dice.randint(1, 4), 2 * self.dice.randint(1, 300))

    def move(self) -> None:
        """Planned on a picture that may be old by the time it is asked for: the ledger has the last word."""
        held = self.ledger.holding(self.dice.choice(self.mine)) if self.mine else None
        if held is not None:
            cell = self.dice.randrange(4)
            pins = plan_pins(self.ledger.pool(), PinRequest(held.vcpus, (cell,), policy=held.policy)).pins
            self.ledger.repin([Move(held.vm_id, pins, (cell,))])

    def settle(self) -> None:
        if self.mine:
            self.dice.choice([self.ledger.commit, self.ledger.revert])(self.dice.choice(self.mine))

    def release(self) -> None:
        if self.mine:
            assert self.ledger.release(self.mine.pop(self.dice.randrange(len(self.mine))))


def test_threads_that_do_everything_at_once_leak_nothing_and_share_nothing() -> None:
    ledger = new_ledger()
    watching = threading.Event()

    def watch() -> int:
        """Reads while others write: at no moment do two hold one CPU."""
        pictures = 0
        while not watching.is_set():
            users = Counter(cpu for held in ledger.holdings() for cpu in held.kept().cpus)
            assert not [cpu for cpu, count in users.items() if count > 1]
            pictures += 1
        return pictures

    with ThreadPoolExecutor(THREADS + 1) as pool:
        watcher = pool.submit(watch)
        try:
            clients = list(pool.map(lambda seed: Client(ledger, seed).run(250), range(THREADS)))
        finally:
            watching.set()
        assert watcher.result(timeout=60) > 0
    refusals = sum((client.refusals for client in clients), Counter[str]())
    assert set(refusals) <= {"host.no_capacity", "vm.wrong_state", "vm.exceeds_socket"}
    assert refusals["host.no_capacity"] > 0
    assert ledger.held_ids() == {vm_id for client in clients for vm_id in client.mine}
    totals, cells = ledger.totals(), ledger.cells()
    assert totals.cores_free == sum(cell.cores_free for cell in cells)
    assert totals.memory_free_mib == sum(cell.memory_free_mib for cell in cells)
    assert totals.shared_vcpus_free == sum(cell.shared_vcpus_free for cell in cells)
    assert totals.free["huge_pages_2048_kib"] == sum(pages.pages_free for c in cells for pages in c.huge_pages)
    for vm_id in ledger.held_ids():
        ledger.release(vm_id)
    assert (ledger.totals(), ledger.cells()) == (new_ledger().totals(), new_ledger().cells())


class SlowHypervisor(FakeHypervisor):
    """Nothing is defined until somebody says so."""

    def __init__(self, options: FakeOptions) -> None:
        super().__init__(options)
        self.arrived = asyncio.Event()
        self.go = asyncio.Event()

    async def define(self, definition: DomainDefinition) -> bool:
        self.arrived.set()
        await self.go.wait()
        return await super().define(definition)


def test_hundreds_are_decided_while_slow_ones_run(settings: Settings, vm: Any) -> None:
    """A create hangs in the hypervisor; meanwhile another thread is admitted and refused, hundreds of times.

    A lock of the ledger held over the hypervisor's call would keep it waiting until the create goes on, which it does
    only afterwards.
    """

    def hundreds(ledger: Ledger) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for number in range(400):
            wanted = claim(number % 2, vcpus=2 if number % 4 else 8, memory_mib=10)
            try:
                ledger.reserve(wanted)
            except PpecError as refusal:
                outcomes[refusal.code] += 1
            else:
                outcomes["admitted"] += 1
                ledger.commit(wanted.vm_id)
                ledger.release(wanted.vm_id)
        return outcomes

    async def scenario() -> None:
        journal = prepare_state(settings.storage)
        hypervisor = SlowHypervisor(FakeOptions(declare_topology(settings.lab.topology or "")))
        await hypervisor.open()
        context = await make_context(settings, hypervisor, journal)
        actions = Actions(context)
        request = CreateVms(operation_id="op-1", fence=1, vms=(vm(),))
        slow = asyncio.create_task(actions.run(request, lambda reply: None))
        try:
            await asyncio.wait_for(hypervisor.arrived.wait(), 60)
            outcomes = await asyncio.wait_for(asyncio.to_thread(hundreds, context.ledger), 60)
            assert not slow.done()
            assert outcomes == {"admitted": 300, "host.no_capacity": 100}
            assert len(context.ledger.held_ids()) == 1
            hypervisor.go.set()
            assert all(result.problem is None for result in (await asyncio.wait_for(slow, 60)).results)
        finally:
            hypervisor.go.set()
            await actions.drain(10)
            await hypervisor.close()
            journal.close()

    asyncio.run(scenario())
