# SPDX-License-Identifier: Apache-2.0
"""Nothing is removed that a process has open: seen on a real QEMU with an image below its disk."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.assembly import make_eviction
from ppec_agentd.image_files import KeptImage, remove_image
from ppec_agentd.image_guard import is_locked, lease, unopened
from ppec_agentd.settings import Settings
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until

A = "a" * 64


@pytest.fixture
def image(tmp_path: Path) -> KeptImage:
    path = tmp_path / f"{A}.raw"
    path.write_bytes(bytes(1 << 20))
    path.with_name(path.name + ".verified").write_text("{}")
    return KeptImage(path, A, 1 << 20, 0.0)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def qemu_on_overlay(place: Path, image: Path, *, locking: bool) -> Iterator[None]:
    """A guest that never runs, on a disk in two layers over the image; all of it is open."""
    below, below_format = image, "raw"
    for name in ("mid", "top"):
        path = place / f"{name}.qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", below_format, "-b", str(below), str(path)]
        subprocess.run(command, check=True, timeout=60)
        below, below_format = path, "qcow2"
    drive = f"if=virtio,format=qcow2,file={below}"
    if not locking:
        drive += ",file.locking=off,backing.file.locking=off,backing.backing.file.locking=off"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-S"]
    with subprocess.Popen(
        [*command, "-drive", drive, "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:
        try:
            assert qemu.stdin is not None
            assert qemu.stdout is not None
            assert "QMP" in qemu.stdout.readline()
            qemu.stdin.write('{"execute": "qmp_capabilities"}\n')
            qemu.stdin.flush()
            assert "return" in qemu.stdout.readline()
            yield
        finally:
            qemu.kill()


# --- QEMU -------------------------------------------------------------------------------------------------------


@pytest.mark.libvirt
@pytest.mark.parametrize("locking", [True, False], ids=["locking", "not locking"])
def test_an_image_below_a_guests_disk_is_kept(tmp_path: Path, image: KeptImage, locking: bool) -> None:
    with qemu_on_overlay(tmp_path, image.path, locking=locking):
        with opened(image.path) as file:
            assert is_locked(file) == locking
            assert lease(file) is False
        assert remove_image(image) is False
        assert image.path.with_name(image.path.name + ".verified").exists()
        assert image.path.exists()
    assert remove_image(image) is True
    assert [path.name for path in tmp_path.iterdir() if A in path.name] == []


@pytest.mark.libvirt
def test_the_locks_alone_tell_where_no_lease_is_to_be_had(tmp_path: Path, image: KeptImage) -> None:
    """The agent without CAP_LEASE, and an image that libvirt gave to QEMU's user."""
    os.chown(image.path, 65534, 65534)
    told = (
        "import os, sys; from ppec_agentd.image_guard import lease, unopened; from pathlib import Path\n"
        "with unopened(Path(sys.argv[1])) as alone: print(alone, lease(os.open(sys.argv[1], os.O_RDONLY)))"
    )
    command = ["setpriv", "--bounding-set=-lease", sys.executable, "-c", told, str(image.path)]

    def answer() -> str:
        return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout.strip()

    assert answer() == "True None"
    with qemu_on_overlay(tmp_path, image.path, locking=True):
        assert answer() == "False None"


@pytest.mark.libvirt
def test_the_agent_keeps_an_image_that_no_disk_it_knows_names_yet_qemu_has_open(
    settings: Settings, words: Any, vm: Callable[..., Any], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.context.images.ensure(vm().root_disk.image)
            eviction = make_eviction(agent.settings, agent.context)
            (kept,) = agent.context.images.kept()
            stamp = kept.path.with_name(kept.path.name + ".verified")
            os.utime(stamp, (0, 0))
            with qemu_on_overlay(tmp_path, kept.path, locking=True):
                assert await eviction.once() == ()
                assert stamp.stat().st_mtime > 0, "its time begins anew"
                os.utime(stamp, (0, 0))
                assert await eviction.once() == ()
            os.utime(stamp, (0, 0))
            assert await eviction.once() == (words.image_sha256,)

    asyncio.run(scenario())


# --- anybody ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_an_image_that_anybody_has_open_is_kept(image: KeptImage, mode: str) -> None:
    with image.path.open(mode):
        assert remove_image(image) is False
    assert remove_image(image) is True


def test_an_image_that_is_gone_already_is_gone(image: KeptImage) -> None:
    image.path.unlink()
    assert remove_image(image) is True


def test_what_cannot_be_asked_is_kept(image: KeptImage, tmp_path: Path) -> None:
    loop = tmp_path / f"{'b' * 64}.raw"
    loop.symlink_to(loop)
    with pytest.raises(PpecError) as refused:
        remove_image(KeptImage(loop, "b" * 64, 1, 0.0))
    assert refused.value.code == "internal.error"
    assert loop.is_symlink()


def test_who_opens_it_meanwhile_waits_and_does_the_agent_no_harm(image: KeptImage) -> None:
    """The kernel sends a signal to whom it takes a lease from; the default one would end this process."""
    done = threading.Event()

    def open_it() -> None:
        with image.path.open("rb"):
            done.set()

    other = threading.Thread(target=open_it, daemon=True)
    with opened(image.path) as file:
        assert lease(file) is True
        other.start()
        breaking = "the other is at the lease"
        wait_until(lambda: fcntl.fcntl(file, fcntl.F_GETLEASE) != fcntl.F_WRLCK, breaking, timeout_s=60)
        assert not done.is_set()
    other.join(60)
    assert done.is_set()


def test_it_is_alone_until_the_block_ends(image: KeptImage) -> None:
    with unopened(image.path) as alone:
        assert alone
        with pytest.raises(BlockingIOError):
            os.open(image.path, os.O_RDONLY | os.O_NONBLOCK)
    with opened(image.path), unopened(image.path) as alone:
        assert not alone
