# SPDX-License-Identifier: Apache-2.0
"""The database's errors in PPEC's words: the one place that looks at what a database driver raised.

Constraint violations stay `sqlalchemy.exc.IntegrityError`, because only the store that wrote the row knows what its
violation means; `is_unique_violation` and `is_reference_violation` tell them apart.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from ppec_contract.errors import PpecError

# PostgreSQL: serialization_failure, deadlock_detected.
_LOST = frozenset({"40001", "40P01"})
# PostgreSQL: lock_not_available.
_HELD = "55P03"
# PostgreSQL: unique_violation, foreign_key_violation (and its RESTRICT form), disk_full.
_UNIQUE, _REFERENCE, _DISK_FULL = "23505", frozenset({"23503", "23001"}), "53100"
_SQLITE_UNIQUE = frozenset({sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY})


class TransactionLostError(PpecError):
    """The database gave this transaction up in favour of another one; nothing of it was kept. Run it again."""

    def __init__(self) -> None:
        super().__init__(
            "store.unavailable",
            "the transaction lost against another one and was rolled back",
            hint="Repeat the request.",
            subject="database",
        )


def _code(error: DBAPIError) -> str | int | None:
    original = error.orig
    found = getattr(original, "sqlite_errorcode", None) or getattr(original, "sqlstate", None)
    return found if isinstance(found, str | int) else None


def is_unique_violation(error: IntegrityError) -> bool:
    code = _code(error)
    return code == _UNIQUE or code in _SQLITE_UNIQUE


def is_reference_violation(error: IntegrityError) -> bool:
    code = _code(error)
    return code in _REFERENCE or code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY


def is_held(error: SQLAlchemyError) -> bool:
    """Whether rows were locked by somebody else for longer than is waited for."""
    return isinstance(error, DBAPIError) and _code(error) == _HELD


def store_error(error: SQLAlchemyError) -> PpecError:
    """What a failed statement, commit or connection means for the caller; the driver's text stays in the cause."""
    code = _code(error) if isinstance(error, DBAPIError) else None
    if code in _LOST:
        return TransactionLostError()
    if is_held(error):
        # Not a lost transaction: to run it again at once would be to wait as long again.
        return PpecError(
            "store.unavailable",
            "another transaction kept the database's rows that this needs for too long; nothing was changed",
            hint="Repeat the request. If it goes on: pg_blocking_pids() tells whose transaction it is.",
            subject="database",
        )
    if code in (_DISK_FULL, sqlite3.SQLITE_FULL):
        return PpecError(
            "disk.full",
            "the database has no room left; nothing was changed",
            hint="Free space where the database keeps its files.",
            subject="database",
        )
    if isinstance(error, DataError):
        return PpecError(
            "request.invalid",
            "a value can't be stored: a text holds a NUL character, or a number is out of range",
            subject="database",
        )
    return PpecError(
        "store.unavailable",
        "the database did not answer or gave up; nothing is known to have changed",
        hint="Repeat the request; the orchestrator's log names the cause.",
        subject="database",
    )


@contextmanager
def mapped_faults() -> Iterator[None]:
    """Maps every SQLAlchemy error but constraint violations."""
    try:
        yield
    except IntegrityError:
        raise
    except SQLAlchemyError as error:
        raise store_error(error) from error
