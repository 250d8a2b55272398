# SPDX-License-Identifier: Apache-2.0
"""Erasing a drive by programs that only write down how they were called; tests/metal has real ones."""

from __future__ import annotations

import asyncio
import fcntl
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ppec_agentd.nvme import sysfs
from ppec_agentd.nvme.host_drives import HostDrives
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until

from .machine_tree import ONE, MachineTree

FORMATS, MANAGES = 2, 8
# Answers with what lies beside it, if anything: words and an exit status. A format lasts as long as there is `hold`.
PROGRAM = """#!/bin/sh
here=$(dirname "$0")
printf '%s\\n' "${0##*/} $*" >>"$here/calls"
case "${0##*/} $1" in
    'nvme format') while [ -e "$here/hold" ]; do sleep 0.05; done; name=format ;;
    'nvme '*) name=$1 ;;
    *) name=${0##*/} ;;
esac
[ ! -e "$here/$name.says" ] || cat "$here/$name.says"
[ ! -e "$here/$name.status" ] || exit "$(cat "$here/$name.status")"
"""


class Host:
    """One drive, and the programs for it in a folder that comes first on the PATH."""

    def __init__(self, place: Path) -> None:
        self.tree = MachineTree(place / "root")
        self.tree.drive()
        self.programs = place / "bin"
        self.locks = place / "locks"
        self.programs.mkdir()
        for name in ("nvme", "blkdiscard", "blkid"):
            (self.programs / name).write_text(PROGRAM)
            (self.programs / name).chmod(0o755)
        self.knows(FORMATS | MANAGES, 1)

    @property
    def drives(self) -> HostDrives:
        return HostDrives(30, self.locks, self.tree.root)

    def knows(self, commands: int, *namespaces: int) -> None:
        (self.programs / "id-ctrl.says").write_text(json.dumps({"oacs": commands}))
        listed = {"nsid_list": [{"nsid": number} for number in namespaces]}
        (self.programs / "list-ns.says").write_text(json.dumps(listed))

    def answer(self, program: str, status: int, words: str = "") -> None:
        (self.programs / f"{program}.status").write_text(str(status))
        (self.programs / f"{program}.says").write_text(words)

    def calls(self) -> list[str]:
        file = self.programs / "calls"
        return file.read_text().replace(f"{self.tree.root}", "").splitlines() if file.exists() else []

    def changing(self) -> list[str]:
        return [call for call in self.calls() if call.startswith(("nvme format", "blkdiscard"))]

    def erase(self) -> None:
        asyncio.run(self.drives.erase(self.drives.read(ONE)))

    def refused(self) -> str:
        with pytest.raises(PpecError) as caught:
            self.erase()
        assert caught.value.code == "disk.not_erased"
        return caught.value.message


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(tmp_path)
    monkeypatch.setenv("PATH", str(made.programs), prepend=":")
    yield made
    (made.programs / "hold").unlink(missing_ok=True)


FORMAT = "nvme format /dev/nvme0n1 --ses=1 --force --timeout=30000"
ZERO = "blkdiscard --zeroout /dev/nvme0n1"


def test_a_drive_that_formats_itself_does(host: Host) -> None:
    host.erase()
    assert host.changing() == [FORMAT]
    assert "nvme list-ns --all /dev/nvme0n1 --output-format=json" in host.calls()


def test_a_drive_that_cannot_format_itself_is_overwritten(host: Host) -> None:
    host.knows(0, 1)
    host.erase()
    assert host.changing() == [ZERO]
    assert "nvme list-ns /dev/nvme0n1 --output-format=json" in host.calls(), "nor can it list those it hides"


def test_a_drive_that_refuses_to_format_is_overwritten(host: Host) -> None:
    host.answer("format", 1, "NVMe status: ACCESS_DENIED")
    host.erase()
    assert host.changing() == [FORMAT, ZERO]


def test_without_nvme_cli_drives_are_overwritten(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (host.programs / "nvme").unlink()
    for name in ("sh", "cat", "dirname"):
        (host.programs / name).symlink_to(f"/bin/{name}" if name != "dirname" else "/usr/bin/dirname")
    monkeypatch.setenv("PATH", str(host.programs))
    host.erase()
    assert host.changing() == [ZERO]


def test_a_drive_that_can_not_be_erased_at_all(host: Host) -> None:
    host.answer("format", 1)
    host.answer("blkdiscard", 1, "BLKZEROOUT ioctl failed: Input/output error")
    assert "blkdiscard ended with 1: BLKZEROOUT ioctl failed" in host.refused()


def test_namespaces_that_the_host_does_not_see_keep_their_data_and_so_the_drive(host: Host) -> None:
    host.knows(FORMATS | MANAGES, 1, 2)
    assert "2 namespaces, and the host sees 1 of them" in host.refused()
    assert host.changing() == []


def test_a_namespace_in_a_format_that_the_kernel_can_not_read_is_not_taken_for_zeroed(host: Host) -> None:
    host.knows(0, 1)
    host.tree.write("sys/class/block/nvme0n1/size", "0\n")
    assert "sees nothing of nvme0n1" in host.refused()
    assert host.changing() == []


def test_what_happened_since_the_look_is_seen_before_anything_is_touched(host: Host) -> None:
    seen = host.drives.read(ONE)

    def refused(drive_seen: object) -> str:
        with pytest.raises(PpecError) as caught:
            asyncio.run(host.drives.erase(drive_seen))  # type: ignore[arg-type]
        return caught.value.message

    assert "another drive has come into its place" in refused(replace(seen, serial="S0"))
    host.tree.mount("259:1", "/dev/nvme0n1p1", "/srv")
    assert "nvme0n1p1 is mounted on /srv" in refused(seen)
    host.tree.mount("8:1", "/dev/sda1", "/")
    host.tree.driven_by(ONE, "vfio-pci")
    assert "the driver vfio-pci has it" in refused(seen)
    assert host.calls() == []


def test_nothing_is_recognised_on_an_empty_drive(host: Host) -> None:
    host.answer("blkid", 2)
    assert asyncio.run(host.drives.signature(host.drives.read(ONE))) == ""
    assert host.calls() == ["blkid --probe --output export /dev/nvme0n1"]


@pytest.mark.parametrize(
    ("status", "said", "found"),
    [
        (0, "DEVNAME=x\nTYPE=ext4\nLABEL=TYPE=x\n", "nvme0n1: ext4"),
        (0, "PTTYPE=gpt\n", "nvme0n1: gpt"),
        # Several at once: blkid can't say what, and so nobody knows that there is nothing.
        (8, "", "nvme0n1: something that blkid can not name"),
    ],
)
def test_what_is_recognised_on_a_drive(host: Host, status: int, said: str, found: str) -> None:
    host.answer("blkid", status, said)
    assert asyncio.run(host.drives.signature(host.drives.read(ONE))) == found


def gone(host: Host) -> None:
    (host.tree.root / "dev/nvme0n1").unlink()


def cut_short(host: Host) -> None:
    host.tree.write("dev/nvme0n1", "x")


@pytest.mark.parametrize(("spoil", "why"), [(gone, "No such file"), (cut_short, "can't be read at byte 0 of 1")])
def test_nothing_found_is_not_believed_of_a_drive_that_can_not_be_read(
    host: Host, spoil: Callable[[Host], None], why: str
) -> None:
    """blkid ends with the same status as for an empty one."""
    host.answer("blkid", 2)
    spoil(host)
    with pytest.raises(PpecError, match=why) as caught:
        asyncio.run(host.drives.signature(host.drives.read(ONE)))
    assert caught.value.code == "disk.not_erased"


def test_what_the_system_refuses_is_a_drive_that_is_not_erased(host: Host) -> None:
    """The namespace has gone between the look and the erasing."""
    host.knows(0, 1)
    (host.tree.root / "sys/class/block/nvme0n1/size").unlink()
    assert "No such file or directory" in host.refused()
    assert host.changing() == []


def test_what_is_being_erased_is_not_in_use_by_the_host(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever erases a drive has it for himself, as a mount has."""
    monkeypatch.setattr(sysfs, "is_claimed", lambda device: True)
    host.locks.mkdir()
    with (host.locks / f"{ONE}.lock").open("w") as lock:
        found = host.drives.read(ONE)
        assert (found.problem, found.used_by_host) == ("nvme0n1 is in use by the host", True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = host.drives.read(ONE)
        assert (found.problem, found.used_by_host) == (sysfs.BEING_ERASED, False)
        host.tree.mount("259:1", "/dev/nvme0n1p1", "/srv")
        assert host.drives.read(ONE).problem == "nvme0n1p1 is mounted on /srv"


def test_a_program_that_outlives_a_killed_agent_keeps_the_drive(host: Host) -> None:
    (host.programs / "hold").touch()
    code = (
        "import asyncio, sys, pathlib; from ppec_agentd.nvme.host_drives import HostDrives as H; "
        "d = H(30, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])); asyncio.run(d.erase(d.read(sys.argv[3])))"
    )
    agent = subprocess.Popen([sys.executable, "-c", code, str(host.locks), str(host.tree.root), ONE])
    try:
        wait_until(lambda: host.changing() == [FORMAT], "the format has begun", timeout_s=60, every_s=0.05)
    finally:
        agent.kill()
        agent.wait(10)
    with (host.locks / f"{ONE}.lock").open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (host.programs / "hold").unlink()
        host.erase()
    assert host.changing() == [FORMAT, FORMAT], "the next agent has waited for it"
