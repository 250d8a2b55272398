# SPDX-License-Identifier: Apache-2.0
"""The database: read and write transactions, the commit count, migrations and wake-ups. SQLite or PostgreSQL.

SQLite takes one writer at a time and upgrades no reader: a write transaction therefore starts with BEGIN IMMEDIATE on
a pool of one connection, which makes a fair queue within the process; other processes wait on the busy timeout.
Statements that fail are logged without their values: those may be user data or the hash of a token.
PostgreSQL writes at READ COMMITTED; whoever relies on a row's old value says so in the statement (compare-and-swap) or
locks it, and repeats on `TransactionLostError`. A lock that others hold is waited for so long and no longer.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import structlog
from pydantic_core import from_json
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from ppec_contract.errors import PpecError
from ppec_orchestrator.store.faults import mapped_faults
from ppec_orchestrator.store.migrations.upgrade import upgrade_to_head
from ppec_orchestrator.store.notices import Listener, Notices, encode

if TYPE_CHECKING:
    from ppec_orchestrator.store.postgres_notices import PostgresBridge

_log = structlog.get_logger(__name__)

BUSY_TIMEOUT_S = 10
# For each lock of PostgreSQL's that others hold. Our own transactions take milliseconds; the longest, an import of as
# many addresses as may come at once, took nine seconds on a busy machine. Who holds one for longer is somebody in psql.
# Shorter than the half minute for which clients have patience, so that they get to know; longer than the second after
# which PostgreSQL looks for deadlocks.
LOCK_TIMEOUT_S = 20.0
_READERS = 16
_WRITERS_POSTGRES = 8
_NOTICES = "ppec_notices"
_WRITE = "ppec_write"
_CURSORS = "ppec_cursors"
# Any number: it only has to be the same in every replica, and no other user of the database may use it.
MIGRATION_LOCK = 0x70706563


def _sqlite_connect(connection: Any, record: object) -> None:
    # The driver must not begin transactions on its own: it would begin deferred ones.
    connection.isolation_level = None
    cursor = connection.cursor()
    _sqlite_wal(cursor)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _sqlite_wal(cursor: sqlite3.Cursor) -> None:
    """SQLite's busy timeout doesn't hold for this: of two processes that open a fresh file at once, one would fail."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _sqlite_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN DEFERRED")


def _sqlite_remember(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> None:
    connection.info.setdefault(_CURSORS, []).append(cursor)


def _sqlite_checkin(connection: Any, record: Any) -> None:
    """A SELECT that an exception left in mid-way holds its snapshot past the end of its transaction for as long as the
    traceback keeps it: whoever is given the connection next would read the past, or be refused to write."""
    for cursor in record.info.pop(_CURSORS, ()):
        cursor.close()


def _sqlite_engine(url: URL, pool_size: int) -> Engine:
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=BUSY_TIMEOUT_S,
        hide_parameters=True,
        json_deserializer=from_json,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )
    event.listen(engine, "connect", _sqlite_connect)
    event.listen(engine, "begin", _sqlite_begin)
    event.listen(engine, "after_cursor_execute", _sqlite_remember)
    event.listen(engine, "checkin", _sqlite_checkin)
    return engine


# To compile a statement takes a quarter of a second, and none of ours runs for as long.
_POSTGRES = ("SET jit = off",)
# No processes beside for what takes milliseconds. And each statement is planned for what is looked for: the driver's
# prepared ones would get a plan that has to do for every text, and is right for few.
_POSTGRES_READER = (*_POSTGRES, "SET max_parallel_workers_per_gather = 0", "SET plan_cache_mode = force_custom_plan")


def _postgres_engine(url: URL, pool_size: int, settings: Sequence[str]) -> Engine:
    def connected(connection: Any, record: object) -> None:
        connection.autocommit = True
        connection.execute("; ".join(settings))
        connection.autocommit = False

    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=BUSY_TIMEOUT_S,
        hide_parameters=True,
        json_deserializer=from_json,
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5, "client_encoding": "utf8", "application_name": "ppec-orchestrator"},
    )
    event.listen(engine, "connect", connected)
    # A thousand rows a statement: the driver would send one for each, and PostgreSQL answer each.
    engine.dialect.use_insertmanyvalues_wo_returning = True
    return engine


def _postgres_writer(lock_timeout_s: float) -> Sequence[str]:
    return (*_POSTGRES, f"SET lock_timeout = '{lock_timeout_s * 1000:.0f}ms'")


class Database:
    """One database, shared by all threads. `url` is SQLAlchemy's: `sqlite:////path` or `postgresql+psycopg://…`.

    On PostgreSQL a write waits for `lock_timeout_s` at most for each lock that others hold.
    """

    def __init__(self, url: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._url = _checked_url(url)
        self.dialect: Literal["sqlite", "postgresql"] = (
            "sqlite" if self._url.get_backend_name() == "sqlite" else "postgresql"
        )
        self._notices = Notices()
        self._bridge: PostgresBridge | None = None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._commits = 0
        if self.dialect == "sqlite":
            _create_private(Path(cast("str", self._url.database)))
            reader, writer = _sqlite_engine(self._url, _READERS), _sqlite_engine(self._url, 1)
        else:
            reader = _postgres_engine(self._url, _READERS, _POSTGRES_READER)
            writer = _postgres_engine(self._url, _WRITERS_POSTGRES, _postgres_writer(lock_timeout_s))
        self._reader = reader.execution_options(**self._read_options())
        self._writer = writer.execution_options(**{_WRITE: True})

    def _read_options(self) -> dict[str, Any]:
        if self.dialect == "sqlite":
            return {}
        return {"postgresql_readonly": True, "isolation_level": "REPEATABLE READ"}

    @property
    def commits(self) -> int:
        """Write transactions committed by this process; tests assert the work of a request by it."""
        with self._lock:
            return self._commits

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read-only transaction: every statement in it sees the same state of the database."""
        with mapped_faults(), self._reader.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One write transaction: committed when the block ends, rolled back when it raises.

        Never hold it across HTTP or Ansible: on SQLite everybody else's writes wait for it.
        """
        queued: list[tuple[str, str]] = []
        with mapped_faults():
            with self._writer.connect() as opened:
                connection = opened.execution_options(**{_NOTICES: queued})
                with connection.begin():
                    yield connection
            with self._lock:
                self._commits += 1
        for channel, payload in queued:
            self._notices.announce(channel, payload)

    def notify(self, channel: str, payload: str = "", *, within: Connection | None = None) -> None:
        """Wakes who waits on `channel`: at once, or when the write transaction `within` commits (never if it fails)."""
        if self.dialect == "postgresql":
            statement = text("SELECT pg_notify('ppec', :notice)").bindparams(notice=encode(channel, payload))
            if within is not None:
                within.execute(statement)
                return
            with mapped_faults(), self._writer.begin() as connection:
                connection.execute(statement)
        elif within is not None:
            within.get_execution_options()[_NOTICES].append((channel, payload))
        else:
            self._notices.announce(channel, payload)

    def listen(self, channel: str) -> Listener:
        """Payloads of `channel` from now on."""
        listener = self._notices.listen(channel)
        self._ensure_bridge()
        return listener

    def wait(self, channel: str, timeout_s: float) -> bool:
        """True once `channel` was notified since this thread's last wait on it; False when the time is up.

        A thread's first wait on a channel starts to listen and returns True at once: look first, then wait.
        """
        listeners: dict[str, Listener] = self._local.__dict__.setdefault("listeners", {})
        if channel not in listeners:
            listeners[channel] = self.listen(channel)
            return True
        return listeners[channel].wait(timeout_s) is not None

    def _ensure_bridge(self) -> None:
        if self.dialect == "sqlite":
            return
        with self._lock:
            if self._bridge is None:
                # With it comes the driver, which SQLite has no use for.
                from ppec_orchestrator.store.postgres_notices import PostgresBridge

                conninfo = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
                self._bridge = PostgresBridge(conninfo, self._notices)
            bridge = self._bridge
        bridge.wait_until_listening(5)

    def migrate(self) -> None:
        """Brings the schema to this version's, in one transaction; a second process waits and finds it done."""
        with mapped_faults(), self._writer.begin() as connection:
            if self.dialect == "postgresql":
                # Another one's migration takes what it takes, and so may who has the tables that this one changes.
                connection.execute(text("SET LOCAL lock_timeout = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)").bindparams(key=MIGRATION_LOCK))
            upgrade_to_head(connection)

    @property
    def closed(self) -> bool:
        """From then on nobody is woken, and whoever waits does so in vain."""
        return self._notices.closed

    def close(self) -> None:
        self._notices.close()
        if self._bridge is not None:
            self._bridge.close()
        self._reader.dispose()
        self._writer.dispose()


def _checked_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise _bad_url("it is not a database URL") from error
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise _bad_url("SQLite is used with a file")
        return parsed
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise _bad_url(f"{parsed.get_backend_name()} is neither sqlite nor postgresql")


def _bad_url(why: str) -> PpecError:
    # The URL itself may hold a password.
    return PpecError(
        "request.invalid",
        f"database_url can't be used: {why}",
        hint="Give sqlite:////absolute/path or postgresql://user@host/name.",
        subject="settings",
    )


def _create_private(path: Path) -> None:
    """The file with mode 0600 before SQLite makes it with the umask's; its WAL takes over the mode."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
