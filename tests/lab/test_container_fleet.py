# SPDX-License-Identifier: Apache-2.0
"""Hosts in containers: ssh, libvirt with guests reachable by their own addresses, restarts, and no trace left."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.conditions import wait_until
from ppec_lab.container_fleet import ContainerFleet, container_fleet, state_root
from ppec_lab.container_host import ContainerHost
from ppec_lab.guest_image import guest_image

# One worker runs them all: the fleet is started once.
pytestmark = [pytest.mark.containers, pytest.mark.slow]


@pytest.fixture(scope="module")
def fleet() -> Iterator[ContainerFleet]:
    with container_fleet(2) as running:
        yield running


def links() -> dict[int, str]:
    """By index: unlike a name, the kernel gives none a second time."""
    listed = subprocess.run(["ip", "-json", "link"], check=True, capture_output=True, text=True, timeout=60)
    return {row["ifindex"]: row["ifname"] for row in json.loads(listed.stdout)}


def links_of(fleet: ContainerFleet) -> set[int]:
    names = {fleet.network.bridge, *(fleet.network.cable(host.number) for host in fleet.hosts)}
    found = {index for index, name in links().items() if name in names}
    assert len(found) == len(names)
    return found


def test_each_host_is_itself_and_knows_its_peers(fleet: ContainerFleet) -> None:
    assert [host.ssh("hostname").stdout.strip() for host in fleet.hosts] == ["host1", "host2"]
    for host, peer in zip(fleet.hosts, reversed(fleet.hosts), strict=True):
        assert host.ssh(f"getent hosts {peer.name}").stdout.split()[0] == peer.address
        assert host.host_uuid in host.ssh("virsh -c qemu:///system capabilities").stdout
        # libvirt-guests and others may start later; none may have failed.
        assert host.ssh("systemctl --failed --no-legend").stdout == ""
    assert len({host.ssh("cat /etc/machine-id").stdout for host in fleet.hosts}) == 2


def boot_guest(host: ContainerHost, place: Path, seed: Path, xml: str) -> None:
    """Copy disk, seed and XML to the host and start the guest there."""
    disk = place / "disk.qcow2"
    shutil.copyfile(guest_image(), disk)
    (place / "guest.xml").write_text(xml)
    for source, target in ((disk, "disk.qcow2"), (seed, "seed.iso"), (place / "guest.xml", "guest.xml")):
        host.copy_in(source, f"/var/lib/libvirt/images/{target}")
    host.ssh(
        "chown libvirt-qemu /var/lib/libvirt/images/*; virsh -c qemu:///system create /var/lib/libvirt/images/guest.xml"
    )


def test_guests_of_two_prefixes_answer_by_their_own_addresses(
    fleet: ContainerFleet,
    tmp_path: Path,
    seed_writer: Callable[..., Path],
    network_for: Callable[..., dict[str, Any]],
    guest_domain: Callable[..., str],
) -> None:
    answers: dict[str, str] = {}
    for number, host in enumerate(fleet.hosts, start=1):
        gateway, _ = fleet.network.add_gateways(number)
        addresses = [f"{fleet.network.prefix(number)[9]}/24", f"{fleet.network.prefix6(number)[9]}/64"]
        mac, name, place = f"52:54:00:00:88:0{number}", f"guest{number}", tmp_path / str(number)
        seed = seed_writer(place, {"instance-id": f"iid-{number}", "local-hostname": name},
                           network_for(mac, addresses, gateway), b"#cloud-config\n")  # fmt: skip
        images = "/var/lib/libvirt/images"
        xml = guest_domain(name=name, disk=f"{images}/disk.qcow2", seed=f"{images}/seed.iso",
                           console="/var/log/libvirt/qemu/console.log", mac=mac, bridge=host.bridge())  # fmt: skip
        boot_guest(host, place, seed, xml)
        answers[addresses[0].split("/")[0]] = f"guest{number} iid-{number} "
        answers[f"[{addresses[1].split('/')[0]}]"] = f"guest{number} iid-{number} "

    def get(address: str) -> str:
        try:
            with urllib.request.urlopen(f"http://{address}:8000/", timeout=2) as reply:
                return str(reply.read().decode())
        except (OSError, http.client.HTTPException):
            return ""

    for address, expected in answers.items():
        reply = wait_until(lambda a=address: get(a), f"{address} answers", timeout_s=240)  # type: ignore[misc]
        assert reply.startswith(expected)
    subprocess.run(["ping", "-c", "1", "-W", "20", next(iter(answers))], check=True, capture_output=True, timeout=60)


def test_a_power_cut_keeps_the_disk_and_the_address(fleet: ContainerFleet) -> None:
    host = fleet.hosts[1]
    host.ssh("echo kept >/root/mark; echo lost >/run/mark")
    host.restart()
    assert host.ssh("cat /root/mark").stdout == "kept\n"
    assert host.run("test", "-e", "/run/mark", check=False).returncode == 1
    assert fleet.gateway in host.ssh("ip route").stdout


def test_a_fleet_comes_back_after_its_machine_went_down(fleet: ContainerFleet) -> None:
    with container_fleet(1) as other:
        (host,) = other.hosts
        host.ssh("echo kept >/root/mark")
        # All that a reboot of the machine outside takes away: processes, mounts, links and namespaces.
        host.kill()
        host.unmount()
        other.network.unplug(host.container, host.number)
        other.network.remove()
        with container_fleet(1) as third:
            assert third.network.index not in {other.network.index, fleet.network.index}
        ContainerFleet.load(other.name).resume()
        assert host.ssh("cat /root/mark").stdout == "kept\n"


def test_two_fleets_stand_beside_one_another_and_leave_nothing(fleet: ContainerFleet) -> None:
    both_stand = threading.Barrier(2)

    def one(_: int) -> tuple[ContainerFleet, set[int]]:
        with container_fleet(1) as other:
            loaded = ContainerFleet.load(other.name)
            assert loaded == other
            assert loaded.hosts[0].ssh("hostname").stdout == "host1\n"
            both_stand.wait(240)
            return other, links_of(other)

    with ThreadPoolExecutor(2) as pool:
        others, theirs = zip(*pool.map(one, range(2)), strict=True)
    assert len({other.network.index for other in [fleet, *others]}) == 3
    assert set().union(*theirs) & links().keys() == set()
    containers = subprocess.run(["podman", "ps", "--all", "--format={{.Names}}"], check=True, capture_output=True,
                                text=True, timeout=30).stdout  # fmt: skip
    for other in others:
        assert not other.directory.exists()
        assert not any(Path("/run/netns").glob(f"ppec-{other.name}-*"))
        assert other.name not in containers
        assert other.name not in Path("/proc/mounts").read_text()


def test_a_taken_name_is_refused_and_left_alone(fleet: ContainerFleet) -> None:
    with pytest.raises(FileExistsError):
        ContainerFleet.start(1, fleet.name)
    assert (state_root() / fleet.name / "fleet.json").exists()
    assert fleet.hosts[0].ssh("true").returncode == 0


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(ValueError, match="lower-case"):
        ContainerFleet.start(1, "../etc")
