# SPDX-License-Identifier: Apache-2.0
"""A disk's chain is followed to its end; what can't be told is said, never taken for nothing."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ppec_agentd.hypervisor import ObservedDisk
from ppec_agentd.image_chains import LONGEST_CHAIN, Chains, named_by, read_disk
from ppec_agentd.image_format import BuiltOn

A, B = "a" * 64, "b" * 64
IMAGE = f"/images/{A}.raw"


def reader(files: dict[str, BuiltOn | bytes | OSError]) -> Callable[[str], BuiltOn | bytes]:
    """A host with these files, and no others."""

    def read(path: str) -> BuiltOn | bytes:
        found = files.get(path, FileNotFoundError(2, "No such file"))
        if isinstance(found, OSError):
            raise found
        return found

    return read


def followed(files: dict[str, BuiltOn | bytes | OSError], *disks: ObservedDisk) -> Chains:
    chains = Chains(reader(files))
    for disk in disks:
        chains.follow(disk)
    return chains


def on(name: str, backing_format: str = "qcow2") -> BuiltOn:
    return BuiltOn(os.fsencode(name), backing_format)


TOP = ObservedDisk("/srv/top", "qcow2")
TOLD: dict[str, dict[str, BuiltOn | bytes | OSError]] = {
    "at once": {"/srv/top": on(IMAGE, "raw")},
    "through another": {"/srv/top": on("/other/mid"), "/other/mid": on(IMAGE, "raw")},
    "relative to who names it": {"/srv/top": on("../other/mid"), "/srv/../other/mid": on(f"../images/{A}.raw", "raw")},
    "no format said": {"/srv/top": on("mid", ""), "/srv/mid": on(IMAGE, "")},
    "an image that is gone": {"/srv/top": on(f"/images/{A}.qcow2")},
    "as its data": {"/srv/top": BuiltOn(data_file=IMAGE.encode())},
    "in another format": {"/srv/top": f'{{"backing": "{IMAGE}"}}'.encode()},
}


@pytest.mark.parametrize("files", TOLD.values(), ids=TOLD)
def test_an_image_is_found_wherever_it_stands_in_the_chain(files: dict[str, BuiltOn | bytes | OSError]) -> None:
    chains = followed(files, TOP)
    assert chains.named == {A}
    assert chains.untold == set()


UNTOLD: dict[str, tuple[dict[str, BuiltOn | bytes | OSError], str]] = {
    "a protocol": ({"/srv/top": on("nbd:localhost:10809")}, "'/srv/top' is built on 'nbd:localhost:10809'"),
    "json": ({"/srv/top": on('json:{"driver": "qcow2"}')}, """'/srv/top' is built on 'json:{"driver": "qcow2"}'"""),
    "no path": ({"/srv/top": on("mid\0")}, r"'/srv/top' is built on 'mid\x00'"),
    "a data file elsewhere": ({"/srv/top": BuiltOn(data_file=b"rbd:x")}, "'/srv/top' is built on 'rbd:x'"),
    "not there": ({"/srv/top": on("mid")}, "'/srv/mid' is not there, or out of the agent's sight"),
    "no disk": ({}, "'/srv/top' is not there, or out of the agent's sight"),
    "unreadable": ({"/srv/top": PermissionError(13, "Denied")}, "'/srv/top' can't be read: Denied"),
    "below": ({"/srv/top": on("mid"), "/srv/mid": OSError("broken")}, "'/srv/mid' can't be read: broken"),
    "vmdk": (
        {"/srv/top": on("m", "vmdk"), "/srv/m": b"?"},
        "'/srv/m' is in a format whose backing files are not followed",
    ),
    "QED": (
        {"/srv/top": on("m", ""), "/srv/m": b"QED\0"},
        "'/srv/m' is in a format whose backing files are not followed",
    ),
}


@pytest.mark.parametrize(("files", "reason"), UNTOLD.values(), ids=UNTOLD)
def test_what_cannot_be_told_is_said(files: dict[str, BuiltOn | bytes | OSError], reason: str) -> None:
    assert followed(files, TOP).untold == {reason}


def test_what_could_be_named_before_the_end_was_lost_is_kept() -> None:
    chains = followed({"/srv/top": on(f"/srv/{A}-mid"), f"/srv/{A}-mid": on(f"json:{B}")}, TOP)
    assert chains.named == {A, B}
    assert len(chains.untold) == 1


def test_a_disk_that_is_elsewhere() -> None:
    chains = followed({}, ObservedDisk("", "raw", f"pool=images volume={A}.raw"))
    assert (chains.named, chains.untold) == ({A}, set()), "raw is built on nothing, wherever it is"
    (reason,) = followed({}, ObservedDisk("", "qcow2", "pool=p volume=v")).untold
    assert reason == "a disk in format qcow2 is at 'pool=p volume=v'"
    (reason,) = followed({}, ObservedDisk("pool/v")).untold
    assert reason == "a disk in format unknown is at 'pool/v'"


def test_a_loop_ends() -> None:
    chains = followed({"/srv/top": on("./mid"), "/srv/mid": on("top"), "/srv/own": on("own")}, TOP)
    chains.follow(ObservedDisk("/srv/own", "qcow2"))
    assert (chains.named, chains.untold) == (set(), set()), "all of it was read"


def test_a_chain_without_end_is_given_up() -> None:
    reads: list[str] = []

    def read(path: str) -> BuiltOn:
        reads.append(path)
        return on(f"/srv/{len(reads)}")

    chains = Chains(read)
    chains.follow(TOP)
    assert len(reads) == LONGEST_CHAIN
    assert chains.untold == {f"'/srv/top' is built on more than {LONGEST_CHAIN} files"}


def test_what_many_share_is_read_once() -> None:
    reads: list[str] = []

    def read(path: str) -> BuiltOn:
        reads.append(path)
        return BuiltOn() if path == "/srv/mid" else on("mid")

    chains = Chains(read)
    for name in ("one", "two", "one"):
        chains.follow(ObservedDisk(f"/srv/{name}", "qcow2"))
    assert sorted(reads) == ["/srv/mid", "/srv/one", "/srv/two"]


def test_nothing_is_read_that_is_opened_as_raw() -> None:
    hostile: dict[str, BuiltOn | bytes | OSError] = {
        "/srv/raw": on(f"/images/{B}.raw"),
        "/srv/top": on("raw", "raw"),
    }
    chains = followed(hostile, ObservedDisk("/srv/raw", "raw"), TOP)
    assert (chains.named, chains.untold) == (set(), set())
    chains.follow(ObservedDisk("/srv/raw", "qcow2"))
    assert chains.named == {B}, "who opens it as something else is led there"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("mid", "/srv/mid"),
        ("../x/mid", "/srv/../x/mid"),
        ("/x/mid", "/x/mid"),
        ("./a:b", "/srv/a:b"),
        ("a:b", None),
        ("file:/x/mid", None),
        ("", None),
    ],
)
def test_a_name_is_a_path_as_qemu_takes_it(name: str, path: str | None) -> None:
    assert named_by("/srv/top", name) == path


# --- on files as qemu-img makes them ----------------------------------------------------------------------------


def qemu_img(*words: str, cwd: Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, timeout=60, cwd=cwd, capture_output=True)


def overlay(place: Path, name: str, backing: str, *options: str, backing_format: str = "qcow2") -> ObservedDisk:
    path = place / name
    path.parent.mkdir(exist_ok=True)
    format_words = ("-F", backing_format) if backing_format else ()
    qemu_img("create", "-q", "-f", "qcow2", *options, *format_words, "-b", backing, str(path), cwd=place)
    return ObservedDisk(str(path), "qcow2")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "images" / f"{A}.raw"
    path.parent.mkdir()
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize("options", [(), ("-o", "compat=0.10"), ("-o", "cluster_size=512")], ids=str)
def test_a_real_chain_of_relative_names(tmp_path: Path, image: Path, options: tuple[str, ...]) -> None:
    overlay(tmp_path, "mid/low.qcow2", f"../images/{A}.raw", *options, backing_format="raw")
    overlay(tmp_path, "mid/high.qcow2", "low.qcow2", *options)
    top = overlay(tmp_path, "top.qcow2", "mid/high.qcow2", *options)
    chains = Chains(read_disk)
    chains.follow(top)
    assert (chains.named, chains.untold) == ({A}, set())
    assert read_disk(top.path) == BuiltOn(b"mid/high.qcow2", "qcow2")
    (tmp_path / "mid/low.qcow2").unlink()
    broken = Chains(read_disk)
    broken.follow(top)
    assert broken.named == set()
    assert len(broken.untold) == 1


def test_a_symbolic_link_hides_no_image(tmp_path: Path, image: Path) -> None:
    (tmp_path / "link.raw").symlink_to(image)
    for disk in (
        ObservedDisk(str(tmp_path / "link.raw"), "raw"),
        overlay(tmp_path, "top.qcow2", "link.raw", backing_format="raw"),
    ):
        chains = Chains(read_disk)
        chains.follow(disk)
        assert (chains.named, chains.untold) == ({A}, set())


def test_a_data_file_counts(tmp_path: Path, image: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file=images/{A}.raw", str(disk), "1M", cwd=tmp_path)
    assert read_disk(str(disk)) == BuiltOn(data_file=f"images/{A}.raw".encode())
    chains = Chains(read_disk)
    chains.follow(ObservedDisk(str(disk), "qcow2"))
    assert (chains.named, chains.untold) == ({A}, set())


def test_a_raw_disk_whose_format_nobody_tells_is_built_on_nothing(tmp_path: Path, image: Path) -> None:
    chains = Chains(read_disk)
    chains.follow(ObservedDisk(str(image), ""))
    assert (chains.named, chains.untold) == ({A}, set())


def test_a_block_device_is_read_like_a_file(tmp_path: Path, image: Path) -> None:
    """On a loop device of the test's own."""
    top = overlay(tmp_path, "top.qcow2", str(image), backing_format="raw")
    done = subprocess.run(["losetup", "--find", "--show", top.path], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        assert stat.S_ISBLK(os.stat(device).st_mode)  # noqa: PTH116
        chains = Chains(read_disk)
        chains.follow(ObservedDisk(device, "qcow2"))
        assert (chains.named, chains.untold) == ({A}, set())
    finally:
        subprocess.run(["losetup", "--detach", device], check=True, timeout=60)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_disk(str(tmp_path / "pipe")) == b""
