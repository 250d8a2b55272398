# SPDX-License-Identifier: Apache-2.0
"""What time it is. Who decides by it under a lock is handed the clock and not a time: a time is old once it waited."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)
