# SPDX-License-Identifier: Apache-2.0
"""The whole agent as a process on a real libvirtd: real overlays, real domains, kill -9 in between."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.conditions import wait_until
from ppec_lab.guest_image import guest_image
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd

pytestmark = pytest.mark.libvirt


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateLibvirtd]:
    with private_libvirtd(own_network=True) as running:
        running.run("ip", "link", "add", "br0", "type", "bridge")
        yield running


@pytest.fixture
def agent(agent_process: Callable[..., Any], daemon: PrivateLibvirtd) -> Any:
    # A declared host of eight cores: the machine's own two CPUs would not hold a batch.
    return agent_process(
        hypervisor="libvirt",
        libvirt={"uri": daemon.uri, "domain_type": "qemu", "disk_cache": "writeback"},
        lab={"topology": "sockets=1,cores=8,threads=1,memory_mib=4096"},
    )


def virsh(daemon: PrivateLibvirtd, *words: str) -> str:
    done = subprocess.run(
        ["virsh", "-q", "-c", daemon.uri, *words], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def create(*vms: Any, fence: int = 1) -> dict[str, Any]:
    return {"operation_id": "op-1", "fence": fence, "vms": [vm.model_dump(mode="json") for vm in vms]}


def delete(*vms: Any) -> dict[str, Any]:
    return {"operation_id": "op-2", "fence": 9, "vm_ids": [str(vm.vm_id) for vm in vms]}


def results(reply: dict[str, Any]) -> list[dict[str, Any]]:
    assert "error" not in reply, reply
    found: list[dict[str, Any]] = reply["parameters"]["results"]
    return found


# The bridge is in libvirtd's network namespace, the agent outside it reads its own: these VMs have no NIC.
SMALL = {"memory_mib": 64, "nics": []}


def test_a_batch_lives_and_ends_on_real_libvirt(agent: Any, daemon: PrivateLibvirtd, vm: Any) -> None:
    agent.start()
    vms = [vm(**SMALL) for _ in range(3)]
    made = results(agent.client().call("CreateVms", create(*vms), more=True))
    assert [result["problem"] for result in made] == [None] * 3
    assert sorted(virsh(daemon, "list", "--name").split()) == sorted(v.name for v in vms)
    disk = agent.settings.storage.vms / str(vms[0].vm_id) / "root.qcow2"
    info = subprocess.run(["qemu-img", "info", "-U", str(disk)], check=True, capture_output=True, text=True, timeout=30)
    assert "16 MiB" in info.stdout
    assert f"{agent.settings.storage.images}/" in info.stdout

    # The agent's end is not the VMs'.
    assert agent.end() == 0
    assert len(virsh(daemon, "list", "--name").split()) == 3
    agent.start()
    again = results(agent.client().call("CreateVms", create(*vms)))
    assert [result["replayed"] for result in again] == [True] * 3

    ids = {"vm_ids": [str(vms[0].vm_id)]}
    stop = {"operation_id": "op-3", "fence": 1, "timeout_s": 0, "force": True} | ids
    assert results(agent.client().call("StopVms", stop))[0]["vm"]["state"] == "stopped"
    start = {"operation_id": "op-4", "fence": 1} | ids
    assert results(agent.client().call("StartVms", start))[0]["vm"]["state"] == "running"

    gone = results(agent.client().call("DeleteVms", delete(*vms)))
    assert [(result["changed"], result["problem"]) for result in gone] == [(True, None)] * 3
    assert virsh(daemon, "list", "--all", "--name") == ""
    assert list(agent.settings.storage.vms.iterdir()) == []
    report = agent.client().call("GetReport")["parameters"]["report"]
    assert report["cells"][0]["cores_free"] == 8
    assert report["domain_type"] == "qemu"


def open_files(vm_id: str) -> set[str]:
    """What the QEMU of this VM has open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"-uuid\0{vm_id}\0".encode() in (process / "cmdline").read_bytes():
                found |= {str(link.readlink()) for link in (process / "fd").iterdir()}
    return found


def test_a_disk_in_a_storage_pool(
    agent_process: Callable[..., Any], daemon: PrivateLibvirtd, vm: Any, short_dir: Path
) -> None:
    """QEMU works on that file and no other; a restart of the agent finds it in the books, a delete removes it."""
    pool = short_dir / "fast"
    pool.mkdir(mode=0o711)
    agent = agent_process(
        hypervisor="libvirt",
        storage={"pools": {"fast": {"path": str(pool), "disk_mib": 100}}},
        libvirt={"uri": daemon.uri, "domain_type": "qemu", "disk_cache": "writeback"},
        lab={"topology": "sockets=1,cores=8,threads=1,memory_mib=4096"},
    )
    agent.start()
    one, other = vm(**SMALL, pool="fast"), vm(**SMALL)
    made = results(agent.client().call("CreateVms", create(one, other)))
    assert [(r["problem"], r["vm"]["pool"]) for r in made] == [(None, "fast"), (None, "")]
    in_pool, in_own = pool / str(one.vm_id) / "root.qcow2", agent.settings.storage.vms / str(other.vm_id) / "root.qcow2"
    disks = {str(in_pool), str(in_own)}
    assert open_files(str(one.vm_id)) & disks == {str(in_pool)}
    assert open_files(str(other.vm_id)) & disks == {str(in_own)}
    info = subprocess.run(["qemu-img", "info", "-U", str(in_pool)], check=True, capture_output=True, text=True)
    assert f"{agent.settings.storage.images}/" in info.stdout

    agent.kill()
    agent.start()
    report = agent.client().call("GetReport")["parameters"]["report"]
    assert report["pools"] == [{"name": "fast", "size_mib": 100, "free_mib": 84}]
    assert {vm["vm_id"]: vm["pool"] for vm in report["vms"]} == {str(one.vm_id): "fast", str(other.vm_id): ""}
    assert report.get("drift", []) == []
    refused = results(agent.client().call("CreateVms", create(vm(**SMALL, pool="slow"))))
    assert refused[0]["problem"]["code"] == "host.pool_missing"

    results(agent.client().call("DeleteVms", delete(one, other)))
    assert list(pool.iterdir()) == list(agent.settings.storage.vms.iterdir()) == []
    assert virsh(daemon, "list", "--all", "--name") == ""


def test_each_switch_on_a_real_vm(agent: Any, vm: Any) -> None:
    agent.start()
    one = vm(**SMALL)
    results(agent.client().call("CreateVms", create(one)))
    ids = [str(one.vm_id)]
    # Its disk is empty: it stays in its firmware, which hears no button. Once it was reset, the firmware resets the
    # machine once more by itself, which looks like a reboot: so this comes first.
    ignored = {"operation_id": "op-20", "fence": 1, "vm_ids": ids, "timeout_s": 0.2}
    assert results(agent.client().call("RebootVms", ignored))[0]["problem"]["code"] == "vm.reboot_timeout"
    for number, (method, more, state) in enumerate(
        [
            ("RebootVms", {"timeout_s": 0.5, "force": True}, "running"),
            ("ResetVms", {}, "running"),
            ("PauseVms", {}, "paused"),
            ("ResumeVms", {}, "running"),
        ]
    ):
        request = {"operation_id": f"op-1{number}", "fence": 1, "vm_ids": ids, **more}
        (done,) = results(agent.client().call(method, request))
        assert (done["problem"], done["changed"], done["vm"]["state"]) == (None, True, state), method
    frozen = {"operation_id": "op-21", "fence": 1, "vm_ids": ids}
    assert results(agent.client().call("FreezeVms", frozen))[0]["problem"]["code"] == "guest.agent_unavailable"
    (guest,) = agent.client().call("QueryGuests", {"vm_ids": ids})["parameters"]["guests"]
    assert (guest["agent_connected"], guest["frozen"], guest["problem"]) == (False, False, None)
    reply = agent.client().call("ReadConsole", {"vm_id": ids[0]})
    assert reply["parameters"]["state"] == "running"
    assert agent.client().call("WriteConsole", {"vm_id": ids[0], "data": "DQ=="})["parameters"] == {"written_bytes": 1}
    results(agent.client().call("DeleteVms", delete(one)))


@pytest.mark.parametrize("records", [3, 4], ids=["none-answered", "one-answered"])
def test_killed_in_mid_create_it_finishes_or_undoes(agent: Any, daemon: PrivateLibvirtd, vm: Any, records: int) -> None:
    agent.start()
    vms = [vm(**SMALL) for _ in range(3)]
    ids = {str(v.vm_id) for v in vms}
    agent.client().send("cloud.ppec.agent.CreateVms", create(*vms), more=True)
    journal = agent.settings.storage.journal
    wait_until(lambda: journal.read_bytes().count(b"\n") >= records, "so many records", timeout_s=60, every_s=0.005)
    time.sleep(0.1)
    agent.kill()
    agent.start()
    running = set(virsh(daemon, "list", "--uuid").split())
    assert set(virsh(daemon, "list", "--all", "--uuid").split()) == running <= ids
    assert {path.name for path in agent.settings.storage.vms.iterdir()} == running
    report = agent.client().call("GetReport")["parameters"]["report"]
    assert report["cells"][0]["cores_free"] == 8 - 2 * len(running)
    done = results(agent.client().call("CreateVms", create(*vms)))
    assert [result["problem"] for result in done] == [None] * 3
    assert set(virsh(daemon, "list", "--uuid").split()) == ids
    results(agent.client().call("DeleteVms", delete(*vms)))
    assert virsh(daemon, "list", "--all", "--name") == ""


def test_libvirtd_dies_under_it_and_comes_back(agent: Any, daemon: PrivateLibvirtd, vm: Any) -> None:
    agent.start()
    one = vm(**SMALL)
    results(agent.client().call("CreateVms", create(one)))
    daemon.kill_libvirtd()
    try:
        reply = agent.client().call("ListVms")
        assert reply["parameters"]["code"] == "hypervisor.unavailable"
        assert "error" not in agent.client().call("GetVersion")
    finally:
        daemon.start_libvirtd()
    wait_until(
        lambda: [v["state"] for v in agent.client().call("ListVms")["parameters"].get("vms", [])] == ["running"],
        "the VM is seen running again",
        timeout_s=60,
    )
    results(agent.client().call("DeleteVms", delete(one)))
    assert virsh(daemon, "list", "--all", "--name") == ""


@pytest.mark.slow
def test_a_guest_applies_its_seed_and_obeys_the_power_button(agent: Any, daemon: PrivateLibvirtd, vm: Any) -> None:
    image = guest_image()
    agent.start()
    one = vm(
        name="hello",
        nics=[],
        memory_mib=256,
        root_disk={"size_mib": 1024, "image": _source(image)},
    )
    (made,) = results(agent.client().call("CreateVms", create(one)))
    assert made["problem"] is None
    console = agent.settings.storage.vms / str(one.vm_id) / "console.log"
    wait_until(
        lambda: console.exists() and "ppec-guest ready hello" in console.read_text(errors="replace"),
        "the guest says its name",
        timeout_s=240,
    )
    stop = {"operation_id": "op-3", "fence": 1, "vm_ids": [str(one.vm_id)], "timeout_s": 240}
    (stopped,) = results(agent.client(timeout_s=270).call("StopVms", stop))
    assert stopped["problem"] is None
    assert stopped["vm"]["state"] == "stopped"
    results(agent.client().call("DeleteVms", delete(one)))


@pytest.mark.slow
def test_a_guest_uses_the_vcpus_it_is_given_and_lets_go_of_them(agent: Any, daemon: PrivateLibvirtd, vm: Any) -> None:
    """A shrink while it runs, with a kernel that takes part, by ACPI.

    QEMU 7.2 emulating does not say when a CPU has gone, so that libvirt knows it only when it looks anew, and asks for
    the next only then (lab/README.md).
    """
    agent.start()
    source = _source(guest_image())
    one = vm(nics=[], memory_mib=256, max_vcpus=4, root_disk={"size_mib": 1024, "image": source})
    (made,) = results(agent.client().call("CreateVms", create(one)))
    assert made["problem"] is None
    console = agent.settings.storage.vms / str(one.vm_id) / "console.log"

    def waits(what: str, condition: Callable[[], bool]) -> None:
        wait_until(condition, what, timeout_s=240)

    def cpus() -> str:
        """Which ones the guest said last that it has; nothing while it has said none, or no whole line."""
        lines = console.read_text(errors="replace").splitlines()
        said = [words[2] for line in lines if (words := line.split())[:2] == ["ppec-guest", "cpus"] and words[2:]]
        return said[-1] if said else ""

    def resize(fence: int, vcpus: int, timeout_s: float) -> dict[str, Any]:
        size = {"vm_id": str(one.vm_id), "vcpus": vcpus, "memory_mib": 256}
        request = {"operation_id": f"op-resize-{fence}", "fence": fence, "sizes": [size], "timeout_s": timeout_s}
        (result,) = results(agent.client(timeout_s=120).call("ResizeVms", request))
        assert result["problem"] is None
        return result

    def seen() -> tuple[int, int]:
        """vCPUs, and free cores of the host; none while the agent comes back to libvirt."""
        report = agent.client().call("GetReport")["parameters"].get("report")
        return (report["vms"][0]["vcpus"], report["cells"][0]["cores_free"]) if report else (0, 0)

    def lets_go(fence: int, used: set[str], left: int) -> None:
        resize(fence, 2, 1)
        waits("the guest lets go of a CPU", lambda: cpus() in used)
        daemon.kill_libvirtd()
        daemon.start_libvirtd()
        waits("that is seen", lambda: 0 < seen()[0] <= left)

    # Only now: its kernel has mapped its devices.
    waits("the guest is up", lambda: "ppec-guest ready" in console.read_text(errors="replace"))
    assert resize(1, 4, 0)["resized"]["vcpus"] == "now"
    waits("it uses them", lambda: cpus() == "0,2-3")
    assert seen() == (4, 4)
    lets_go(2, {"0,2", "0"}, 3)
    lets_go(3, {"0"}, 2)
    waits("what it has no more is given back", lambda: seen() == (2, 6))
    assert virsh(daemon, "vcpucount", one.name, "--live", "--active") == "2"
    assert virsh(daemon, "domstate", one.name) == "running"
    results(agent.client().call("DeleteVms", delete(one)))


def _source(image: Path) -> dict[str, Any]:
    import hashlib

    with image.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = image.stat().st_size
    return {"name": "guest", "sha256": sha256, "size_bytes": size, "format": "qcow2", "url": image.as_uri()}


def test_a_vm_is_resized_while_it_runs_and_at_its_next_start(agent: Any, daemon: PrivateLibvirtd, vm: Any) -> None:
    agent.start()
    one = vm(**SMALL, max_vcpus=4, max_memory_mib=320)
    results(agent.client().call("CreateVms", create(one)))

    def resize(fence: int, vcpus: int, memory_mib: int) -> dict[str, Any]:
        size = {"vm_id": str(one.vm_id), "vcpus": vcpus, "memory_mib": memory_mib}
        request = {"operation_id": f"op-resize-{fence}", "fence": fence, "sizes": [size], "timeout_s": 0}
        (result,) = results(agent.client().call("ResizeVms", request, more=True))
        assert result["problem"] is None
        return result

    def cores_free() -> int:
        return int(agent.client().call("GetReport")["parameters"]["report"]["cells"][0]["cores_free"])

    assert resize(1, 4, 192)["resized"] == {"vcpus": "now", "memory_mib": "now"}
    assert virsh(daemon, "vcpucount", one.name, "--live", "--active") == "4"
    assert "Max memory:     196608 KiB" in virsh(daemon, "dominfo", one.name)
    assert cores_free() == 4
    # The guest is in its firmware: it gives nothing back, and holds what it has over any restart of the agent.
    shrunk = resize(2, 2, 64)
    assert shrunk["resized"] == {"vcpus": "next_start", "memory_mib": "next_start"}
    assert shrunk["vm"]["pending"] == {"vcpus": 2, "memory_mib": 64}
    agent.kill()
    agent.start()
    assert cores_free() == 4
    for method, more in (("StopVms", {"timeout_s": 0, "force": True}), ("StartVms", {})):
        request = {"operation_id": "op-power", "fence": 1, "vm_ids": [str(one.vm_id)]} | more
        (result,) = results(agent.client().call(method, request))
        assert result["problem"] is None
    assert (result["vm"]["vcpus"], result["vm"]["memory_mib"], result["vm"]["pending"]) == (2, 64, None)
    assert cores_free() == 6
    results(agent.client().call("DeleteVms", delete(one)))
    assert virsh(daemon, "list", "--all", "--name") == ""
