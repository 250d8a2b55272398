# SPDX-License-Identifier: Apache-2.0
"""Images leave the cache when no VM needs them for long, and never while one may."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ppec_agentd.actions.context import HostContext
from ppec_agentd.assembly import make_eviction, prepare_state
from ppec_agentd.disks import FakeDisks, QemuImg, VmFolder
from ppec_agentd.housekeeping import Housekeeping
from ppec_agentd.hypervisor import Domain, ObservedDisk
from ppec_agentd.image_chains import names_in
from ppec_agentd.image_eviction import ImageEviction, chains_of, evictable
from ppec_agentd.image_files import KeptImage
from ppec_agentd.image_format import built_on
from ppec_agentd.images import CachedImage
from ppec_agentd.places import Places, Pool
from ppec_agentd.report import ReportSource
from ppec_agentd.settings import Settings
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState
from ppec_lab.conditions import wait_until

DAY_S = 86400.0
KEEP_S = 7 * DAY_S
A, B = "a" * 64, "b" * 64


# --- the decision -----------------------------------------------------------------------------------------------


def kept(sha256: str, last_used_s: float) -> KeptImage:
    return KeptImage(Path(f"/images/{sha256}.raw"), sha256, 1, last_used_s)


@pytest.mark.parametrize(
    ("age_s", "in_use", "goes"),
    [
        (KEEP_S + 1, frozenset(), True),
        (KEEP_S + 1, frozenset({B}), True),
        (KEEP_S + 1, frozenset({A}), False),
        (KEEP_S, frozenset(), False),
        (0.0, frozenset(), False),
        (-DAY_S, frozenset(), False),
    ],
    ids=["old", "old, another used", "old and used", "not yet", "new", "clock set back"],
)
def test_an_image_goes_when_nobody_uses_it_and_nobody_did_for_long(
    age_s: float, in_use: frozenset[str], goes: bool
) -> None:
    assert [image.sha256 for image in evictable([kept(A, 1e9 - age_s)], in_use, 1e9, KEEP_S)] == [A] * goes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"/var/lib/ppec/images/{A}.raw", {A}),
        (f'json:{{"file": {{"filename": "../images/{A}.qcow2"}}}}', {A}),
        (f"file:{A}", {A}),
        ("/srv/disk.raw", set()),
        ("c" * 65, set()),
    ],
)
def test_an_image_is_recognised_however_it_is_named(text: str, found: set[str]) -> None:
    assert names_in(text) == found


# --- what is in use ---------------------------------------------------------------------------------------------


def images_in_use(domains: list[Domain], vms_dir: Path) -> set[str]:
    """All that can be told, if all can."""
    chains = chains_of(domains, Places(vms_dir))
    assert chains.untold == set()
    return chains.named


def domain(*paths: str, opened_as: str = "qcow2") -> Domain:
    disks = tuple(ObservedDisk(path, opened_as) for path in paths)
    return Domain(uuid.uuid4(), "by-hand", VmState.STOPPED, 1, 64, disks=disks)


@pytest.mark.parametrize("maker", [FakeDisks(), QemuImg(60)], ids=["fake", "qemu-img"])
def test_a_disk_in_a_vms_folder_uses_its_image_without_any_domain(tmp_path: Path, maker: FakeDisks | QemuImg) -> None:
    image = tmp_path / f"{A}.raw"
    image.write_bytes(bytes(1024 * 1024))
    folder = tmp_path / "vms" / str(uuid.uuid4())
    folder.mkdir(parents=True)
    assert images_in_use([], tmp_path / "vms") == set()
    (folder / "console.log").write_text(f"/images/{B}.raw, says the guest")
    asyncio.run(maker.make_overlay(folder / "root.qcow2", CachedImage(image, "raw", 1024 * 1024), 1))
    assert images_in_use([], tmp_path / "vms") == {A}


@pytest.mark.parametrize("maker", [FakeDisks(), QemuImg(60)], ids=["fake", "qemu-img"])
def test_so_does_one_in_a_storage_pool(tmp_path: Path, maker: FakeDisks | QemuImg) -> None:
    image = tmp_path / f"{A}.raw"
    image.write_bytes(bytes(1024 * 1024))
    pool = Pool("fast", tmp_path / "fast")
    places = Places(tmp_path / "vms", {"fast": pool})
    folder = pool.path / str(uuid.uuid4())
    folder.mkdir(parents=True)
    asyncio.run(maker.make_overlay(folder / "root.qcow2", CachedImage(image, "raw", 1024 * 1024), 1))
    # What others keep in a pool is not looked at.
    (pool.path / "lost+found").mkdir()
    (pool.path / "lost+found" / "old.qcow2").write_bytes(b"QFI\xfb")
    chains = chains_of([], places)
    assert (chains.named, chains.untold) == ({A}, set())


@pytest.mark.parametrize("gone", ["missing", "not-mounted"])
def test_disks_of_a_pool_that_cannot_be_seen_may_be_built_on_anything(tmp_path: Path, gone: str) -> None:
    path = tmp_path / "fast"
    if gone == "not-mounted":
        path.mkdir()
    chains = chains_of([], Places(tmp_path / "vms", {"fast": Pool("fast", path, mounted=True)}))
    (why,) = chains.untold
    assert why.startswith("the disks of pool fast can't be seen: ")


@pytest.mark.parametrize("made_as", ["qcow2", "qcow", "qed"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_disks_of_domains_made_by_hand_count(tmp_path: Path, made_as: str, told: bool) -> None:
    elsewhere = tmp_path / "mine.disk"
    image = tmp_path / f"{A}.raw"
    image.write_bytes(bytes(1024 * 1024))
    command = ["qemu-img", "create", "-q", "-f", made_as, "-F", "raw", "-b", str(image), str(elsewhere)]
    subprocess.run(command, check=True, timeout=60)
    by_hand = domain(str(elsewhere), f"/images/{B}.raw", "/dev/null", opened_as=made_as if told else "")
    chains = chains_of([by_hand], Places(tmp_path / "vms"))
    assert chains.named == {A, B}
    assert bool(chains.untold) == (made_as == "qed"), "its chain is not followed"


def test_a_disk_that_cannot_be_understood_may_be_built_on_anything(tmp_path: Path) -> None:
    folder = tmp_path / "vms" / "vm"
    folder.mkdir(parents=True)
    (folder / "root.qcow2").write_bytes(b"QFI\xfb cut")
    (reason,) = chains_of([], Places(tmp_path / "vms")).untold
    assert reason == f"'{folder}/root.qcow2' can't be read: the qcow2 header is cut short"


def qcow2_header(offset: int, length: int) -> bytes:
    return struct.pack(">4sIQIIQI", b"QFI\xfb", 3, offset, length, 16, 1 << 30, 0) + bytes(68)


WRONG_HEADERS = {
    "offset 2^64-1": qcow2_header(2**64 - 1, 1023),
    "offset 2^63": qcow2_header(1 << 63, 1023),
    "offset 2^63-1": qcow2_header((1 << 63) - 1, 1),
    "offset 2^62": qcow2_header(1 << 62, 1023),
    "offset after the end": qcow2_header(1 << 20, 100),
    "offset 2^63, no length": qcow2_header(1 << 63, 0),
    "offset in the header": qcow2_header(8, 4),
    "length after the end": qcow2_header(104, 1),
    "length 2^32-1": qcow2_header(104, 2**32 - 1) + bytes(4096),
    "name too long": qcow2_header(104, 1024) + bytes(4096),
    "cut short": qcow2_header(104, 1)[:20],
    "magic alone": b"QFI\xfb",
}


@pytest.mark.parametrize("header", WRONG_HEADERS.values(), ids=WRONG_HEADERS)
def test_a_header_that_cannot_be_right_is_an_oserror(tmp_path: Path, header: bytes) -> None:
    disk = tmp_path / "root.qcow2"
    disk.write_bytes(header)
    with (
        disk.open("rb") as file,
        pytest.raises(OSError, match=r"the qcow2 header (is cut|can't be right)"),
    ):
        built_on(file)


@pytest.mark.parametrize("name", [b"\xff\xfe\x80", b"\xff" * 1023, b"a b\nc"], ids=repr)
def test_a_backing_file_of_odd_bytes_is_a_name_like_any_other(tmp_path: Path, name: bytes) -> None:
    disk = tmp_path / "vms" / "vm" / "root.qcow2"
    disk.parent.mkdir(parents=True)
    disk.write_bytes(qcow2_header(104, len(name)) + name)
    (reason,) = chains_of([], Places(tmp_path / "vms")).untold
    assert repr(os.fsdecode(name))[1:-1] in reason
    reason.encode()


HOSTILE_LOGS = {
    **WRONG_HEADERS,
    "names an image": qcow2_header(104, 68) + f"{B}.raw".encode(),
    "describes a disk": f'{{"backing": "/images/{B}.raw"}}'.encode(),
}


@pytest.mark.parametrize("log", HOSTILE_LOGS.values(), ids=HOSTILE_LOGS)
def test_nothing_a_guest_says_on_its_console_counts(tmp_path: Path, log: bytes) -> None:
    vm_id = uuid.uuid4()
    folder = VmFolder(tmp_path / "vms", vm_id)
    folder.root.mkdir()
    folder.make()
    folder.root_disk.write_bytes(qcow2_header(104, 68) + f"{A}.raw".encode())
    folder.console_log.write_bytes(log)
    folder.seed.write_bytes(log)
    disks = (ObservedDisk(str(folder.root_disk), "qcow2"), ObservedDisk(str(folder.seed), "raw"))
    ours = Domain(vm_id, "ours", VmState.RUNNING, 1, 64, disks=disks)
    assert images_in_use([ours], tmp_path / "vms") == {A}
    assert images_in_use([], tmp_path / "vms") == {A}


@pytest.mark.parametrize("content", HOSTILE_LOGS.values(), ids=HOSTILE_LOGS)
def test_what_is_opened_as_raw_is_built_on_nothing_whatever_it_holds(tmp_path: Path, content: bytes) -> None:
    disk = tmp_path / "mine.img"
    disk.write_bytes(content)
    assert images_in_use([domain(str(disk), opened_as="raw")], tmp_path / "vms") == set()
    assert images_in_use([domain(f"/images/{A}.raw", opened_as="raw")], tmp_path / "vms") == {A}, "it may be an image"


def test_what_one_domain_opens_as_raw_and_another_does_not_is_read(tmp_path: Path) -> None:
    disk = tmp_path / "mine.img"
    disk.write_bytes(qcow2_header(104, 68) + f"{A}.raw".encode())
    both = [domain(str(disk), opened_as="raw"), domain(str(disk), opened_as="qcow2")]
    for domains in (both, both[::-1]):
        assert images_in_use(domains, tmp_path / "vms") == {A}


# --- the eviction -----------------------------------------------------------------------------------------------


def age(context: HostContext, by_s: float = KEEP_S + DAY_S) -> None:
    """Sets back every image's last use."""
    for image in context.images.kept():
        stamp = image.path.with_name(image.path.name + ".verified")
        os.utime(stamp, (time.time() - by_s, time.time() - by_s))


def eviction_of(agent: Any) -> ImageEviction:
    return make_eviction(agent.settings, agent.context)


def cached(agent: Any) -> list[str]:
    return [image.sha256 for image in agent.context.images.kept()]


def run(scenario: Any) -> Any:
    return asyncio.run(scenario)


def test_an_images_life(settings: Settings, words: Any, vm: Callable[..., Any]) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            eviction = eviction_of(agent)
            spec = vm()
            await agent.create(spec)
            age(agent.context)
            assert await eviction.once() == (), "a VM uses it"
            await agent.delete(spec.vm_id, operation="op-2")
            assert await eviction.once() == (), "its time began when it was last seen in use"
            age(agent.context)
            assert await eviction.once() == (words.image_sha256,)
            assert list(settings.storage.images.iterdir()) == [], "the stamp is gone as well"
            (again,) = await agent.create(vm(), operation="op-3")
            assert again.problem is None
            assert cached(agent) == [words.image_sha256], "it was fetched again"

    run(scenario())


def test_a_use_is_remembered_over_a_restart(settings: Settings, words: Any, vm: Callable[..., Any]) -> None:
    async def scenario() -> None:
        image = vm().root_disk.image
        async with words.open_agent(settings) as agent:
            await agent.context.images.ensure(image)
            age(agent.context)
            await agent.context.images.ensure(image)
        async with words.open_agent(settings) as agent:
            assert await eviction_of(agent).once() == ()
            age(agent.context)
        async with words.open_agent(settings) as agent:
            assert await eviction_of(agent).once() == (words.image_sha256,)

    run(scenario())


def test_what_a_create_holds_stays_until_its_disk_is_made(
    settings: Settings, words: Any, vm: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            images, eviction = agent.context.images, eviction_of(agent)
            # All preparations are taken, so the create gets its image and waits before its disk.
            for _ in range(settings.limits.concurrent_preparations):
                await agent.context.preparations.acquire()
            spec = vm()
            creating = asyncio.create_task(agent.create(spec))
            asked = "the create has asked for its image"
            await asyncio.to_thread(wait_until, lambda: images.uses().get(words.image_sha256) == 2, asked, timeout_s=60)
            # Joins it, or comes after it: the create has its image when this has.
            await images.ensure(spec.root_disk.image)
            age(agent.context)
            assert await eviction.once() == ()
            for _ in range(settings.limits.concurrent_preparations):
                agent.context.preparations.release()
            (made,) = await creating
            assert made.problem is None
            assert await eviction.once() == ()
            assert cached(agent) == [words.image_sha256]

    run(scenario())


def test_a_use_between_the_look_and_the_eviction_keeps_the_image(
    settings: Settings, words: Any, vm: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            images = agent.context.images
            await images.ensure(vm().root_disk.image)
            (one,) = images.kept()
            before = images.uses()
            with images.held(one.sha256):
                assert not await images.evict(one, images.uses()), "held"
            assert not await images.evict(one, before), "its disk may be younger than the look"
            flight = asyncio.create_task(images.ensure(vm().root_disk.image))
            await asyncio.sleep(0)
            assert not await images.evict(one, images.uses()), "under way"
            await flight
            assert await images.evict(one, images.uses())

    run(scenario())


def test_who_wants_an_image_that_is_just_being_evicted_gets_a_fresh_one(
    settings: Settings, words: Any, vm: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            images = agent.context.images
            for _ in range(20):
                await images.ensure(vm().root_disk.image)
                (one,) = images.kept()
                evicting = asyncio.create_task(images.evict(one, images.uses()))
                await asyncio.sleep(0)
                found = await images.ensure(vm().root_disk.image)
                assert await evicting
                assert found.path.read_bytes() == words.image
                assert cached(agent) == [words.image_sha256]

    run(scenario())


def test_a_hypervisor_or_a_disk_that_cannot_be_asked_keeps_all(
    settings: Settings, words: Any, vm: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.context.images.ensure(vm().root_disk.image)
            age(agent.context)
            folder = settings.storage.vms / str(uuid.uuid4())
            folder.mkdir()
            (folder / "root.qcow2").write_bytes(b"QFI\xfb")
            assert await eviction_of(agent).once() == ()
            (folder / "root.qcow2").unlink()
            eviction = eviction_of(agent)
            await agent.hypervisor.close()
            with pytest.raises(PpecError) as refused:
                await eviction.once_due()
            assert refused.value.code == "hypervisor.unavailable"
            await agent.hypervisor.open()
            await eviction.once_due()
            assert cached(agent) == []

    run(scenario())


def test_a_chain_whose_end_is_out_of_sight_keeps_all_and_is_said_once(
    settings: Settings, words: Any, vm: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.context.images.ensure(vm().root_disk.image)
            age(agent.context)
            eviction = eviction_of(agent)
            place = settings.storage.state_dir
            top, mid = place / "top.qcow2", place / "mid.qcow2"
            top.write_bytes(qcow2_header(104, 9) + b"mid.qcow2")
            by_hand = domain(str(top))
            agent.hypervisor.make_by_hand(by_hand)
            with capture_logs() as logs:
                assert await eviction.once() == ()
                assert await eviction.once() == ()
            assert [entry["why"] for entry in logs] == [[f"'{mid}' is not there, or out of the agent's sight"]]
            mid.write_bytes(qcow2_header(104, 68) + f"{words.image_sha256}.raw".encode())
            assert await eviction.once() == ()
            age(agent.context)
            assert await eviction.once() == (), "it is named, and was used at the last look"
            mid.write_bytes(qcow2_header(104, 68) + f"{A}.raw".encode())
            age(agent.context)
            assert await eviction.once() == (words.image_sha256,)

    run(scenario())


def test_a_raw_disk_made_by_hand_keeps_no_image(settings: Settings, words: Any, vm: Callable[..., Any]) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.context.images.ensure(vm().root_disk.image)
            age(agent.context)
            disk = settings.storage.state_dir / "mine.img"
            disk.write_bytes(b"QFI\xfb, writes the guest")
            agent.hypervisor.make_by_hand(domain(str(disk), opened_as="qcow2"))
            assert await eviction_of(agent).once() == (), "it can't be understood"
            (seen,) = await agent.hypervisor.domains()
            agent.hypervisor.make_by_hand(replace(seen, disks=(ObservedDisk(str(disk), "raw"),)))
            assert await eviction_of(agent).once() == (words.image_sha256,)

    run(scenario())


@pytest.mark.parametrize("log", HOSTILE_LOGS.values(), ids=HOSTILE_LOGS)
def test_no_guest_keeps_the_hosts_images_from_leaving(
    settings: Settings, words: Any, vm: Callable[..., Any], log: bytes
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.context.images.ensure(vm().root_disk.image)
            age(agent.context)
            folder = VmFolder(settings.storage.vms, uuid.uuid4())
            folder.make()
            folder.console_log.write_bytes(log)
            assert await eviction_of(agent).once() == (words.image_sha256,)

    run(scenario())


def test_files_that_are_no_images_stay(settings: Settings, words: Any, vm: Callable[..., Any]) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            await agent.context.images.ensure(vm().root_disk.image)
            for name in ("README", f"{A}.iso", f"{A}.raw.bak", f".{A}.raw.partial"):
                path = settings.storage.images / name
                path.touch()
                os.utime(path, (0, 0))
            age(agent.context)
            assert await eviction_of(agent).once() == (words.image_sha256,)
            assert len(list(settings.storage.images.iterdir())) == 4

    run(scenario())


def test_housekeeping_evicts_once_in_its_interval(settings: Settings, words: Any, vm: Callable[..., Any]) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            source = ReportSource("h1", agent.context)
            housekeeping = Housekeeping(agent.actions, source, (eviction_of(agent).once_due,))
            for left in ([], [words.image_sha256]):
                await agent.context.images.ensure(vm().root_disk.image)
                age(agent.context)
                await housekeeping.once()
                assert cached(agent) == left

    run(scenario())


def test_what_a_crash_left_half_fetched_goes_at_the_start(settings: Settings) -> None:
    settings.storage.images.mkdir(parents=True)
    for name in (f".{A}.raw.partial", f".{A}.raw.verified.partial", f"{B}.raw"):
        (settings.storage.images / name).touch()
    prepare_state(settings.storage).close()
    assert [path.name for path in settings.storage.images.iterdir()] == [f"{B}.raw"]


def test_an_image_without_its_stamp_is_as_old_as_its_file(
    settings: Settings, words: Any, vm: Callable[..., Any]
) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            found = await agent.context.images.ensure(vm().root_disk.image)
            found.path.with_name(found.path.name + ".verified").unlink()
            assert await eviction_of(agent).once() == ()
            os.utime(found.path, (0, 0))
            assert await eviction_of(agent).once() == (words.image_sha256,)

    run(scenario())


def test_the_default_is_a_week(settings: Settings) -> None:
    assert settings.storage.image_keep_s == KEEP_S
