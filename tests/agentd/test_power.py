# SPDX-License-Identifier: Apache-2.0
"""Reboot, reset, pause and resume on the fake hypervisor: what they change, what refuses them, what a crash leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ppec_agentd.hypervisor import Domain, EventKind
from ppec_contract.agent import PauseVms, RebootVms, ResetVms, ResumeVms, Stage, StopVms, WriteCall
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

SOON_S = 60
SWITCHES = [RebootVms, ResetVms, PauseVms, ResumeVms]
METHOD = {RebootVms: "reboot", ResetVms: "reset", PauseVms: "pause", ResumeVms: "resume"}


def call(kind: type[WriteCall], *vms: Any, operation: str = "op-2", **more: Any) -> WriteCall:
    document = {"operation_id": operation, "fence": 1, "vm_ids": [vm.vm_id for vm in vms], **more}
    return kind.model_validate(document)


def codes(results: Any) -> list[str]:
    return [result.problem.code if result.problem else "" for result in results]


def reboots(agent: Any) -> list[Any]:
    heard: list[Any] = []
    agent.hypervisor.on_event(lambda event: heard.append(event.vm_id) if event.kind is EventKind.REBOOTED else None)
    return heard


def test_each_switch_changes_what_it_says_once(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one, two = vm(), vm()
            await agent.create(one, two)
            heard = reboots(agent)
            for kind, state, stage in (
                (RebootVms, VmState.RUNNING, Stage.REBOOT),
                (ResetVms, VmState.RUNNING, Stage.RESET),
                (PauseVms, VmState.PAUSED, Stage.PAUSE),
                (ResumeVms, VmState.RUNNING, Stage.RESUME),
            ):
                results = await agent.run(call(kind, one, two, operation=kind.__name__.lower()))
                assert codes(results) == ["", ""]
                assert [(r.changed, r.vm.state, set(r.stage_ms)) for r in results] == [(True, state, {stage})] * 2
                replayed = await agent.run(call(kind, one, two, operation=kind.__name__.lower()))
                assert [r.replayed for r in replayed] == [True] * 2
            assert sorted(heard) == sorted([one.vm_id, two.vm_id] * 2)
            for kind in (PauseVms, PauseVms, ResumeVms, ResumeVms):
                await agent.run(call(kind, one, operation=f"again-{len(agent.emitted)}"))
            (again,) = await agent.run(call(ResumeVms, one, operation="last"))
            assert not again.changed

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", SWITCHES)
def test_what_is_off_absent_or_foreign_is_refused(settings: Any, words: Any, vm: Any, kind: type[WriteCall]) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            off, absent, foreign = vm(), vm(), vm()
            await agent.create(off)
            await agent.run(call(StopVms, off, timeout_s=0, force=True))
            agent.hypervisor.make_by_hand(Domain(foreign.vm_id, "pet", VmState.RUNNING, 2, 512))
            results = await agent.run(call(kind, off, absent, foreign, operation="op-3"))
            assert codes(results) == ["vm.wrong_state", "vm.not_found", "vm.wrong_state"]
            assert "is stopped" in results[0].problem.detail
            assert agent.hypervisor.faults.calls(METHOD[kind]) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [RebootVms, ResetVms])
def test_a_paused_guest_begins_nothing_anew(settings: Any, words: Any, vm: Any, kind: type[WriteCall]) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            await agent.run(call(PauseVms, one))
            (result,) = await agent.run(call(kind, one, operation="op-3"))
            assert (codes([result]), result.problem.hint) == (["vm.wrong_state"], "Resume it first.")

    asyncio.run(scenario())


def test_a_guest_that_ignores_a_reboot_is_reset_only_by_force(words: Any, vm: Any, short_dir: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(words.settings_of(short_dir, lab={"deaf_guests": True})) as agent:
            one = vm()
            await agent.create(one)
            heard = reboots(agent)
            (refused,) = await agent.run(call(RebootVms, one, timeout_s=0.1))
            assert codes([refused]) == ["vm.reboot_timeout"]
            assert heard == []
            (forced,) = await agent.run(call(RebootVms, one, operation="op-3", timeout_s=0.1, force=True))
            assert (codes([forced]), forced.changed) == ([""], True)
            assert set(forced.stage_ms) == {Stage.REBOOT, Stage.RESET}
            assert heard == [one.vm_id]

    asyncio.run(scenario())


async def _while_it_is_to_reboot(agent: Any, one: Any, act: Callable[[], Awaitable[object]], force: bool) -> Any:
    """The reboot's result; it would be waited for ten minutes."""
    asked = asyncio.create_task(agent.run(call(RebootVms, one, timeout_s=600, force=force)))
    async with asyncio.timeout(SOON_S):
        while not agent.hypervisor.faults.calls("reboot"):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)
        await act()
        (result,) = await asked
    assert agent.hypervisor.faults.calls("reset") == 0, "there is nothing to reset"
    return result


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("state", [VmState.STOPPED, VmState.CRASHED])
def test_a_guest_that_goes_off_instead_is_told_as_that_and_at_once(
    words: Any, vm: Any, short_dir: Any, state: VmState, force: bool
) -> None:
    async def scenario() -> None:
        async with words.open_agent(words.settings_of(short_dir, lab={"deaf_guests": True})) as agent:
            one = vm()
            await agent.create(one)

            async def goes_off() -> None:
                if state is VmState.CRASHED:
                    agent.hypervisor.crash(one.vm_id)
                await agent.hypervisor.destroy(one.vm_id)

            result = await _while_it_is_to_reboot(agent, one, goes_off, force)
            assert (codes([result]), result.problem.details) == (["vm.went_off"], {"state": state})
            assert state.value in result.problem.detail
            assert not result.problem.error().retryable

    asyncio.run(scenario())


def test_a_guest_that_vanishes_instead_is_not_found(words: Any, vm: Any, short_dir: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(words.settings_of(short_dir, lab={"deaf_guests": True})) as agent:
            one = vm()
            await agent.create(one)

            async def goes() -> None:
                await agent.hypervisor.destroy(one.vm_id)
                await agent.hypervisor.undefine(one.vm_id)

            assert codes([await _while_it_is_to_reboot(agent, one, goes, False)]) == ["vm.not_found"]

    asyncio.run(scenario())


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("code", ["hypervisor.failed", "hypervisor.unavailable"])
@pytest.mark.parametrize("kind", SWITCHES)
def test_a_switch_that_fails_is_told_and_can_be_tried_again(
    settings: Any, words: Any, vm: Any, kind: type[WriteCall], code: str, after: bool
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            if kind is ResumeVms:
                await agent.run(call(PauseVms, one, operation="op-9"))
            for step in ("domain", METHOD[kind]):
                operation = f"op-{step}"
                agent.hypervisor.faults.fail(step, PpecError(code, "said no"), after=after)
                (failed,) = await agent.run(call(kind, one, operation=operation))
                assert (codes([failed]), failed.changed) == ([code], False)
                (again,) = await agent.run(call(kind, one, operation=operation))
                # A failure that may be tried again is tried, and another one is repeated from the journal.
                assert again.replayed == (code == "hypervisor.failed")
            left = await agent.left_behind()
            assert left["domains"] == left["held"] == [one.name]

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", SWITCHES)
def test_killed_in_the_middle_of_a_switch_it_comes_back_and_the_call_can_be_repeated(
    agent_process: Callable[..., Any], vm: Any, kind: type[WriteCall]
) -> None:
    method = METHOD[kind]
    agent = agent_process(lab={"delays_s": {method: 600}}).start()
    one = vm()
    create = {"operation_id": "op-1", "fence": 1, "vms": [one.model_dump(mode="json")]}
    assert agent.client().call("CreateVms", create)["parameters"]["results"][0]["changed"]
    if kind is ResumeVms:
        pause = call(PauseVms, one, operation="op-9").model_dump(mode="json")
        assert agent.client().call("PauseVms", pause)["parameters"]["results"][0]["changed"]
    request = call(kind, one).model_dump(mode="json")
    client = agent.client()
    client.send(f"cloud.ppec.agent.{kind.__name__}", request, more=True)
    assert client.receive()["parameters"]["progress"]["stage"] == method
    agent.kill()
    settings = agent.settings
    agent.write_settings(settings.model_copy(update={"lab": settings.lab.model_copy(update={"delays_s": {}})}))
    agent.start()
    (result,) = agent.client().call(kind.__name__, request)["parameters"]["results"]
    assert (result["problem"], result["changed"], result["replayed"]) == (None, True, False)
    state = "paused" if kind is PauseVms else "running"
    assert [v["state"] for v in agent.client().call("ListVms")["parameters"]["vms"]] == [state]
