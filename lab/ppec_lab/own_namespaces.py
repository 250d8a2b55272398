# SPDX-License-Identifier: Apache-2.0
"""Work in a network of its own: interfaces, addresses and ports that nobody else on the machine sees.

Namespaces belong to threads, and processes get those of the thread that starts them. So the work has a thread of its
own, and nothing is to be put back when that has ended. Needs root.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# linux/sched.h
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000


def in_own_network(work: Callable[[], T]) -> T:
    """What `work` returns or raises. It finds a loopback interface that is up, and `/sys` shows its own interfaces."""
    with ThreadPoolExecutor(1, thread_name_prefix="own-network", initializer=_leave) as thread:
        return thread.submit(work).result()


def _leave() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no namespaces of our own (root needed): {os.strerror(number)}")
    for command in (
        ("mount", "--make-rprivate", "/"),
        # A sysfs shows the interfaces of the network that it was mounted in.
        ("mount", "-t", "sysfs", "sysfs", "/sys"),
        ("ip", "link", "set", "lo", "up"),
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=30)
