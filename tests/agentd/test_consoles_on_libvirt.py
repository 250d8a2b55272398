# SPDX-License-Identifier: Apache-2.0
"""Consoles of real guests: every byte in order, whoever watches, through rotations and restarts of libvirtd."""

from __future__ import annotations

import asyncio
import base64
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import pytest

from ppec_agentd.consoles import Consoles
from ppec_agentd.hypervisor import Disk, Hypervisor
from ppec_contract.errors import PpecError
from ppec_contract.guest import MAX_CONSOLE_TAIL_BYTES, ReadConsole, ReadConsoleReply
from ppec_contract.vm import VmState
from ppec_lab.counting_guest import counted, counting_disk
from ppec_lab.hypervisor_hosts import LibvirtHost
from ppec_lab.private_libvirtd import private_libvirtd

pytestmark = [pytest.mark.anyio, pytest.mark.libvirt]
SOON_S = 120
# Logs are rotated that early, so that a test of seconds sees several.
ROTATED_AT = 65536


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    with tempfile.TemporaryDirectory(prefix="ppec-lv-", dir="/tmp") as folder:
        etc = Path(folder) / "etc"
        etc.mkdir()
        (etc / "virtlogd.conf").write_text(f"max_size = {ROTATED_AT}\nmax_backups = 3\n")
        with private_libvirtd(Path(folder)) as daemon:
            yield LibvirtHost(daemon, tmp_path_factory.mktemp("guests"), 2)


@pytest.fixture
def host(shared_host: LibvirtHost) -> Iterator[LibvirtHost]:
    yield shared_host
    shared_host.sweep()


@dataclass
class Console:
    """One VM that counts, and the consoles of its host."""

    hypervisor: Hypervisor
    consoles: Consoles
    vm_id: UUID
    log: Path

    def read(self, **request: object) -> AsyncGenerator[ReadConsoleReply, None]:
        asked = ReadConsole.model_validate({"vm_id": self.vm_id, **request})
        return self.consoles.read(asked, follow=True)


@asynccontextmanager
async def counting(host: LibvirtHost, place: Path, lines: int) -> AsyncIterator[Console]:
    """A VM that counts to `lines`, defined and not started."""
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    folder = place / "vms" / str(vm_id)
    folder.mkdir(parents=True)
    disk = counting_disk(folder / "root.img", lines)
    log = folder / "console.log"
    guest = replace(guest, disks=(Disk(str(disk), "raw", boot_order=1),), console_log=str(log))
    async with host.opened(disk_cache="writeback") as hypervisor:
        await hypervisor.define(guest)
        yield Console(hypervisor, Consoles(hypervisor, place / "vms"), vm_id, log)


@dataclass
class Got:
    """What a reader was given."""

    data: bytes = b""
    skipped_bytes: int = 0
    states: tuple[VmState, ...] = ()

    def add(self, piece: ReadConsoleReply) -> None:
        self.data += base64.b64decode(piece.data)
        self.skipped_bytes += piece.skipped_bytes
        self.states += (piece.state,) if piece.state is not None else ()


async def gather(pieces: AsyncGenerator[ReadConsoleReply, None], last: bytes, pause_s: float = 0) -> Got:
    """Until `last` has come, or the stream ended."""
    got = Got()
    async with asyncio.timeout(SOON_S), aclosing(pieces):
        async for piece in pieces:
            got.add(piece)
            if last in got.data:
                break
            await asyncio.sleep(pause_s)
    return got


async def refusal(call: Coroutine[None, None, None]) -> str:
    """The code of its error, or nothing."""
    try:
        await call
    except PpecError as error:
        return error.code
    return ""


def numbers(data: bytes) -> bytes:
    """From the guest's first line on; the firmware's words go before it."""
    return data[data.index(b"00000000\n") :]


async def test_two_readers_get_every_byte_in_order_through_rotations(host: LibvirtHost, tmp_path: Path) -> None:
    lines = 25_000
    async with counting(host, tmp_path, lines) as console:
        readers = [asyncio.create_task(gather(console.read(), b"%08x\n" % (lines - 1))) for _ in range(2)]
        await asyncio.sleep(0)
        await console.hypervisor.start(console.vm_id)
        for got in await asyncio.gather(*readers):
            assert got.skipped_bytes == 0
            assert numbers(got.data) == counted(lines)
        assert console.log.with_name("console.log.2").exists()


async def test_a_reader_that_comes_late_begins_with_the_tail(host: LibvirtHost, tmp_path: Path) -> None:
    lines = 2_000
    async with counting(host, tmp_path, lines) as console:
        await console.hypervisor.start(console.vm_id)
        await gather(console.read(), b"%08x\n" % (lines - 1))
        tail = console.read(tail_bytes=18)
        first = await anext(tail)
        assert base64.b64decode(first.data) == b"%08x\n%08x\n" % (lines - 2, lines - 1)
        assert first.state is VmState.RUNNING
        await tail.aclose()


async def test_what_is_typed_reaches_the_guest_and_its_answer_the_reader(host: LibvirtHost, tmp_path: Path) -> None:
    async with counting(host, tmp_path, 10) as console:
        await console.hypervisor.start(console.vm_id)
        await gather(console.read(), b"%08x\n" % 9)
        # A serial port holds few bytes: the guest's echo shows that none was lost on the way.
        typed = bytes(range(1, 256)) * 3
        reading = asyncio.create_task(gather(console.read(tail_bytes=0), typed))
        await asyncio.sleep(0.2)
        await console.consoles.write(console.vm_id, typed[:400])
        await console.consoles.write(console.vm_id, typed[400:])
        assert (await reading).data == typed


async def test_a_slow_reader_is_told_what_it_missed_and_holds_nobody_up(host: LibvirtHost, tmp_path: Path) -> None:
    lines = 60_000  # twice as much as the window holds
    last = b"%08x\n" % (lines - 1)
    async with counting(host, tmp_path, lines) as console:
        slow = console.read()
        got = Got()
        got.add(await anext(slow))
        fast = asyncio.create_task(gather(console.read(), last))
        await asyncio.sleep(0)
        await console.hypervisor.start(console.vm_id)
        # The slow one reads nothing until the other has it all.
        whole = (await fast).data
        assert numbers(whole) == counted(lines)
        rest = await gather(slow, last)
        assert rest.skipped_bytes == len(whole) - MAX_CONSOLE_TAIL_BYTES
        assert rest.data == whole[-MAX_CONSOLE_TAIL_BYTES:]


async def test_libvirtd_dies_in_mid_stream_and_nothing_is_lost(host: LibvirtHost, tmp_path: Path) -> None:
    lines = 60_000
    async with counting(host, tmp_path, lines) as console:
        reading = asyncio.create_task(gather(console.read(), b"%08x\n" % (lines - 1)))
        await asyncio.sleep(0)
        await console.hypervisor.start(console.vm_id)
        while not console.log.exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.05)
        await host.cut_off(console.hypervisor)
        await host.come_back(console.hypervisor)
        got = await reading
        assert got.skipped_bytes == 0
        assert numbers(got.data) == counted(lines)
        # The way in is made anew as well.
        echo = asyncio.create_task(gather(console.read(tail_bytes=0), b"again"))
        async with asyncio.timeout(SOON_S):
            while (code := await refusal(console.consoles.write(console.vm_id, b"again"))) != "":
                assert code == "hypervisor.unavailable"
                await asyncio.sleep(0.1)
        assert b"again" in (await echo).data


async def test_a_stream_outlives_a_stop_and_ends_with_the_vm(host: LibvirtHost, tmp_path: Path) -> None:
    async with counting(host, tmp_path, 10) as console:
        got = Got()
        reading = console.read()
        got.add(await anext(reading))
        assert got.states == (VmState.STOPPED,)
        with pytest.raises(PpecError) as off:
            await console.consoles.write(console.vm_id, b"x")
        assert off.value.code == "vm.wrong_state"
        for _ in range(2):
            await console.hypervisor.start(console.vm_id)
            before = got.data.count(b"%08x\n" % 9)
            async with asyncio.timeout(SOON_S):
                while got.data.count(b"%08x\n" % 9) == before:
                    got.add(await anext(reading))
            await console.hypervisor.destroy(console.vm_id)
        await console.hypervisor.undefine(console.vm_id)
        async with asyncio.timeout(SOON_S):
            async for piece in reading:
                got.add(piece)
        assert got.data.count(b"%08x\n" % 9) == 2


async def test_another_hand_on_the_console_is_named(host: LibvirtHost, tmp_path: Path) -> None:
    async with counting(host, tmp_path, 10) as console:
        await console.hypervisor.start(console.vm_id)
        other = await asyncio.create_subprocess_exec(
            "script", "-qec", f"virsh -c '{host.daemon.uri}' console {console.vm_id}", "/dev/null",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert other.stdout is not None
        async with asyncio.timeout(SOON_S):
            seen = b""
            while b"Connected" not in seen:
                seen += await other.stdout.read(1024)
        with pytest.raises(PpecError) as busy:
            await console.consoles.write(console.vm_id, b"x")
        assert busy.value.code == "console.busy"
        other.kill()
        await other.wait()
