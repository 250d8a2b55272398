# SPDX-License-Identifier: Apache-2.0
"""The emulated machine's command line, the seed that makes it itself, and what is read of a guest's process."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from ppec_lab.bare_metal import network_file, seed_archive
from ppec_lab.bare_metal_disk import RECIPE, SEED_DEVICE, SEED_SERIAL, BareMetalDisk
from ppec_lab.bare_metal_machine import MachineFiles, MachineShape, kernel_command_line, qemu_command
from ppec_lab.guest_process import largest_memory, parse_guest_process

FILES = MachineFiles(
    disk=BareMetalDisk(Path("/c/root.raw"), Path("/c/vmlinuz"), Path("/c/initrd.img")),
    overlay=Path("/t/a,b/root.qcow2"),
    seed=Path("/t/a,b/seed.tar"),
    console=Path("/t/a,b/console.log"),
)


def options(command: list[str], name: str) -> list[str]:
    return [value for key, value in itertools.pairwise(command) if key == name]


def test_each_socket_is_a_cell_with_its_own_memory() -> None:
    command = qemu_command("m1", MachineShape(memory_per_cell_mib=1024), FILES, "tap0")
    assert options(command, "-smp") == ["8,sockets=2,cores=2,threads=2"]
    assert options(command, "-m") == ["2048M"]
    assert options(command, "-object") == [
        "memory-backend-ram,id=m0,size=1024M",
        "memory-backend-ram,id=m1,size=1024M",
    ]
    assert options(command, "-numa") == [
        "node,nodeid=0,memdev=m0",
        "cpu,node-id=0,socket-id=0",
        "node,nodeid=1,memdev=m1",
        "cpu,node-id=1,socket-id=1",
        "dist,src=1,dst=0,val=21",
    ]


def test_every_pair_of_sockets_has_one_distance() -> None:
    command = qemu_command("m1", MachineShape(sockets=4), FILES, "tap0")
    distances = [value for value in options(command, "-numa") if value.startswith("dist")]
    assert len(distances) == len(set(distances)) == 6


def test_each_socket_has_a_drive_near_it_where_its_address_says() -> None:
    shape = MachineShape(sockets=3)
    files = replace(FILES, drives=(Path("/t/0"), Path("/t/1"), Path("/t/a,b")))
    command = qemu_command("m1", shape, files, "tap0")
    drives = [drive for drive in options(command, "-drive") if ",id=nvme" in drive]
    assert [drive.partition(",if=")[0] for drive in drives] == ["file=/t/0", "file=/t/1", "file=/t/a,,b"]
    devices = options(command, "-device")
    assert [device for device in devices if device.startswith("nvme,")] == [
        "nvme,drive=nvme0,serial=NVME0000,bus=pcie.0,addr=0x10",
        "nvme,drive=nvme1,serial=NVME0001,bus=port1",
        "nvme,drive=nvme2,serial=NVME0002,bus=port2",
    ]
    bridges = [device for device in devices if device.startswith("pxb-pcie")]
    assert [re.findall(r"bus_nr=(\d+),numa_node=(\d)", bridge) for bridge in bridges] == [[("32", "1")], [("64", "2")]]
    assert shape.nvme_addresses == ("0000:00:10.0", "0000:21:00.0", "0000:41:00.0")


def test_commas_in_paths_are_not_options() -> None:
    command = qemu_command("m1", MachineShape(), FILES, "tap0")
    root, seed = options(command, "-drive")
    assert root.startswith("file=/t/a,,b/root.qcow2,if=none,")
    assert seed.startswith("file=/t/a,,b/seed.tar,if=none,")
    assert options(command, "-serial") == ["file:/t/a,,b/console.log"]


def test_the_shared_disk_is_never_written() -> None:
    command = qemu_command("m1", MachineShape(), FILES, "tap0")
    assert not any("root.raw" in word for word in command)


def test_the_kernel_sets_huge_pages_aside_in_each_cell() -> None:
    words = kernel_command_line("m1", MachineShape(huge_pages_per_cell=32)).split()
    assert words[-2:] == ["hugepagesz=2M", "hugepages=0:32,1:32"]
    assert "systemd.hostname=m1" in words
    assert "hugepages" not in kernel_command_line("m1", MachineShape(huge_pages_per_cell=0))


def test_the_seed_is_unpacked_from_the_disk_of_its_serial() -> None:
    command = qemu_command("m1", MachineShape(), FILES, "tap0")
    assert f"virtio-blk-pci,drive=seed,serial={SEED_SERIAL}" in command
    unit = RECIPE.files["/etc/systemd/system/ppec-seed.service"]
    assert f"/dev/disk/by-id/virtio-{SEED_SERIAL} " in unit
    assert SEED_DEVICE.replace("\\x2d", "-") == f"dev-disk-by-id-virtio-{SEED_SERIAL}.device"


def test_the_seed_holds_files_with_their_modes_and_no_folders() -> None:
    archive = seed_archive({"root/.ssh/authorized_keys": ("key\n", 0o600), "etc/hosts": ("", 0o644)})
    # A disk is whole sectors.
    assert len(archive) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        found = {entry.name: (entry.mode, entry.uid, entry.isfile()) for entry in tar}
        key = tar.extractfile("root/.ssh/authorized_keys")
        assert key is not None
        assert key.read() == b"key\n"
    assert found == {"etc/hosts": (0o644, 0, True), "root/.ssh/authorized_keys": (0o600, 0, True)}


def test_the_network_file_names_address_and_gateway() -> None:
    lines = network_file("192.0.2.11", "192.0.2.1").splitlines()
    assert {"Address=192.0.2.11/24", "Gateway=192.0.2.1"} <= set(lines)


MAPS = """\
55f000000000 prefer:1 file=/usr/bin/qemu-system-x86_64 mapped=2000 N0=2000 kernelpagesize_kB=4
55f100000000 default heap anon=900 dirty=900 N0=100 N1=800 kernelpagesize_kB=4
7f0000000000 bind:1 anon=49152 dirty=49152 active=0 N1=49152 kernelpagesize_kB=4
7f1000000000 default stack anon=3 dirty=3 N1=3 kernelpagesize_kB=4
7f2000000000 default
"""


def test_a_guests_memory_is_the_largest_mapping_of_the_processs_own() -> None:
    found = largest_memory(MAPS)
    assert (found.policy, found.page_kib, dict(found.kib_by_cell)) == ("bind:1", 4, {1: 196608})


def test_huge_pages_are_told_by_their_size() -> None:
    huge = "7f00 bind:0 file=/dev/hugepages/libvirt/qemu/1-a/x huge dirty=30 N0=30 kernelpagesize_kB=2048\n"
    found = largest_memory(MAPS.replace("49152", "100") + huge)
    assert (found.policy, found.page_kib, dict(found.kib_by_cell)) == ("bind:0", 2048, {0: 61440})


@pytest.mark.parametrize(("files", "kvm"), [(["/dev/kvm", "anon_inode:kvm-vcpu:0"], True), (["/dev/kvm"], False)])
def test_a_process_is_known_by_pid_and_start_and_its_vcpus_by_their_threads(files: list[str], kvm: bool) -> None:
    # The name may hold spaces and parentheses; the start is field 22 of `proc(5)`.
    stat = "812 (qemu) x (y) S " + " ".join(str(field) for field in range(4, 53))
    threads = [["qemu\n", "Cpus_allowed_list:\t0-7\n"], ["CPU 1/KVM\n", "Name:\tx\nCpus_allowed_list:\t5\n"]]
    threads.append(["CPU 0/KVM\n", "Cpus_allowed_list:\t4\n"])
    printed = json.dumps({"pid": 812, "stat": stat, "files": files, "maps": MAPS, "threads": threads})
    found = parse_guest_process(printed)
    assert found.identity == (812, 22)
    assert found.allowed_cpus == {0: "4", 1: "5"}
    assert found.kvm is kvm
