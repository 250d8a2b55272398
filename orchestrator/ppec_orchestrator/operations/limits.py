# SPDX-License-Identifier: Apache-2.0
"""The engine's limits. Their values are rows of `setting` and may change at run time; these are the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import structlog
from sqlalchemy import Connection

from ppec_orchestrator.store import operations as store

_log = structlog.get_logger(__name__)
PREFIX = "operations."
_DAY_S = 86400.0
_KEEP_LONGEST_S = 3650 * _DAY_S
MOST: Mapping[str, float] = {
    "max_running": 10_000,
    "lease_s": 600.0,
    "renewal_s": 300.0,
    # Any number: the engine counts more than 5 as 5.
    "poll_s": float("inf"),
    "attempts": 100,
    "lost_runs": 100,
    "host_timeout_s": _DAY_S,
    "cleanup_retry_s": _DAY_S,
    "cleanup_retry_longest_s": _DAY_S,
    "undo_retry_s": _DAY_S,
    "sweep_every_s": _DAY_S,
    "keep_operations_s": _KEEP_LONGEST_S,
    "keep_idempotency_keys_s": _KEEP_LONGEST_S,
    "keep_certificates_s": _KEEP_LONGEST_S,
    "keep_address_events_s": _KEEP_LONGEST_S,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """`operations.<name>` in the database. Seconds where the name ends in `_s`.

    `max_running` counts over all replicas. `poll_s` counts as 5 at most. A lease must outlast some renewals: a replica
    that misses them all is taken for dead. `attempts` is how many hosts a VM's create is tried on. `keep_…` count from
    an operation's end, a key's first use, a certificate's expiry and what befell an address. Each has its `MOST`:
    a lease of days would keep a dead replica's work for as long.
    """

    max_running: int = 32
    lease_s: float = 6.0
    renewal_s: float = 2.0
    poll_s: float = 1.0
    attempts: int = 3
    lost_runs: int = 3
    host_timeout_s: float = 600.0
    cleanup_retry_s: float = 30.0
    cleanup_retry_longest_s: float = 600.0
    undo_retry_s: float = 20.0
    sweep_every_s: float = 3600.0
    keep_operations_s: float = 90 * _DAY_S
    keep_idempotency_keys_s: float = 7 * _DAY_S
    keep_certificates_s: float = 30 * _DAY_S
    keep_address_events_s: float = 365 * _DAY_S

    @classmethod
    def read(cls, conn: Connection) -> Limits:
        return cls.of(store.settings_of(conn, PREFIX))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Limits:
        """A value that isn't a number above 0 (a whole one for a count), or is above its `MOST`, is left at its default
        and logged."""
        usable: dict[str, Any] = {}
        for one in fields(cls):
            if one.name not in values:
                continue
            value = values[one.name]
            most = MOST[one.name]
            count = one.type == "int"
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= most or (count and value != int(value)):
                wanted = f"a {'whole ' if count else ''}number above 0, {most:g} at most"
                _log.error("setting.unusable", setting=PREFIX + one.name, wanted=wanted, found=value)
                continue
            usable[one.name] = int(value) if count else float(value)
        return cls(**usable)


def priority(conn: Connection, kind: str) -> int:
    """`operations.priority.<kind>`: higher ones are claimed first."""
    found = store.value_of(conn, f"{PREFIX}priority.{kind}")
    return int(found) if isinstance(found, int | float) else 0
