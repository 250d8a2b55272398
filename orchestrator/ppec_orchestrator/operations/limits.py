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


@dataclass(frozen=True, slots=True)
class Limits:
    """`operations.<name>` in the database. Seconds where the name ends in `_s`.

    `max_running` counts over all replicas. `poll_s` counts as 5 at most. A lease must outlast some renewals: a replica
    that misses them all is taken for dead. `attempts` is how many hosts a VM's create is tried on. `keep_…` count from
    an operation's end, a key's first use and a certificate's expiry.
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

    @classmethod
    def read(cls, conn: Connection) -> Limits:
        return cls.of(store.settings_of(conn, PREFIX))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Limits:
        """A value that isn't a positive number is left at its default and logged."""
        usable: dict[str, Any] = {}
        for one in fields(cls):
            if one.name not in values:
                continue
            value = values[one.name]
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                _log.error("setting.unusable", setting=PREFIX + one.name, value=value)
                continue
            usable[one.name] = int(value) if one.type == "int" else float(value)
        return cls(**usable)


def priority(conn: Connection, kind: str) -> int:
    """`operations.priority.<kind>`: higher ones are claimed first."""
    found = store.settings_of(conn, f"{PREFIX}priority.").get(kind, 0)
    return int(found) if isinstance(found, int | float) else 0
