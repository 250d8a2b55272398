# SPDX-License-Identifier: Apache-2.0
"""Through the whole API: after an operation its VMs are seen as it left them, whatever report is on its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ppec_contract.host import HostReport, ReportEnvelope
from ppec_contract.vm import VmInfo, VmState
from ppec_orchestrator.api.services import Services, make_services
from ppec_orchestrator.roles import Role
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.clock import utc_now


@pytest.fixture
def services(world: Any, tmp_path: Path) -> Services:
    """With an engine, on the simulated hosts' database; `client_as` and `host_client` are of this API."""
    made = make_services(Settings(state_dir=tmp_path / "state"), world.database)
    return dataclasses.replace(made, operations=world.replica())


@pytest.fixture
def operator(client_as: Callable[[Role], TestClient]) -> TestClient:
    return client_as(Role.OPERATOR)


@pytest.fixture
def clock() -> Callable[[], Any]:
    return utc_now


class Host:
    """Reports as the host's agent would, beside what the simulated fleet answers."""

    def __init__(self, world: Any, name: str, client: TestClient) -> None:
        self.fleet = world.fleet
        self.name = name
        self.client = client
        self.sequence = 0

    def snapshot(self, **states: VmState) -> ReportEnvelope:
        """What the host sees now, with another state of the VMs named: begun now, and sent whenever."""
        moment = self.fleet.moment()
        self.sequence += 1
        return ReportEnvelope(
            agent_started_at_unix_ms=moment.agent_started_at_unix_ms,
            sequence=self.sequence,
            snapshot_tick=moment.tick,
            report=report_of(self.name, [seen(vm, states) for vm in self.fleet.vms[self.name].values()]),
        )

    def send(self, envelope: ReportEnvelope) -> None:
        answer = self.client.put(f"/v1/hosts/{self.name}/report", json=envelope.model_dump(mode="json"))
        assert answer.status_code == 200, answer.text


def seen(vm: VmInfo, states: dict[str, VmState]) -> VmInfo:
    return vm.model_copy(update={"state": states.get(vm.name, vm.state)})


def report_of(host: str, vms: list[VmInfo]) -> HostReport:
    return HostReport(
        host=host, boot_id="b", agent_version="1", api_version=1, capabilities=(), architecture="x86_64",
        domain_type="fake", libvirt_version="", qemu_version="", kernel_version="", cells=(), disk_mib=400_000,
        disk_free_mib=400_000, bridges=("br0",), vms=tuple(vms),
    )  # fmt: skip


def test_a_report_from_before_an_operation_does_not_turn_its_vm_back(
    world: Any, operator: TestClient, host_client: Callable[[str], TestClient]
) -> None:
    h1 = Host(world, "h1", host_client("h1"))

    def act(action: str) -> None:
        accepted = operator.post("/v1/vms/actions", json={"action": action, "vms": ["pet"]})
        assert world.ended(accepted.json()["operation_id"]).state == "succeeded"

    def observed() -> str:
        return str(operator.get("/v1/vms/pet").json()["observed"])

    before = h1.snapshot()
    created = operator.post("/v1/vms", json={"flavor": "small", "image": "debian", "name": "pet", "host": "h1"})
    assert world.ended(created.json()["operation_id"]).state == "succeeded"
    h1.send(before)
    assert observed() == "running"

    running = h1.snapshot()
    act("stop")
    h1.send(running)
    assert observed() == "stopped"

    stopped = h1.snapshot()
    act("start")
    h1.send(stopped)
    assert observed() == "running"

    h1.send(h1.snapshot(pet=VmState.CRASHED))
    assert observed() == "crashed"
    act("start")
    assert observed() == "running"
    # The picture of before, seen once more after the answer.
    h1.send(h1.snapshot(pet=VmState.CRASHED))
    assert observed() == "crashed"
