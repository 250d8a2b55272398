# SPDX-License-Identifier: Apache-2.0
"""The console's window and the follower of its log, byte for byte, through rotations at every moment."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd.console_log import LogFollower, Window


@given(st.integers(1, 40), st.lists(st.one_of(st.binary(max_size=30), st.integers(1, 20)), max_size=30))
def test_a_reader_of_a_window_gets_all_but_what_it_is_told_it_missed(size: int, steps: list[bytes | int]) -> None:
    window, whole, position, got = Window(size), b"", 0, b""
    for step in [*steps, 10_000]:
        if isinstance(step, bytes):
            window.put(step)
            whole += step
            assert window.end - window.begin <= size
            continue
        data, skipped = window.take(position, step)
        assert len(data) <= step
        position += skipped
        assert data == whole[position : position + len(data)]
        position += len(data)
        got += data
    assert position == window.end == len(whole)


class Log:
    """Writes a log and rotates it as virtlogd does."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "console.log"
        self.backups = 3

    def write(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)

    def rotate(self) -> None:
        for number in range(self.backups - 1, 0, -1):
            older = self.path.with_name(f"console.log.{number - 1}")
            if older.exists():
                older.rename(self.path.with_name(f"console.log.{number}"))
        self.path.rename(self.path.with_name("console.log.0"))
        self.path.touch()


@pytest.fixture
def console(tmp_path: Path) -> Log:
    return Log(tmp_path)


def drain(follower: LogFollower) -> bytes:
    got = b""
    while data := follower.read():
        got += data
    return got


def test_a_log_that_is_not_there_yet_is_waited_for(console: Log) -> None:
    follower = LogFollower(console.path)
    assert follower.tail(10) == b""
    assert follower.read() == b""
    console.write(b"hello")
    assert drain(follower) == b"hello"
    follower.close()


@pytest.mark.parametrize("rotations", [1, 2, 3])
@pytest.mark.parametrize("unread", [b"", b"unread "])
def test_every_byte_comes_through_rotations(console: Log, rotations: int, unread: bytes) -> None:
    follower = LogFollower(console.path)
    console.write(b"begin ")
    assert follower.tail(100) == b"begin "
    console.write(unread)
    wanted = unread
    for number in range(rotations):
        console.rotate()
        console.write(b"%d " % number)
        wanted += b"%d " % number
    assert drain(follower) == wanted
    console.write(b"end")
    assert drain(follower) == b"end"
    follower.close()


def test_a_tail_reaches_into_the_rotated_file(console: Log) -> None:
    console.write(b"0123456789")
    console.rotate()
    console.write(b"abc")
    follower = LogFollower(console.path)
    assert [follower.tail(most) for most in (2, 3, 5, 100)] == [b"bc", b"abc", b"89abc", b"0123456789abc"]
    console.write(b"d")
    assert drain(follower) == b"d"
    follower.close()


def test_a_log_removed_and_made_anew_is_read_from_its_beginning(console: Log) -> None:
    console.write(b"one")
    follower = LogFollower(console.path)
    assert follower.tail(100) == b"one"
    console.path.unlink()
    assert follower.read() == b""
    console.write(b"two")
    assert drain(follower) == b"two"
    follower.close()


def test_a_link_in_the_log_s_place_is_not_followed(console: Log, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    console.path.symlink_to(tmp_path / "secret")
    follower = LogFollower(console.path)
    assert follower.tail(100) == b""
    assert follower.read() == b""


def test_no_file_stays_open(console: Log) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    console.write(b"x")
    follower = LogFollower(console.path)
    for _ in range(5):
        follower.tail(10)
        console.rotate()
        follower.read()
    follower.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_closed_follower_opens_nothing_any_more(console: Log) -> None:
    """A read may have been handed to a thread, and be begun only after whoever wanted it has left."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    console.write(b"x")
    follower = LogFollower(console.path)
    assert follower.tail(10) == b"x"
    follower.close()
    assert (follower.read(), follower.tail(10)) == (b"", b"")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
