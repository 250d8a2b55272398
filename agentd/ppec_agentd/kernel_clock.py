# SPDX-License-Identifier: Apache-2.0
"""What the kernel knows of its own clock: adjtimex(2), read-only.

The daemon that keeps the clock (chrony, systemd-timesyncd, ntpd) tells the kernel how good it is; so this works with
any of them, and asks no daemon. Some sandboxes refuse the call even to read.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

_TIME_ERROR = 5
_STA_UNSYNC = 0x0040
_STA_NANO = 0x2000


class _Timex(ctypes.Structure):
    """`struct timex` of <sys/timex.h>; its end is padding that the kernel may use."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 32),
    )


@dataclass(frozen=True, slots=True)
class KernelClock:
    """`offset_s` is what is still being slewed away, `worst_error_s` the bound that the kernel gives for the error."""

    synchronised: bool
    offset_s: float
    worst_error_s: float


def read_kernel_clock() -> KernelClock:
    """Raises OSError where the call is refused or missing."""
    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except AttributeError as error:
        raise OSError("this C library has no adjtimex") from error
    timex = _Timex(modes=0)
    state = adjtimex(ctypes.byref(timex))
    if state < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return clock_of(state, timex.status, timex.offset, timex.maxerror)


def clock_of(state: int, status: int, offset: int, worst_error_us: int) -> KernelClock:
    """Pure: `offset` is in nanoseconds if the status says so, else in microseconds."""
    return KernelClock(
        synchronised=state != _TIME_ERROR and not status & _STA_UNSYNC,
        offset_s=offset * (1e-9 if status & _STA_NANO else 1e-6),
        worst_error_s=worst_error_us * 1e-6,
    )
