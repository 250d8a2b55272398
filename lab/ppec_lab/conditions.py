# SPDX-License-Identifier: Apache-2.0
"""Waiting for a condition with a bound: what the lab and its tests use where others would sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NotReachedError(TimeoutError):
    """The condition named in the message did not hold within its bound."""


def wait_until(condition: Callable[[], T], what: str, *, timeout_s: float, every_s: float = 0.05) -> T:
    """Ask `condition` until it answers truthfully and return that answer; raise `NotReachedError` naming `what`."""
    end = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > end:
            raise NotReachedError(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(every_s)
