# SPDX-License-Identifier: Apache-2.0
"""NVMe drives handed to VMs whole: by VFIO, near their cell, and never with what the VM before left there.

The guest says on its console what it finds on its drive, and leaves its name at both ends (lab/ppec_lab/guest/init).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

import pytest

from ppec_contract.errors import PpecError
from ppec_lab.agent_socket import call_agent
from ppec_lab.bare_metal import BareMetalFleet
from ppec_lab.cloud import Cloud
from ppec_lab.conditions import wait_until
from ppec_lab.guest_process import read_guest_process
from ppec_lab.orchestrator_process import CliError

pytestmark = [pytest.mark.metal, pytest.mark.slow, pytest.mark.timeout(2400)]

Metal = Cloud[BareMetalFleet]
MEMORY_MIB = 256
# As in test_bare_metal.py: nested guests are slow where others use the CPUs outside.
GUEST_TIMEOUT_S = 900
SETTLED_TIMEOUT_S = 300


def run(metal: Metal, *words: str, check: bool = True) -> str:
    return str(metal.fleet.host.run(*words, check=check, timeout_s=360).stdout)


def agent(metal: Metal, method: str, **parameters: Any) -> dict[str, Any]:
    return call_agent(lambda command: run(metal, *command), method, parameters)


def report(metal: Metal) -> dict[str, Any]:
    found: dict[str, Any] = agent(metal, "GetReport")["report"]
    return found


def drives(metal: Metal) -> list[tuple[int, int]]:
    """By cell: how many there are, and how many of them are free."""
    return [(cell["nvme_drives"], cell["nvme_drives_free"]) for cell in report(metal)["cells"]]


def wait_for_drives(metal: Metal, wanted: list[tuple[int, int]]) -> None:
    wait_until(lambda: drives(metal) == wanted, f"drives are {wanted}", timeout_s=SETTLED_TIMEOUT_S, every_s=1)


def driver(metal: Metal, cell: int) -> str:
    path = f"/sys/bus/pci/devices/{address(metal, cell)}/driver"
    return run(metal, "readlink", path, check=False).strip().rpartition("/")[2]


def address(metal: Metal, cell: int) -> str:
    return metal.fleet.shape.nvme_addresses[cell]


def device(metal: Metal, cell: int) -> str:
    """The block device of a drive that is at home."""
    names = run(metal, "ls", f"/sys/bus/pci/devices/{address(metal, cell)}/nvme").split()
    return f"/dev/{names[0]}n1"


def is_empty(metal: Metal, cell: int) -> bool:
    size = metal.fleet.shape.nvme_drive_mib * 1024**2
    return not run(metal, "cmp", f"--bytes={size}", device(metal, cell), "/dev/zero", check=False)


def text_at(metal: Metal, cell: int, sector: int) -> str:
    raw = run(metal, "dd", f"if={device(metal, cell)}", "bs=512", "count=1", f"skip={sector}", "status=none")
    return raw.strip("\0")


def agent_log(metal: Metal) -> list[dict[str, Any]]:
    lines = run(metal, "journalctl", "--unit=ppec-agentd", "--output=cat", "--no-pager").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


class Vm:
    """Made by the machine's agent, without a NIC: its console says all there is to know."""

    def __init__(self, metal: Metal, name: str, cell: int) -> None:
        self.metal, self.name, self.vm_id = metal, name, str(uuid.uuid4())
        image = next(image for image in metal.orchestrator.ppec("image", "list") if image["name"] == "small")
        url = f"{metal.orchestrator.url}/v1/images/{image['sha256']}/content"
        source = {key: image[key] for key in ("name", "sha256", "size_bytes", "format")} | {"url": url}
        self.spec = {
            "vm_id": self.vm_id, "name": name, "vcpus": 2, "memory_mib": MEMORY_MIB, "cells": [cell],
            "root_disk": {"size_mib": 256, "image": source}, "nvme_drives": 1, "nics": [],
        }  # fmt: skip

    def create(self) -> dict[str, Any]:
        return self._act("CreateVms", vms=[self.spec])

    def delete(self) -> None:
        self._act("DeleteVms", vm_ids=[self.vm_id])

    def stop(self) -> None:
        self._act("StopVms", vm_ids=[self.vm_id], timeout_s=0, force=True)

    def start(self) -> None:
        self._act("StartVms", vm_ids=[self.vm_id])

    def found_on_its_drive(self, boots: int = 1) -> str:
        """What its last boot found there, once it has left its own name."""

        def said() -> str | None:
            console = run(self.metal, "cat", f"/var/lib/ppec/vms/{self.vm_id}/console.log")
            found = re.findall(r"ppec-guest nvme nvme0n1 (\d+) bytes holds (.*?)\s*$", console, re.MULTILINE)
            marked = console.count("ppec-guest nvme nvme0n1 marked")
            sizes = {int(size) for size, _ in found}
            assert sizes <= {self.metal.fleet.shape.nvme_drive_mib * 1024**2}
            return str(found[-1][1]) if len(found) == marked == boots else None

        return str(wait_until(said, f"{self.name} has marked its drive", timeout_s=GUEST_TIMEOUT_S, every_s=2))

    def _act(self, method: str, **parameters: Any) -> dict[str, Any]:
        reply = agent(self.metal, method, operation_id=f"op-{uuid.uuid4()}", fence=1, **parameters)
        (result,) = reply["results"]
        if result["problem"] is not None:
            problem = result["problem"]
            raise PpecError(problem["code"], problem["detail"], details=problem.get("details", {}))
        return dict(result)


def virsh(metal: Metal, *words: str) -> None:
    run(metal, "virsh", "--connect", "qemu:///system", *words)


def node(metal: Metal, cell: int) -> str:
    """The drive as libvirt calls it."""
    return "pci_" + address(metal, cell).replace(":", "_").replace(".", "_")


def test_the_drives_of_the_machine_are_free_once_they_were_erased(metal: Metal) -> None:
    wait_for_drives(metal, [(1, 1), (1, 1)])
    assert [driver(metal, cell) for cell in (0, 1)] == ["nvme", "nvme"]
    erased = [line["address"] for line in agent_log(metal) if line["event"] == "drive_erased"]
    assert set(erased) == set(metal.fleet.shape.nvme_addresses)


def test_a_drive_goes_from_vm_to_vm_and_nothing_on_it_does(metal: Metal) -> None:
    first = Vm(metal, "first", cell=1)
    made = first.create()
    assert made["vm"]["nvme_drives"] == [address(metal, 1)]
    assert (driver(metal, 0), driver(metal, 1)) == ("nvme", "vfio-pci")
    assert drives(metal) == [(1, 1), (1, 0)]
    assert first.found_on_its_drive() == "nothing"
    assert report(metal)["drift"] == []
    assert_memory_is_locked_in(metal, "first", cell=1)

    with pytest.raises(PpecError) as refused:
        Vm(metal, "late", cell=1).create()
    assert refused.value.code == "host.no_capacity"
    assert refused.value.details["resource"] == "nvme_drives"

    first.stop()
    last = metal.fleet.shape.nvme_drive_mib * 2048 - 1
    wait_until(lambda: driver(metal, 1) == "nvme", "the drive is at home", timeout_s=60, every_s=0.5)
    assert [text_at(metal, 1, sector) for sector in (0, last)] == ["ppec-guest first."] * 2
    assert drives(metal) == [(1, 1), (1, 0)], "a VM that is off keeps its drive"
    first.start()
    assert first.found_on_its_drive(boots=2).startswith("ppec-guest first.")

    first.delete()
    wait_for_drives(metal, [(1, 1), (1, 1)])
    assert driver(metal, 1) == "nvme"
    assert is_empty(metal, 1)
    assert "drive_not_formatted" not in {line["event"] for line in agent_log(metal)}

    second = Vm(metal, "second", cell=1)
    assert second.create()["vm"]["nvme_drives"] == [address(metal, 1)]
    assert second.found_on_its_drive() == "nothing"
    second.delete()
    wait_for_drives(metal, [(1, 1), (1, 1)])


def assert_memory_is_locked_in(metal: Metal, name: str, cell: int) -> None:
    """VFIO has all of it in place from the start, and libvirt's limit allowed that."""

    def read(command: Sequence[str]) -> str:
        return run(metal, *command)

    found = read_guest_process(read, name)
    assert set(found.memory.kib_by_cell) == {cell}
    assert sum(found.memory.kib_by_cell.values()) == MEMORY_MIB * 1024
    locked = re.search(r"^VmLck:\s+(\d+) kB", run(metal, "cat", f"/proc/{found.pid}/status"), re.MULTILINE)
    assert locked is not None
    assert int(locked[1]) >= MEMORY_MIB * 1024


def test_requests_get_drives_near_their_cells_and_no_more_than_there_are(metal: Metal) -> None:
    """From the request on: the orchestrator counts them, and its plan's cell is where the agent takes them."""
    ppec = metal.orchestrator.ppec
    size = ("--vcpus", "2", "--memory-mib", str(MEMORY_MIB), "--disk-mib", "256", "--nvme-drives", "1")
    ppec("flavor", "create", "driven", *size)
    asked = ("--flavor", "driven", "--image", "small", "--wait")
    ppec("vm", "create", "--name", "driven", "--count", "2", *asked, timeout_s=900)

    def shown() -> list[dict[str, Any]]:
        vms: list[dict[str, Any]] = [ppec("vm", "show", f"driven-{number}") for number in (1, 2)]
        return vms if all(vm["drives"] for vm in vms) else []

    vms = wait_until(shown, "the host has reported the VMs' drives", timeout_s=120, every_s=1)
    assert sorted((*vm["cells"], *vm["drives"]) for vm in vms) == [(0, address(metal, 0)), (1, address(metal, 1))]
    assert drives(metal) == [(1, 0), (1, 0)]
    with pytest.raises(CliError) as refused:
        ppec("vm", "create", "--name", "late", *asked)
    assert "1 host: 1 without enough free NVMe drives" in refused.value.errors
    ppec("vm", "delete", "driven-1", "driven-2", "--wait", timeout_s=600)
    wait_for_drives(metal, [(1, 1), (1, 1)])
    assert [is_empty(metal, cell) for cell in (0, 1)] == [True, True]


def test_a_drive_that_its_vm_left_with_vfio_is_taken_back(metal: Metal) -> None:
    vm = Vm(metal, "leaving", cell=0)
    vm.create()
    assert vm.found_on_its_drive() == "nothing"
    vm.stop()
    wait_until(lambda: driver(metal, 0) == "nvme", "the drive is at home", timeout_s=60, every_s=0.5)
    run(metal, "systemctl", "stop", "ppec-agentd")
    virsh(metal, "nodedev-detach", node(metal, 0))
    assert driver(metal, 0) == "vfio-pci"
    run(metal, "systemctl", "start", "ppec-agentd")
    vm.delete()
    wait_for_drives(metal, [(1, 1), (1, 1)])
    assert driver(metal, 0) == "nvme"
    assert is_empty(metal, 0)


def test_a_drive_that_somebody_took_by_hand_is_left_out_until_it_is_back(metal: Metal) -> None:
    """No VM of the agent's had it: whoever did that has a reason, and perhaps data there."""
    run(metal, "systemctl", "stop", "ppec-agentd")
    virsh(metal, "nodedev-detach", node(metal, 0))
    run(metal, "systemctl", "start", "ppec-agentd")
    wait_for_drives(metal, [(0, 0), (1, 1)])
    why = [line["why"] for line in agent_log(metal) if line["event"] == "drive_left_out"]
    assert "the driver vfio-pci has it" in why[-1]
    assert driver(metal, 0) == "vfio-pci"
    virsh(metal, "nodedev-reattach", node(metal, 0))
    wait_for_drives(metal, [(1, 1), (1, 1)])
    assert driver(metal, 0) == "nvme"


def test_an_agent_killed_while_a_drive_settles_hands_nothing_over_unerased(metal: Metal) -> None:
    vm = Vm(metal, "killed", cell=0)
    vm.create()
    assert vm.found_on_its_drive() == "nothing"
    vm.delete()
    run(metal, "systemctl", "kill", "--signal=KILL", "ppec-agentd")
    run(metal, "systemctl", "start", "ppec-agentd")
    wait_for_drives(metal, [(1, 1), (1, 1)])
    assert is_empty(metal, 0)


def test_a_drive_that_the_host_uses_is_left_out(metal: Metal) -> None:
    """And its data stays until somebody removes it by hand, though the settings name the drive."""
    used = device(metal, 0)
    run(metal, "mkfs.ext4", "-q", used)
    run(metal, "mount", used, "/mnt")
    wait_for_drives(metal, [(0, 0), (1, 1)])
    with pytest.raises(PpecError) as refused:
        Vm(metal, "unlucky", cell=0).create()
    assert (refused.value.code, refused.value.details["resource"]) == ("host.no_capacity", "nvme_drives")
    looked = run(metal, "/opt/ppec/current/bin/ppec-agentd", "doctor", check=False)
    assert f"{used.removeprefix('/dev/')} is mounted on /mnt" in looked
    run(metal, "umount", "/mnt")
    run(metal, "systemctl", "restart", "ppec-agentd")
    assert drives(metal)[0] == (0, 0)
    assert "ext4" in run(metal, "blkid", "--probe", used)
    run(metal, "wipefs", "--all", used)
    wait_for_drives(metal, [(1, 1), (1, 1)])
    assert is_empty(metal, 0)
