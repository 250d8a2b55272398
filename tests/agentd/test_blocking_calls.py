# SPDX-License-Identifier: Apache-2.0
"""Blocking calls: bounded in number and time, and one that never returns takes nothing with it."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from ppec_agentd.blocking_calls import BlockingCalls, CallsExhaustedError, CallTimeoutError
from ppec_lab.conditions import wait_until

pytestmark = pytest.mark.anyio
SOON_S = 60.0
GIVE_UP_S = 0.05


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until_none_lingers(calls: BlockingCalls) -> None:
    await asyncio.to_thread(wait_until, lambda: calls.lingering == 0, "the hung calls end", timeout_s=SOON_S)


async def test_results_and_errors_come_back() -> None:
    calls = BlockingCalls(2)
    assert await calls.run(lambda: 7, SOON_S) == 7
    with pytest.raises(ZeroDivisionError):
        await calls.run(lambda: 1 // 0, SOON_S)


async def test_no_more_than_the_limit_run_at_once() -> None:
    calls, lock = BlockingCalls(3), threading.Lock()
    running, most = 0, 0

    def work(wait: threading.Barrier) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        wait.wait(SOON_S)
        with lock:
            running -= 1

    # Nine calls pass the barrier in threes: with fewer at a time it would never open.
    barrier = threading.Barrier(3)
    await asyncio.gather(*(calls.run(partial(work, barrier), SOON_S) for _ in range(9)))
    assert most == 3


async def test_hung_calls_give_their_slots_back_and_are_counted() -> None:
    calls, release = BlockingCalls(1), threading.Event()
    for hung in (1, 2):
        with pytest.raises(CallTimeoutError):
            await calls.run(partial(release.wait, SOON_S), GIVE_UP_S)
        assert calls.lingering == hung
    assert await calls.run(lambda: "next", SOON_S) == "next"
    release.set()
    await until_none_lingers(calls)


async def test_a_hung_call_is_known_by_what_it_is_about() -> None:
    calls, release = BlockingCalls(2), threading.Event()
    done: list[str] = []

    def work() -> None:
        release.wait(SOON_S)
        done.append("late")

    with pytest.raises(CallTimeoutError):
        await calls.run(work, GIVE_UP_S, about="web")
    assert await calls.run(lambda: 7, SOON_S, about="other") == 7
    assert (calls.lingers("web"), calls.lingers("other")) == (True, False)
    release.set()
    await asyncio.to_thread(wait_until, lambda: not calls.lingers("web"), "the hung call ends", timeout_s=SOON_S)
    assert done == ["late"]


async def test_too_many_hung_calls_stop_new_ones_until_they_end() -> None:
    calls, release = BlockingCalls(1, lingering_limit=1), threading.Event()
    with pytest.raises(CallTimeoutError):
        await calls.run(partial(release.wait, SOON_S), GIVE_UP_S)
    with pytest.raises(CallsExhaustedError):
        await calls.run(lambda: None, SOON_S)
    release.set()
    await until_none_lingers(calls)
    assert await calls.run(lambda: "again", SOON_S) == "again"


async def test_waiting_for_a_slot_counts_against_the_deadline() -> None:
    calls, release = BlockingCalls(1), threading.Event()
    first = asyncio.create_task(calls.run(partial(release.wait, SOON_S), SOON_S))
    await asyncio.sleep(0)
    with pytest.raises(CallTimeoutError):
        await calls.run(lambda: None, GIVE_UP_S)
    assert calls.lingering == 0, "it never ran"
    release.set()
    assert await first is True


async def test_a_timeout_error_of_the_call_itself_is_not_a_deadline() -> None:
    def work() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await BlockingCalls(1).run(work, SOON_S)
