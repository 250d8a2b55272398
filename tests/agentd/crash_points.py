# SPDX-License-Identifier: Apache-2.0
"""Every point of an action at which the agent may be killed, and what has to be found by the next agent at each.

The action runs once, whole. Before and after each call of the hypervisor, each append to the journal and each disk that
is made, the folder with all the host's state is looked at: that is what an agent killed there leaves. An append is
looked at torn as well. Then each such state is laid down again, and an agent started on it. Recovery is an action like
any other: killed at each of its own points, another recovery has to come to the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_agentd.fake_faults import FaultPlan
from ppec_agentd.hypervisor import Domain
from ppec_agentd.images import CachedImage
from ppec_agentd.ledger import DriveState
from ppec_agentd.nvme.drive import HOST_DRIVER
from ppec_agentd.recovery import recover
from ppec_agentd.settings import Settings
from ppec_contract.agent import CreateVms, ResizeVms, RetuneHost, WriteCall
from ppec_contract.vm import VmSpec, VmState

from .agent_in_process import NOTHING, Agent, open_agent

JOURNAL = "journal.log"
# A sync costs nothing there, and there are many.
MEMORY = Path("/dev/shm")
FOLDER = None
Tree = Mapping[str, bytes | None]
Checked = Callable[[Agent], Awaitable[None]]
Request = Callable[[int], WriteCall]


@dataclass(frozen=True)
class Scenario:
    """An action, the host it runs on, and what only this action promises.

    `prepare` makes the host ready and returns the request, by its fence. `recovered` is checked after the recovery from
    a crash at any point, `done` after the action, at once or repeated; the rest is checked for every action alike.
    """

    settings: Settings
    prepare: Callable[[Agent], Awaitable[Request]]
    recovered: Checked
    done: Checked


@dataclass(frozen=True)
class CrashPoint:
    """`kind` is a method of the hypervisor, "disk", or "journal" with the records' action and whether they are intents
    or answers."""

    number: int
    kind: str
    phase: str
    state: Tree

    def __str__(self) -> str:
        return f"{self.number}: {self.phase} {self.kind}"


@dataclass
class CrashPoints:
    """One action's points, as they came; `recoveries` is how many were put to the test, recoveries' own among them."""

    points: list[CrashPoint] = field(default_factory=list)
    recoveries: int = 0

    @property
    def counted(self) -> Counter[tuple[str, str]]:
        return Counter((point.kind, point.phase) for point in self.points)

    @property
    def kinds(self) -> set[str]:
        return {point.kind for point in self.points}

    def distinct(self) -> list[CrashPoint]:
        """One point for each state: most calls of the hypervisor only look."""
        return list({_mark(point.state): point for point in reversed(self.points)}.values())[::-1]


class _Watch(FaultPlan):
    """Looks at the state at each point of what an agent does."""

    def __init__(self, agent: Agent) -> None:
        known = agent.hypervisor.faults
        super().__init__(delays_s=known.delays_s, fail_every=known.fail_every)
        self._points: list[CrashPoint] = []
        self._folder = agent.settings.storage.state_dir
        self._to_disk = agent.context.journal.to_disk
        self._disks = agent.context.disks
        self._contents: dict[bytes, bytes] = {}
        agent.hypervisor.faults = self
        agent.context.journal.to_disk = self._append
        agent.context.disks = self

    def so_far(self) -> CrashPoints:
        return CrashPoints(list(self._points))

    async def begin(self, method: str) -> Callable[[], None]:
        end = await super().begin(method)
        # Nothing runs between this and the call's effect, and nothing between that and `ended`.
        self._look(method, "before")

        def ended() -> None:
            self._look(method, "after")
            end()

        return ended

    async def make_overlay(self, path: Path, image: CachedImage, size_mib: int) -> None:
        self._look("disk", "before")
        await self._disks.make_overlay(path, image, size_mib)
        self._look("disk", "after")

    def _append(self, file: int, data: bytes) -> None:
        kind = _kind_of(data)
        self._look_torn(kind, data)
        self._to_disk(file, data)
        self._look(kind, "after")

    def _look_torn(self, kind: str, data: bytes) -> None:
        self._look(kind, "before")
        before = self._points[-1].state
        written = before[JOURNAL] or b""
        lines = data.splitlines(keepends=True)
        whole = [len(b"".join(lines[:count])) for count in range(1, len(lines))]
        for length in sorted({1, len(data) // 2, len(data) - len(lines[-1]) // 2, len(data) - 1, *whole}):
            self._add(kind, "torn", {**before, JOURNAL: written + data[:length]})

    def _look(self, kind: str, phase: str) -> None:
        # Files are written beside this, in threads: two looks that agree show how it was between them.
        state, again = read_tree(self._folder), read_tree(self._folder)
        while state != again:
            state, again = again, read_tree(self._folder)
        self._add(kind, phase, state)

    def _add(self, kind: str, phase: str, state: Tree) -> None:
        # Most files are the same at most points: each content is kept once.
        state = {name: content and self._contents.setdefault(content, content) for name, content in state.items()}
        self._points.append(CrashPoint(len(self._points), kind, phase, state))


def _kind_of(data: bytes) -> str:
    kinds = set()
    for line in data.splitlines():
        record = json.loads(line.partition(b" ")[2])
        if "action" not in record:
            kinds.add("fence")
        else:
            step = "intent" if record["answer"] is None else "answer" if record["answer"] else "abandoned"
            kinds.add(f"{record['action']} {step}")
    return f"journal: {', '.join(sorted(kinds))}"


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A temporary folder in memory, where there is one."""
    path = Path(tempfile.mkdtemp(prefix="ppec-", dir=MEMORY if MEMORY.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def tiny_vm(vm: Callable[..., VmSpec], tmp_path: Path) -> Callable[..., VmSpec]:
    """The usual VM, but of a very small image: the state is read at each point, and laid down for each crash."""
    path, data = tmp_path / "tiny.raw", b"a tiny image" * 100
    path.write_bytes(data)
    image = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data), "url": path.as_uri()}
    return lambda name, **changes: vm(name, image=image, **changes)


# --- the state of a host ---------------------------------------------------------------------------------------------


def read_tree(folder: Path) -> Tree:
    """All files below, by their paths. What another thread removes or renames meanwhile is taken as gone."""
    tree: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        try:
            tree[name] = FOLDER if path.is_dir() else path.read_bytes()
        except FileNotFoundError:
            continue
    return tree


def lay_down(folder: Path, tree: Tree) -> None:
    """Makes the folder what the tree says, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o711)
    for name, content in sorted(tree.items()):
        path = folder / name
        if content is FOLDER:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o711)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _mark(tree: Tree) -> Hashable:
    """Equal for states that differ in nothing but times."""
    whole, _, torn = (tree.get(JOURNAL) or b"").rpartition(b"\n")
    records = []
    for line in whole.splitlines():
        record = json.loads(line.partition(b" ")[2])
        answer = json.loads(record["answer"]) if record.get("answer") else {}
        timeless = {key: value for key, value in answer.items() if key not in ("stage_ms", "observed_at")}
        records.append(json.dumps([record | {"at": 0, "answer": bool(answer)}, timeless]))
    return tuple(records), len(torn), frozenset({**tree, JOURNAL: b""}.items())


def journal_records(tree: Tree) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The latest record of each (operation, action, VM)."""
    records = (json.loads(line.partition(b" ")[2]) for line in (tree.get(JOURNAL) or b"").splitlines())
    return {(r["operation"], r["action"], r["vm"]): r for r in records if "action" in r}


# --- what holds after every recovery ---------------------------------------------------------------------------------


async def assert_nothing_leaked(agent: Agent) -> None:
    """Domains, ledger, folders and journal tell one story, and nothing else is there."""
    domains, ledger = await agent.hypervisor.domains(), agent.context.ledger
    assert agent.context.journal.in_flight() == ()
    assert ledger.audit(domains) == ()
    assert agent.context.open_seats == {}
    holdings = {holding.vm_id: holding for holding in ledger.holdings()}
    assert sorted(holdings) == sorted(domain.vm_id for domain in domains)
    assert all(holding.committed and not holding.pending for holding in holdings.values())
    topology = agent.context.facts.topology
    taken = [core for domain in domains for core in _cores(domain, topology.core_of_cpu)]
    assert len(taken) == len(set(taken)), "a core has two owners"
    totals = ledger.totals()
    held = [domain.metadata for domain in domains if domain.metadata is not None]
    assert len(held) == len(domains)
    assert totals.cores - totals.cores_free == len(taken)
    assert totals.memory_mib - totals.memory_free_mib == sum(metadata.memory_mib for metadata in held)
    for pool, resource in {"": "disk_mib", "fast": "pool_fast_mib"}.items():
        in_use = totals.amounts.get(resource, 0) - totals.free.get(resource, 0)
        assert in_use == sum(metadata.disk_mib for metadata in held if metadata.pool == pool), resource
    for later, metadata in _next_starts(agent.settings):
        for resource in ("vcpus", "memory_mib"):
            assert later[resource] <= metadata[resource], "nobody holds what the next start will need"
    free = {cell.cell: cell.cores_free for cell in ledger.cells()}
    assert sum(free.values()) == totals.cores_free
    await assert_drives_are_safe(agent, domains)
    assert_only_owned_files(agent.settings, {str(metadata.vm_id): metadata.pool for metadata in held})


async def assert_drives_are_safe(agent: Agent, domains: tuple[Domain, ...]) -> None:
    """Each has the data of one VM at most, and of none once nobody has it; none is lost."""
    await agent.context.drives.idle()
    holders = {drive: domain for domain in domains for drive in domain.host_devices}
    assert len(holders) == sum(len(domain.host_devices) for domain in domains), "a drive has two owners"
    for address, state in agent.context.ledger.drives().items():
        drive, holder = agent.hypervisor.drives[address], holders.get(address)
        assert state is (DriveState.FREE if holder is None else DriveState.HELD)
        assert set(drive.writers) <= ({holder.vm_id} if holder is not None else set()), "another VM's data"
        at_home = holder is None or holder.state in (VmState.STOPPED, VmState.CRASHED)
        assert (drive.driver == HOST_DRIVER) == at_home


def _next_starts(settings: Settings) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each domain's definition for its next start, also where nothing points there, and what its metadata says."""
    file = settings.storage.fake_hypervisor
    records = json.loads(file.read_bytes()) if file.exists() else []
    return [(record["next"], record["metadata"]) for record in records if record["next"] is not None]


def _cores(domain: Domain, core_of_cpu: Mapping[int, Any]) -> set[tuple[int, ...]]:
    """All that its metadata says it holds and all that it is pinned to."""
    pins = [*domain.pins, *(domain.metadata.pins if domain.metadata is not None else ())]
    return {core_of_cpu[pin.pcpu].cpus for pin in pins}


def assert_only_owned_files(settings: Settings, pools: Mapping[str, str]) -> None:
    """`pools` are those of the VMs' disks, by the VMs' ids."""
    tree = read_tree(settings.storage.state_dir)
    known = {JOURNAL, "fake-hypervisor.json", "images", "vms", "pools"}
    known |= {"drives", "fake-nvme.json", ".fake-nvme.json.partial"}
    loose = {name for name in tree if "/" not in name} - known
    # The lab's hypervisor writes its own state aside first: an agent killed there leaves that one name.
    assert {name for name in loose if not name.startswith(".fake-hypervisor.json.")} == set()
    of_vms = {name for name in tree if name.startswith(("vms/", "pools/fast/"))}
    places = {vm_id: f"pools/{pool}" if pool else "vms" for vm_id, pool in pools.items()}
    disks = {f"{place}/{vm_id}{part}" for vm_id, place in places.items() for part in ("", "/root.qcow2")}
    assert of_vms == disks | {f"vms/{vm_id}{part}" for vm_id in pools for part in ("", "/seed.iso")}
    images = {name for name in tree if name.startswith("images/")}
    assert all(name.endswith((".raw", ".qcow2", ".verified")) and "/." not in name for name in images), images


# --- the enumeration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Before:
    """What nobody asked to have changed."""

    request: Request
    domains: Mapping[UUID, Domain]
    files: Tree

    def untouched(self) -> set[UUID]:
        return set(self.domains) - _vm_ids(self.request(0))


def crash_everywhere(scenario: Scenario) -> CrashPoints:
    """Runs the action, then what follows a crash at each of its points, and of each recovery's own points.

    An assertion that fails says after a crash at which.
    """
    before, found = asyncio.run(_recorded(scenario))
    state_dir = scenario.settings.storage.state_dir
    outer, known = found.distinct(), {_mark(point.state) for point in found.points}
    for point in outer:
        with _told(point):
            lay_down(state_dir, point.state)
            again = asyncio.run(_recover_and_repeat(scenario, before))
            found.recoveries += 1
            for inner in again.distinct():
                if _mark(inner.state) in known:
                    continue
                known.add(_mark(inner.state))
                with _told(inner):
                    lay_down(state_dir, inner.state)
                    asyncio.run(_recover_and_repeat(scenario, before))
                    found.recoveries += 1
    return found


@contextmanager
def _told(point: CrashPoint) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"after a crash at point {point}")
        raise


async def _recorded(scenario: Scenario) -> tuple[_Before, CrashPoints]:
    async with open_agent(scenario.settings) as agent:
        request = await scenario.prepare(agent)
        domains = {domain.vm_id: domain for domain in await agent.hypervisor.domains()}
        before = _Before(request, domains, read_tree(scenario.settings.storage.state_dir))
        watch = _Watch(agent)
        results = await agent.run(request(1))
        await agent.context.drives.idle()
        found = watch.so_far()
        assert [result.problem for result in results] == [None] * len(results)
        await agent.actions.settle()
        await assert_nothing_leaked(agent)
        await scenario.done(agent)
    return before, found


async def _recover_and_repeat(scenario: Scenario, before: _Before) -> CrashPoints:
    state_dir = scenario.settings.storage.state_dir
    async with open_agent(scenario.settings) as agent:
        watch = _Watch(agent)
        await recover(agent.context)
        await agent.context.drives.idle()
        inner = watch.so_far()
        await _assert_recovered(scenario, before, agent)
    once = read_tree(state_dir)
    async with open_agent(scenario.settings) as agent:
        await recover(agent.context)
        await _assert_recovered(scenario, before, agent)
        twice = read_tree(state_dir)
        assert {**twice, JOURNAL: b""} == {**once, JOURNAL: b""}, "a second recovery changes nothing"
        assert journal_records(twice) == journal_records(once)
        results = await agent.run(before.request(2))
        assert [result.problem for result in results] == [None] * len(results)
        await agent.actions.settle()
        await assert_nothing_leaked(agent)
        await _assert_untouched(before, agent)
        await scenario.done(agent)
        everyone = [domain.vm_id for domain in await agent.hypervisor.domains()]
        if everyone:
            await agent.delete(*everyone, operation="the-end")
        assert await agent.left_behind() == NOTHING
    return inner


async def _assert_recovered(scenario: Scenario, before: _Before, agent: Agent) -> None:
    await assert_nothing_leaked(agent)
    await _assert_untouched(before, agent)
    await scenario.recovered(agent)


async def _assert_untouched(before: _Before, agent: Agent) -> None:
    now = {domain.vm_id: domain for domain in await agent.hypervisor.domains()}
    files = read_tree(agent.settings.storage.state_dir)
    for vm_id in before.untouched():
        assert now[vm_id] == before.domains[vm_id]
        assert _of(files, vm_id) == _of(before.files, vm_id) != {}


def _of(files: Tree, vm_id: UUID) -> Tree:
    return {name: content for name, content in files.items() if str(vm_id) in name.split("/")}


def _vm_ids(request: WriteCall) -> set[UUID]:
    if isinstance(request, CreateVms):
        return {vm.vm_id for vm in request.vms}
    if isinstance(request, ResizeVms):
        return {size.vm_id for size in request.sizes}
    if isinstance(request, RetuneHost):
        return {move.vm_id for move in request.plan.moves}
    return set(getattr(request, "vm_ids", ()))
