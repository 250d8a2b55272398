# SPDX-License-Identifier: Apache-2.0
"""The image cache: fetched once, checked always, and never a foreign file behind an image."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.disks import FakeDisks, QemuImg, VmFolder
from ppec_agentd.images import CachedImage, FetchLimits, ImageCache
from ppec_agentd.settings import TlsSettings
from ppec_contract.errors import PpecError
from ppec_contract.vm import ImageSource

CONTENT = random.Random(3).randbytes(3 * 1024 * 1024 + 17)
CHANGED = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])


def source(url: str, content: bytes = CONTENT, **changes: Any) -> ImageSource:
    fields = {
        "name": "debian",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "format": "raw",
        "url": url,
    }
    return ImageSource.model_validate(fields | changes)


def cache_of(folder: Path, tls: dict[str, str] | None = None) -> ImageCache:
    return ImageCache(folder / "images", TlsSettings.model_validate(tls or {}), FetchLimits(30))


def ensure(cache: ImageCache, image: ImageSource, times: int = 1) -> list[CachedImage]:
    async def scenario() -> list[CachedImage]:
        return await asyncio.gather(*(cache.ensure(image) for _ in range(times)))

    return asyncio.run(scenario())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "images").iterdir())


def test_many_that_want_it_at_once_fetch_it_once(tmp_path: Path, orchestrator: Callable[..., Any]) -> None:
    server = orchestrator()
    server.files["/v1/images/debian/content"] = CONTENT
    image = source(f"{server.url}/v1/images/debian/content")
    cache = cache_of(tmp_path, server.tls)
    found = ensure(cache, image, times=8)
    assert len(set(found)) == 1
    assert found[0].path.read_bytes() == CONTENT
    assert found[0].virtual_size_bytes == len(CONTENT)
    assert len(server.requests) == 1
    assert server.peers == ["ppec://host/h1"]
    assert files(tmp_path) == [f"{image.sha256}.raw", f"{image.sha256}.raw.verified"]
    # Another process finds it there.
    ensure(cache_of(tmp_path, server.tls), image)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("served", "code"),
    [
        (CONTENT[:-1], "image.checksum_mismatch"),
        (CONTENT + b"x", "image.checksum_mismatch"),
        (CHANGED, "image.checksum_mismatch"),
        (None, "image.fetch_failed"),
    ],
    ids=["short", "long", "changed", "absent"],
)
def test_what_is_not_the_image_is_not_kept(
    tmp_path: Path, orchestrator: Callable[..., Any], served: bytes | None, code: str
) -> None:
    server = orchestrator()
    if served is not None:
        server.files["/image"] = served
    with pytest.raises(PpecError) as refused:
        ensure(cache_of(tmp_path, server.tls), source(f"{server.url}/image"))
    assert refused.value.code == code
    assert files(tmp_path) == []
    server.files["/image"] = CONTENT
    ensure(cache_of(tmp_path, server.tls), source(f"{server.url}/image"))


@pytest.mark.parametrize("identity", ["ppec://host/h2", "ppec://operator/eve"])
def test_another_member_of_the_fleet_cannot_play_orchestrator(
    tmp_path: Path, orchestrator: Callable[..., Any], identity: str
) -> None:
    server = orchestrator(identity)
    server.files["/image"] = CONTENT
    with pytest.raises(PpecError, match="wanted ppec://orchestrator/main"):
        ensure(cache_of(tmp_path, server.tls), source(f"{server.url}/image"))
    assert server.requests == []


def test_a_server_outside_the_fleet_is_not_believed(tmp_path: Path, orchestrator: Callable[..., Any]) -> None:
    server, other = orchestrator(), orchestrator()
    with pytest.raises(PpecError, match="certificate verify failed"):
        ensure(cache_of(tmp_path, server.tls), source(f"{other.url}/image"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "flipped, size and time kept"])
def test_a_damaged_image_is_noticed_and_fetched_again(tmp_path: Path, damage: str) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(CONTENT)
    (image,) = ensure(cache_of(tmp_path), source(origin.as_uri()))
    before = image.path.stat()
    damaged = CONTENT[:1000] if damage == "truncated" else CHANGED
    if damage == "flipped, size and time kept":
        # What the size and time don't tell, the inode does.
        (tmp_path / "fake").write_bytes(damaged)
        (tmp_path / "fake").replace(image.path)
        os.utime(image.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        # The kernel's clock for files stands still for some milliseconds.
        while image.path.stat().st_mtime_ns == before.st_mtime_ns:
            image.path.write_bytes(damaged)
    (again,) = ensure(cache_of(tmp_path), source(origin.as_uri()))
    assert again.path.read_bytes() == CONTENT


def test_the_folder_lets_qemus_user_through_whatever_the_umask(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(CONTENT)
    before = os.umask(0o027)
    try:
        (image,) = ensure(cache_of(tmp_path), source(origin.as_uri()))
    finally:
        os.umask(before)
    assert stat.S_IMODE(image.path.parent.stat().st_mode) == 0o711
    assert stat.S_IMODE(image.path.stat().st_mode) == 0o644


@pytest.mark.parametrize("closed", [True, False], ids=["agent-stops", "too-slow"])
def test_a_fetch_has_an_end(tmp_path: Path, closed: bool) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(CONTENT)
    image = source(origin.as_uri())

    async def scenario() -> None:
        cache = ImageCache(tmp_path / "images", TlsSettings(), FetchLimits(30 if closed else 0))
        if closed:
            cache._closing.set()
        with pytest.raises(PpecError, match="the agent stops" if closed else "not done in 0 s"):
            await cache.ensure(image)

    asyncio.run(scenario())
    assert files(tmp_path) == []


def test_a_lost_stamp_costs_a_look_and_no_fetch(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(CONTENT)
    (image,) = ensure(cache_of(tmp_path), source(origin.as_uri()))
    origin.unlink()
    image.path.with_name(image.path.name + ".verified").write_text("{")
    assert ensure(cache_of(tmp_path), source(origin.as_uri())) == [image]


def qcow2(*, backing: int = 0, version: int = 3, encryption: int = 0, features: int = 0) -> bytes:
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", version, backing, 9 if backing else 0, 16, 7 * 2**20, encryption)
    return head.ljust(72, b"\0") + struct.pack(">Q", features) + bytes(1000)


@pytest.mark.parametrize(
    ("content", "declared", "why"),
    [
        (qcow2(backing=600), "qcow2", "backing file"),
        (qcow2(features=4), "qcow2", "external data file"),
        (qcow2(encryption=1), "qcow2", "encrypted"),
        (qcow2(version=9), "qcow2", "version 9"),
        (qcow2()[:60], "qcow2", "cut short"),
        (qcow2(), "raw", "is a qcow2 file"),
        (CONTENT, "qcow2", "is not a qcow2 file"),
    ],
    ids=["backing", "data-file", "encrypted", "version", "short", "disguised", "not-qcow2"],
)
def test_an_image_that_leads_elsewhere_is_refused(tmp_path: Path, content: bytes, declared: str, why: str) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(content)
    with pytest.raises(PpecError, match=why) as refused:
        ensure(cache_of(tmp_path), source(origin.as_uri(), content, format=declared))
    assert refused.value.code == "image.invalid"
    assert files(tmp_path) == []


@pytest.mark.parametrize("maker", [FakeDisks(), QemuImg(60)], ids=["fake", "qemu-img"])
def test_an_overlay_is_made_over_the_image_and_never_smaller(tmp_path: Path, maker: FakeDisks | QemuImg) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(CONTENT)
    (image,) = ensure(cache_of(tmp_path), source(origin.as_uri()))
    disk = tmp_path / "root.qcow2"
    asyncio.run(maker.make_overlay(disk, image, 8))
    assert disk.stat().st_size > 0
    with pytest.raises(PpecError, match="smaller than its image's 4 MiB") as refused:
        asyncio.run(maker.make_overlay(tmp_path / "other", image, 3))
    assert refused.value.code == "request.invalid"
    assert not (tmp_path / "other").exists()


def test_qemu_img_that_fails_says_why(tmp_path: Path) -> None:
    absent = CachedImage(tmp_path / "absent", "raw", 1)
    with pytest.raises(PpecError, match="qemu-img create ended with 1") as failed:
        asyncio.run(QemuImg(60).make_overlay(tmp_path / "disk", absent, 8))
    assert failed.value.code == "vm.create_failed"


def test_a_link_in_place_of_a_vms_folder_is_removed_and_not_followed(tmp_path: Path, vm: Any) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("keep")
    folder = VmFolder(tmp_path / "vms", vm().vm_id)
    folder.root.mkdir()
    folder.path.symlink_to(precious)
    assert folder.remove()
    assert (precious / "data").read_text() == "keep"
    assert not folder.remove()
