# SPDX-License-Identifier: Apache-2.0
"""What the fake adds to the port: faults on order, a state file, and accidents."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from uuid import uuid4

import pytest

from ppec_agentd.fake_hypervisor import FakeHypervisor, FakeOptions, FaultPlan
from ppec_agentd.hypervisor import DomainDefinition, DomainMetadata
from ppec_agentd.topology import declare_topology
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState

pytestmark = pytest.mark.anyio
TOPOLOGY = declare_topology("cores=4")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def guest(name: str = "web-1") -> DomainDefinition:
    pins = (VcpuPin(vcpu=0, pcpu=1), VcpuPin(vcpu=1, pcpu=2))
    return DomainDefinition(DomainMetadata(uuid4(), name, "op-1", (0,), 2, 64, 1, "ab" * 32, pins))


async def opened(**options: object) -> FakeHypervisor:
    fake = FakeHypervisor(FakeOptions(TOPOLOGY, **options))  # type: ignore[arg-type]
    await fake.open()
    return fake


async def test_an_obedient_guest_powers_off() -> None:
    fake, web = await opened(), guest()
    await fake.define(web)
    await fake.start(web.metadata.vm_id)
    assert await fake.shutdown(web.metadata.vm_id) is True
    assert await fake.wait_state(web.metadata.vm_id, VmState.STOPPED, 10) is True


async def test_the_nth_call_fails_and_changes_nothing() -> None:
    fake = await opened()
    fake.faults.fail("define", PpecError("hypervisor.failed", "as planned"), nth=2)
    assert await fake.define(guest("a")) is True
    with pytest.raises(PpecError, match="as planned"):
        await fake.define(guest("b"))
    assert await fake.define(guest("c")) is True
    assert sorted(domain.name for domain in await fake.domains()) == ["a", "c"]
    assert fake.faults.calls("define") == 3


async def test_a_lost_answer_has_taken_effect() -> None:
    fake, web = await opened(), guest()
    await fake.define(web)
    fake.faults.fail("start", PpecError("hypervisor.unavailable", "lost"), after=True)
    with pytest.raises(PpecError, match="lost"):
        await fake.start(web.metadata.vm_id)
    assert await fake.start(web.metadata.vm_id) is False


async def test_a_call_that_hangs_takes_effect_late() -> None:
    fake, web = await opened(), guest()
    vm_id = web.metadata.vm_id
    released = fake.faults.hang("define")
    with pytest.raises(PpecError) as missed:
        await fake.define(web)
    assert missed.value.code == "hypervisor.unavailable"
    assert fake.lingers(vm_id)
    assert await fake.domain(vm_id) is None
    released.set()
    await fake.wait_until_none_lingers()
    assert not fake.lingers(vm_id)
    assert await fake.domain(vm_id) is not None
    assert await fake.start(vm_id) is True


async def test_a_delayed_call_lets_others_pass() -> None:
    fake = await opened(delays_s={"define": 3600})
    slow = asyncio.create_task(fake.define(guest()))
    await asyncio.sleep(0)
    assert await fake.domains() == ()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert await fake.domains() == ()


async def test_a_crash_is_a_state() -> None:
    fake, web = await opened(), guest()
    await fake.define(web)
    await fake.start(web.metadata.vm_id)
    fake.crash(web.metadata.vm_id)
    domain = await fake.domain(web.metadata.vm_id)
    assert domain is not None
    assert domain.state is VmState.CRASHED
    assert await fake.start(web.metadata.vm_id) is True


async def test_every_change_is_in_the_state_file_when_the_call_returns(tmp_path: Path) -> None:
    """So a kill at any moment loses nothing: another process reads what this one was told is done."""
    state_file = tmp_path / "domains.json"
    fake, web = await opened(state_file=state_file), guest()

    def states() -> list[str]:
        return [domain["state"] for domain in json.loads(state_file.read_text())]

    await fake.define(web)
    assert states() == ["stopped"]
    await fake.start(web.metadata.vm_id)
    assert states() == ["running"]
    another = await opened(state_file=state_file)
    assert await another.domains() == await fake.domains()
    await fake.destroy(web.metadata.vm_id)
    await fake.undefine(web.metadata.vm_id)
    assert states() == []
    assert os.listdir(tmp_path) == ["domains.json"], "no partial file is left"  # noqa: PTH208


async def test_a_method_may_fail_every_so_often() -> None:
    plan = FaultPlan(fail_every={"start": 3})
    outcomes = []
    for _ in range(7):
        try:
            (await plan.begin("start"))()
        except PpecError as error:
            outcomes.append(error.code)
        else:
            outcomes.append("ok")
    assert outcomes == ["ok", "ok", "hypervisor.failed", "ok", "ok", "hypervisor.failed", "ok"]
