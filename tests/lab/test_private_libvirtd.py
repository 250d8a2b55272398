# SPDX-License-Identifier: Apache-2.0
"""Two private libvirtds run beside one another and leave nothing behind."""

from __future__ import annotations

import contextlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ppec_lab.conditions import wait_until
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd

pytestmark = pytest.mark.libvirt

DOMAIN = """\
<domain type='qemu'>
  <name>twin</name>
  <memory unit='MiB'>32</memory>
  <vcpu cpuset='0'>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    {interface}
    <serial type='file'><source path='{console}'/></serial>
  </devices>
</domain>
"""


def virsh(daemon: PrivateLibvirtd, *words: str) -> str:
    done = subprocess.run(
        ["virsh", "-q", "-c", daemon.uri, *words], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def start_twin(daemon: PrivateLibvirtd, place: Path, interface: str = "") -> None:
    disk = place / "disk.raw"
    disk.write_bytes(b"\0" * 1024 * 1024)
    xml = place / "twin.xml"
    xml.write_text(DOMAIN.format(disk=disk, console=place / "console.log", interface=interface))
    virsh(daemon, "define", str(xml))
    virsh(daemon, "start", "twin")


def processes_mentioning(text: str) -> list[str]:
    """Command lines of all running processes that hold `text`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in words:
                found.append(words)
    return found


def test_two_run_a_domain_of_the_same_name_at_once(tmp_path: Path) -> None:
    def one(index: int) -> tuple[str, str, str]:
        place = tmp_path / str(index)
        place.mkdir()
        with private_libvirtd() as daemon:
            start_twin(daemon, place)
            state = virsh(daemon, "domstate", "twin")
            pins = virsh(daemon, "vcpupin", "twin", "--vcpu", "0")
            assert str(place) in " ".join(processes_mentioning("qemu-system"))
            return state, pins.split()[-1], daemon.host_uuid

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(one, range(2))
    assert first[:2] == second[:2] == ("running", "0")
    assert first[2] != second[2]
    assert processes_mentioning(str(tmp_path)) == []


def test_the_base_directory_is_kept_when_given_and_no_process_survives(tmp_path: Path) -> None:
    with private_libvirtd() as daemon:
        base = str(daemon.base_dir)
        start_twin(daemon, tmp_path)
        assert processes_mentioning(base)
    assert processes_mentioning(base) == []
    assert not Path(base).exists()


def test_a_domain_outlives_a_killed_libvirtd(tmp_path: Path) -> None:
    with private_libvirtd() as daemon:
        start_twin(daemon, tmp_path)
        daemon.kill_libvirtd()
        assert processes_mentioning(str(tmp_path / "disk.raw"))
        daemon.start_libvirtd()
        wait_until(lambda: virsh(daemon, "domstate", "twin") == "running", "the domain is seen again", timeout_s=60)


def test_a_domain_attaches_to_a_bridge_of_the_private_network(tmp_path: Path) -> None:
    interface = "<interface type='bridge'><source bridge='br-lab'/><model type='virtio'/></interface>"
    with private_libvirtd(own_network=True) as daemon:
        daemon.run("ip", "link", "add", "br-lab", "type", "bridge")
        daemon.run("ip", "link", "set", "br-lab", "up")
        start_twin(daemon, tmp_path, interface)
        ports = daemon.run("ip", "-brief", "link", "show", "master", "br-lab").stdout.split("\n")
        assert len([line for line in ports if line.strip()]) == 1
    outside = subprocess.run(["ip", "link", "show", "br-lab"], check=False, capture_output=True, text=True, timeout=10)
    assert outside.returncode != 0


def test_a_long_base_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long"), private_libvirtd(tmp_path / ("x" * 100)):
        pass
