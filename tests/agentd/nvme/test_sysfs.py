# SPDX-License-Identifier: Apache-2.0
"""Drives as the kernel shows them, and every reason for which one is not handed over."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ppec_agentd.nvme.drive import NvmeDrive
from ppec_agentd.nvme.sysfs import is_claimed, read_drive

from .machine_tree import ONE, TWO, MachineTree


def test_a_drive_that_can_be_handed_over(tmp_path: Path) -> None:
    tree = MachineTree(tmp_path)
    tree.drive(cell=1)
    # A bridge in the group is no other device: it can't be handed over at all, and stays.
    tree.pci("0000:00:01.0", group=10, device_class="0x060400")
    assert read_drive(ONE, tmp_path) == NvmeDrive(ONE, 1, "nvme", "S1", ("nvme0n1",))


@pytest.mark.parametrize("driver", ["vfio-pci", ""])
def test_a_drive_that_is_not_at_home(tmp_path: Path, driver: str) -> None:
    tree = MachineTree(tmp_path)
    tree.pci(ONE, group=10, cell=-1)
    if driver:
        tree.driven_by(ONE, driver)
    drive = read_drive(ONE, tmp_path)
    assert drive == NvmeDrive(ONE, None, driver)
    assert not drive.at_home


def several_paths(tree: MachineTree) -> None:
    controller = tree.root / f"sys/bus/pci/devices/{ONE}/nvme/nvme0"
    (controller / "nvme0n1").rename(controller / "nvme0c1n1")


PROBLEMS: dict[str, tuple[Callable[[MachineTree], None], str]] = {
    "another-class": (
        lambda tree: tree.write(f"sys/bus/pci/devices/{ONE}/class", "0x020000\n"),
        "the PCI device there is no NVMe drive: its class is 0x020000",
    ),
    "no-iommu": (
        lambda tree: (tree.root / f"sys/bus/pci/devices/{ONE}/iommu_group").unlink(),
        "it has no IOMMU group: the IOMMU is off, or there is none",
    ),
    "a-shared-group": (lambda tree: tree.pci(TWO, group=10), f"its IOMMU group has other devices: {TWO}"),
    "several-paths": (several_paths, "nvme0c1n1 is one of several paths to a drive"),
    "mounted": (lambda tree: tree.mount("259:0", "/dev/root", "/srv"), "nvme0n1 is mounted on /srv"),
    "a-partition-mounted": (lambda tree: tree.mount("259:1", "x", "/srv"), "nvme0n1p1 is mounted on /srv"),
    # As btrfs has it: the number is none of a block device.
    "mounted-by-path": (lambda tree: tree.mount("0:44", "/dev/nvme0n1p1", "/srv"), "nvme0n1p1 is mounted on /srv"),
    "swap": (
        lambda tree: tree.write("proc/swaps", "Filename Type Size\n/dev/nvme0n1p1 partition 1 0 -2\n"),
        "nvme0n1p1 holds swap",
    ),
    "part-of-a-raid": (lambda tree: tree.write("sys/class/block/nvme0n1/holders/md0", ""), "nvme0n1 is part of md0"),
    "a-partition-of-lvm": (
        lambda tree: tree.write("sys/class/block/nvme0n1/nvme0n1p1/holders/dm-0", ""),
        "nvme0n1p1 is part of dm-0",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_keeps_a_drive_from_vms(tmp_path: Path, case: str) -> None:
    tree = MachineTree(tmp_path)
    tree.drive()
    tree.mount("8:1", "/dev/sda1", "/")
    assert read_drive(ONE, tmp_path).problem == ""
    spoil, problem = PROBLEMS[case]
    spoil(tree)
    assert read_drive(ONE, tmp_path).problem == problem


def test_a_drive_that_goes_while_it_is_looked_at(tmp_path: Path) -> None:
    """Hot-unplug: what was listed a moment ago is not there any more."""
    tree = MachineTree(tmp_path)
    tree.drive()
    controller = tmp_path / f"sys/bus/pci/devices/{ONE}/nvme/nvme0"
    controller.rename(tmp_path / "gone")
    controller.symlink_to("nowhere")
    (tmp_path / "sys/kernel/iommu_groups/10/devices" / ONE).unlink()
    (tmp_path / "sys/kernel/iommu_groups/10/devices").rmdir()
    drive = read_drive(ONE, tmp_path)
    assert (drive.namespaces, drive.serial, drive.shows_itself) == ((), "", False)
    assert drive.problem == "it is going: the kernel is taking its device away"


def test_a_slot_without_a_device(tmp_path: Path) -> None:
    assert read_drive(ONE, tmp_path) == NvmeDrive(ONE, problem="this host has no PCI device there")


@pytest.fixture
def loop_device(tmp_path: Path) -> Path:
    """A block device of this machine's own making."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(4 * 1024 * 1024))
    done = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], check=False, capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        pytest.skip(f"this machine makes no loop devices: {done.stderr.strip()}")
    return Path(done.stdout.strip())


def test_the_kernel_says_who_has_a_block_device(loop_device: Path, tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", str(loop_device)], check=True, capture_output=True, timeout=60)
        assert not is_claimed(loop_device)
        subprocess.run(["mount", str(loop_device), str(place)], check=True, capture_output=True, timeout=30)
        try:
            assert is_claimed(loop_device)
        finally:
            subprocess.run(["umount", str(place)], check=True, timeout=30)
        assert not is_claimed(loop_device)
    finally:
        subprocess.run(["losetup", "--detach", str(loop_device)], check=True, timeout=30)
