# SPDX-License-Identifier: Apache-2.0
"""Storage pools: a VM's disk lies, counts, fails and ends in the pool that it asked for, nothing of it elsewhere."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from ppec_agentd.actions.create import came_back
from ppec_agentd.files import write_whole
from ppec_agentd.health_watch import HealthWatch
from ppec_agentd.journal import Key
from ppec_agentd.recovery import recover
from ppec_agentd.report import ReportSource
from ppec_agentd.settings import Settings
from ppec_contract.agent import StopVms
from ppec_contract.errors import PpecError
from ppec_contract.host import DriftKind, HostReport, PoolReport
from ppec_contract.vm import VmInfo

MIB = 1024 * 1024
OWN_FILES = ("root.qcow2", "seed.iso")


@pytest.fixture
def settings(words: Any, short_dir: Path) -> Settings:
    made: Settings = words.settings_with_pool(short_dir)
    return made


def fast(settings: Settings) -> Path:
    return settings.storage.pools["fast"].path


def codes(results: Any) -> list[str]:
    return [result.problem.code if result.problem else "" for result in results]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def remount(path: Path, how: Literal["ro", "rw"]) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(path)], check=True, timeout=30)


def left_in_pool(logs: Any) -> list[tuple[str, str]]:
    return [(line["vm_id"], line["why"]) for line in logs if line["event"] == "disk_left_in_pool"]


async def report_of(agent: Any) -> HostReport:
    return await ReportSource("h1", agent.context).build()


def test_only_the_disk_goes_to_the_pool_and_counts_there(settings: Settings, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one, other = vm(pool="fast"), vm()
            assert codes(await agent.create(one, other)) == ["", ""]
            assert files(fast(settings)) == [str(one.vm_id), f"{one.vm_id}/root.qcow2"]
            assert files(settings.storage.vms / str(one.vm_id)) == ["seed.iso"]
            assert files(settings.storage.vms / str(other.vm_id)) == ["root.qcow2", "seed.iso"]
            assert (fast(settings) / str(one.vm_id)).stat().st_mode & 0o777 == 0o711
            domain = await agent.hypervisor.domain(one.vm_id)
            assert domain.disks[0].path == f"{fast(settings)}/{one.vm_id}/root.qcow2"
            report = await report_of(agent)
            assert report.pools == (PoolReport(name="fast", size_mib=1000, free_mib=984),)
            assert (report.disk_mib - report.disk_free_mib, report.drift) == (16, ())
            assert {info.vm_id: info.pool for info in report.vms} == {one.vm_id: "fast", other.vm_id: ""}
            assert "storage-pools" in report.capabilities
            assert codes(await agent.delete(one.vm_id, other.vm_id, operation="op-2")) == ["", ""]
            assert await agent.left_behind() == words.nothing
            assert files(fast(settings)) == files(settings.storage.vms) == []

    asyncio.run(scenario())


def test_the_answer_says_what_the_next_look_does(settings: Settings, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            (made,) = await agent.create(vm(pool="fast"))
            (seen,) = (await report_of(agent)).vms
            assert isinstance(made.vm, VmInfo)
            assert made.vm == seen

    asyncio.run(scenario())


def test_a_pool_that_the_host_has_not_is_refused_by_name(settings: Settings, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            (refused,) = await agent.create(vm(name="web", pool="slow"))
            assert refused.problem.code == "host.pool_missing"
            assert refused.problem.detail == "vm web: wanted storage pool slow, found fast"
            assert refused.problem.details == {"missing": ["slow"], "found": ["fast"]}
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


@pytest.mark.parametrize("state", ["missing", "no-folder", "not-mounted"])
def test_a_pool_that_cannot_be_used_is_refused_and_never_made(words: Any, vm: Any, short_dir: Path, state: str) -> None:
    settings = words.settings_with_pool(short_dir)
    if state == "not-mounted":
        pools = {"fast": {"path": str(fast(settings)), "mounted": True}}
        settings = words.settings_of(short_dir, storage={"pools": pools})
    else:
        fast(settings).rmdir()
    if state == "no-folder":
        fast(settings).write_text("")

    async def scenario() -> None:
        with capture_logs() as logs:
            async with words.open_agent(settings) as agent:
                refused, good = await agent.create(vm(pool="fast"), vm())
                assert codes([refused, good]) == ["host.pool_missing", ""]
                assert "storage pool fast can't be used: " in refused.problem.detail
                assert (await report_of(agent)).pools == (PoolReport(name="fast", size_mib=0, free_mib=0),)
                assert (await agent.left_behind())["folders"] == [str(good.vm.vm_id)]
        assert [line["pool"] for line in logs if line["event"] == "pool_unusable"] == ["fast"]
        assert files(short_dir / "state" / "pools") == ([] if state == "missing" else ["fast"])

    asyncio.run(scenario())


def test_a_full_pool_refuses_with_its_figures_and_the_own_place_does_not(
    settings: Settings, words: Any, vm: Callable[..., Any]
) -> None:
    def of_size(size_mib: int, pool: str | None) -> Any:
        spec = vm()
        return spec.model_copy(update={"root_disk": replace_size(spec.root_disk, size_mib, pool)})

    def replace_size(disk: Any, size_mib: int, pool: str | None) -> Any:
        return disk.model_copy(update={"size_mib": size_mib, "pool": pool})

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            assert codes(await agent.create(of_size(900, "fast"))) == [""]
            (refused,) = await agent.create(of_size(101, "fast"), operation="op-2")
            assert refused.problem.code == "host.no_capacity"
            assert refused.problem.details == {"resource": "pool_fast_mib", "wanted": 101, "free": 100}
            assert codes(await agent.create(of_size(101, None), operation="op-3")) == [""]
            assert codes(await agent.create(of_size(100, "fast"), operation="op-4")) == [""]

    asyncio.run(scenario())


@pytest.mark.parametrize("step", ["domain", "define", "start", "disk"])
def test_a_create_that_fails_at_any_step_leaves_nothing_in_the_pool(
    settings: Settings, words: Any, vm: Any, step: str
) -> None:
    class FullDisk:
        async def make_overlay(self, path: Path, image: object, size_mib: int) -> None:
            await asyncio.to_thread(write_whole, path, b"half a disk")
            raise PpecError("disk.full", "no room")

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            if step == "disk":
                agent.context.disks = FullDisk()
            else:
                agent.hypervisor.faults.fail(step, PpecError("hypervisor.failed", "said no"))
            (failed,) = await agent.create(vm(pool="fast"))
            assert failed.problem is not None
            assert await agent.left_behind() == words.nothing
            assert files(fast(settings)) == []

    asyncio.run(scenario())


def test_the_books_are_rebuilt_after_a_restart(settings: Settings, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.create(vm(pool="fast"), vm())
            before = await agent.left_behind()
            assert (before["pools_mib"], before["disk_mib"]) == (16, 16)
        async with words.open_agent(settings) as agent:
            await recover(agent.context)
            after = await agent.left_behind()
            assert sorted(after.pop("held")) == sorted(before.pop("held"))
            assert after == before

    asyncio.run(scenario())


def test_a_pool_that_is_gone_is_said_and_its_vms_go_on(words: Any, vm: Any, short_dir: Path) -> None:
    """Its settings come back later: then the disk of the VM that was deleted meanwhile goes, and the other's stays."""
    with_pool, without = words.settings_with_pool(short_dir), words.settings_of(short_dir)
    kept, deleted = vm(name="kept", pool="fast"), vm(name="deleted", pool="fast")

    async def scenario() -> None:
        async with words.open_agent(with_pool) as agent:
            await agent.create(kept, deleted)
        async with words.open_agent(without) as agent:
            with capture_logs() as logs:
                recovered = await recover(agent.context)
                assert recovered.adopted == 2
                report = await report_of(agent)
                assert report.pools == ()
                assert {info.name: info.pool for info in report.vms} == {"kept": "fast", "deleted": "fast"}
                assert {(d.kind.value, d.name, d.before) for d in report.drift} == {
                    ("disks", "kept", "in storage pool fast"),
                    ("disks", "deleted", "in storage pool fast"),
                }
                assert agent.context.ledger.totals().free["pool_fast_mib"] == -32
                assert codes(await agent.create(vm(pool="fast"), operation="op-2")) == ["host.pool_missing"]
                assert codes(await agent.delete(deleted.vm_id, operation="op-3")) == [""]
            said = [(line["event"], line.get("vm"), line.get("pool")) for line in logs]
            assert {line for line in said if "pool" in line[0]} == {
                ("pool_gone", "kept", "fast"),
                ("pool_gone", "deleted", "fast"),
                ("disk_left_in_pool", "deleted", "fast"),
            }
            assert agent.context.ledger.totals().free["pool_fast_mib"] == -16
        async with words.open_agent(with_pool) as agent:
            recovered = await recover(agent.context)
            assert recovered.folders_removed == (str(deleted.vm_id),)
            assert files(fast(with_pool)) == [str(kept.vm_id), f"{kept.vm_id}/root.qcow2"]
            assert (await report_of(agent)).drift == ()
            assert (await agent.left_behind())["pools_mib"] == 16

    asyncio.run(scenario())


def with_pool_at(words: Any, short_dir: Path, path: Path) -> Settings:
    made: Settings = words.settings_of(short_dir, storage={"pools": {"fast": {"path": str(path), "disk_mib": 1000}}})
    return made


def test_a_pool_that_fails_in_a_create_keeps_its_folder_until_it_can_be_written(
    words: Any, vm: Any, short_dir: Path, mounted: Path
) -> None:
    class FailingDisk:
        async def make_overlay(self, path: Path, image: object, size_mib: int) -> None:
            await asyncio.to_thread(write_whole, path, b"half a disk")
            await asyncio.to_thread(remount, mounted, "ro")
            raise PpecError("vm.create_failed", "the drive failed")

    settings, one = with_pool_at(words, short_dir, mounted), vm(pool="fast")

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            agent.context.disks = FailingDisk()
            with capture_logs() as logs:
                (failed,) = await agent.create(one)
            assert (failed.problem.code, failed.problem.details) == ("vm.create_failed", {})
            assert [vm_id for vm_id, why in left_in_pool(logs) if "Read-only" in why] == [str(one.vm_id)]
            # Nothing is held for it, and the own place has nothing.
            assert await agent.left_behind() == words.nothing | {"folders": [str(one.vm_id)]}
            assert files(settings.storage.vms) == []
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).folders_removed == ()
        await asyncio.to_thread(remount, mounted, "rw")
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).folders_removed == (str(one.vm_id),)
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())


@pytest.mark.parametrize("action", ["CreateVms", "DeleteVms"])
def test_a_pool_that_is_read_only_keeps_no_recovery_from_ending(
    words: Any, vm: Any, short_dir: Path, mounted: Path, action: Literal["CreateVms", "DeleteVms"]
) -> None:
    """The agent was killed in a create that had made files, or in a delete that had removed the domain alone."""
    settings, one, kept = with_pool_at(words, short_dir, mounted), vm(name="one", pool="fast"), vm(name="kept")
    key = Key("op-2", action, str(one.vm_id))

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            assert codes(await agent.create(one, kept)) == ["", ""]
            await agent.run(StopVms(operation_id="op-3", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
            await agent.hypervisor.undefine(one.vm_id)
            agent.context.journal.append_intents("op-2", 1, [(key, "one")])
        await asyncio.to_thread(remount, mounted, "ro")
        async with words.open_agent(settings) as agent:
            recovered = await recover(agent.context)
            assert (recovered.finished or recovered.undone) == (str(one.vm_id),)
            assert agent.context.journal.in_flight() == ()
            assert [held.name for held in agent.context.ledger.holdings()] == ["kept"]
            assert files(settings.storage.vms) == [str(kept.vm_id), *(f"{kept.vm_id}/{f}" for f in OWN_FILES)]
            assert files(mounted) == [str(one.vm_id), f"{one.vm_id}/root.qcow2"]
        await asyncio.to_thread(remount, mounted, "rw")
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).folders_removed == (str(one.vm_id),)
            assert files(mounted) == []

    asyncio.run(scenario())


def test_a_vm_in_a_read_only_pool_can_be_deleted(words: Any, vm: Any, short_dir: Path, mounted: Path) -> None:
    settings, one = with_pool_at(words, short_dir, mounted), vm(pool="fast")

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            assert codes(await agent.create(one)) == [""]
            await asyncio.to_thread(remount, mounted, "ro")
            with capture_logs() as logs:
                assert codes(await agent.delete(one.vm_id, operation="op-2")) == [""]
            assert [vm_id for vm_id, why in left_in_pool(logs) if "Read-only" in why] == [str(one.vm_id)]
            assert await agent.left_behind() == words.nothing | {"folders": [str(one.vm_id)]}
        await asyncio.to_thread(remount, mounted, "rw")
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).folders_removed == (str(one.vm_id),)

    asyncio.run(scenario())


def test_one_folder_that_will_not_go_keeps_no_other(settings: Settings, words: Any, vm: Any, file_system: Any) -> None:
    first, second = sorted((vm(pool="fast"), vm(pool="fast")), key=lambda spec: str(spec.vm_id))

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.create(first, second)
            await agent.delete(first.vm_id, second.vm_id, operation="op-2")
        for spec in (first, second):
            (settings.storage.vms / str(spec.vm_id)).mkdir()
        # What something is mounted at can't be removed.
        with file_system(settings.storage.vms / str(first.vm_id)):
            async with words.open_agent(settings) as agent:
                with capture_logs() as logs:
                    assert (await recover(agent.context)).folders_removed == (str(second.vm_id),)
                assert [line["vm_id"] for line in logs if line["event"] == "folder_left"] == [str(first.vm_id)]
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).folders_removed == (str(first.vm_id),)

    asyncio.run(scenario())


def test_a_disk_that_was_not_in_its_pool_when_the_vm_was_deleted_is_said(
    settings: Settings, words: Any, vm: Any
) -> None:
    """As when the pool's file system isn't mounted, and its settings don't ask for one."""

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one, other = vm(name="one", pool="fast"), vm(name="other", pool="fast")
            await agent.create(one, other)
            folder = fast(settings) / str(one.vm_id)
            shutil.move(folder, fast(settings).parent)
            with capture_logs() as logs:
                assert codes(await agent.delete(one.vm_id, other.vm_id, operation="op-2")) == ["", ""]
            assert left_in_pool(logs) == [(str(one.vm_id), f"{folder} is not there")]
        shutil.move(fast(settings).parent / str(one.vm_id), fast(settings))
        async with words.open_agent(settings) as agent:
            assert (await recover(agent.context)).folders_removed == (str(one.vm_id),)

    asyncio.run(scenario())


def test_disks_of_vms_are_no_orphans_in_a_pool_that_was_renamed(words: Any, vm: Any, short_dir: Path) -> None:
    before = words.settings_with_pool(short_dir)
    after = words.settings_of(short_dir, storage={"pools": {"quick": {"path": str(fast(before))}}})

    async def scenario() -> None:
        async with words.open_agent(before) as agent:
            await agent.create(vm(name="web", pool="fast"))
        async with words.open_agent(after) as agent:
            await recover(agent.context)
            report = await report_of(agent)
            assert [(d.kind, d.name) for d in report.drift] == [(DriftKind.DISKS, "web")]

    asyncio.run(scenario())


def test_orphans_in_a_pool_are_named_and_what_is_no_vms_is_not(settings: Settings, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        stray = fast(settings) / str(UUID(int=5))
        for folder in (stray, fast(settings) / "lost+found", fast(settings) / UUID(int=6).hex):
            folder.mkdir()
        async with words.open_agent(settings) as agent:
            with capture_logs() as logs:
                recovered = await recover(agent.context)
            assert recovered.folders_removed == ()
            assert [line["path"] for line in logs if line["event"] == "folder_without_domain"] == [str(stray)]
            (drift,) = (await report_of(agent)).drift
            assert (drift.kind, drift.vm_id, drift.after) == ("orphaned_disk", UUID(int=5), str(stray))
            assert stray.is_dir()

    asyncio.run(scenario())


def test_a_domain_removed_by_hand_says_whether_its_disk_is_there(settings: Settings, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm(pool="fast")
            await agent.create(one)
            await agent.run(StopVms(operation_id="op-2", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
            source = ReportSource("h1", agent.context)
            await source.build()
            await agent.hypervisor.undefine(one.vm_id)
            assert [d.after for d in (await source.build()).drift] == ["its disk is there"]
            # Its seed is left, in the own place.
            shutil.rmtree(fast(settings) / str(one.vm_id))
            assert [d.after for d in (await source.build()).drift] == ["its disk is gone"]

    asyncio.run(scenario())


def test_a_definition_that_comes_late_is_left_alone_if_its_disk_is_in_a_pool(
    settings: Settings, words: Any, vm: Any
) -> None:
    """A VM was deleted, and somebody brings its disk and its definition back."""

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm(pool="fast")
            await agent.create(one)
            await agent.run(StopVms(operation_id="op-2", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
            domain = await agent.hypervisor.domain(one.vm_id)
            await agent.delete(one.vm_id, operation="op-3")
            assert await came_back(agent.context, domain)
            (fast(settings) / str(one.vm_id)).mkdir()
            assert not await came_back(agent.context, domain)

    asyncio.run(scenario())


def test_a_pool_that_fails_while_the_agent_runs_is_an_error_of_the_hosts_health(settings: Settings, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            watch = HealthWatch(agent.hypervisor, agent.context.places, settings.storage.images)

            def said() -> list[tuple[str, str]]:
                return [(f.level.value, f.found) for f in watch.findings if f.check == "storage-pool fast"]

            await watch.look()
            assert said() == [("ok", "can be used")]
            fast(settings).rmdir()
            await watch.look()
            assert said() == [("error", f"{fast(settings)}: No such file or directory")]

    asyncio.run(scenario())
