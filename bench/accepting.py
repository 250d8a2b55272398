# SPDX-License-Identifier: Apache-2.0
"""Accepting VMs on a large fleet: planned and durable through the API, beside the same rows committed by a bare loop.

Nothing is executed: the one operation that may run belongs to somebody who never ends it.
"""

from __future__ import annotations

import http.client
import json
import ssl
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from sqlalchemy import Connection, insert

from bench.bare_commits import BareCommits
from bench.figures import Figures
from ppec_lab.fleet_in_store import write_fleet
from ppec_lab.generated_fleet import FLAVORS, IMAGES, generate
from ppec_lab.orchestrator_process import OrchestratorProcess, free_port
from ppec_lab.private_postgres import postgres_url, private_postgres
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database

HOSTS, VMS = 10_000, 113_000
BATCH = 100
# Of each kind of measurement, in turn with the bare loop's.
ROUNDS = 3
BATCHES, SINGLES = 12, 320
# Whoever asks for one VM at a time is one of many.
CLIENTS, SINGLE_CLIENTS = 4, 16


def run(figures: Figures) -> None:
    with tempfile.TemporaryDirectory(prefix="ppec-bench-", dir="/tmp") as directory:
        place = Path(directory)
        _measure(figures, "sqlite", f"sqlite:///{place / 'ppec.db'}", place)
    with (
        private_postgres(shared_buffers_mib=256, durable=True) as server,
        tempfile.TemporaryDirectory(prefix="ppec-bench-", dir="/tmp") as directory,
    ):
        with psycopg.connect(postgres_url(server, "postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE bench")
        _measure(figures, "postgresql", postgres_url(server, "bench"), Path(directory))


def _measure(figures: Figures, kind: str, url: str, place: Path) -> None:
    _fill(url)
    process = OrchestratorProcess(
        place / "orchestrator", free_port(), database_url=url,
        settings={"heartbeat_interval_s": 3600.0, "fork_server": False},
    )  # fmt: skip
    try:
        _restart(figures, kind, process)
        _rates(figures, kind, process, url)
        pid = process.process.pid()
        assert pid is not None
        resident = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
        figures.add(f"accept.{kind}.memory", int(resident.split()[1]) / 1024, "MiB", bar="<= 400")
    finally:
        process.stop()


def _fill(url: str) -> None:
    database = Database(url)
    try:
        database.migrate()
        write_fleet(database, generate(HOSTS, VMS), datetime.now(UTC))
        with database.write() as conn:
            _occupy(conn)
        if database.dialect == "postgresql":
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE")
    finally:
        database.close()


def _occupy(conn: Connection) -> None:
    now = datetime.now(UTC)
    store.change_setting(conn, "operations.max_running", 1)
    conn.execute(
        insert(tables.operation),
        {
            "id": "op-never-ending", "kind": "vm.create", "state": "running", "created_by": "bench", "created_at": now,
            "started_at": now, "input": {}, "counters": {}, "owner": "nobody", "lease_until": now + timedelta(days=1),
        },
    )  # fmt: skip


def _restart(figures: Figures, kind: str, process: OrchestratorProcess) -> None:
    """After kill -9: the first list, and the first VM accepted."""
    taken: dict[str, list[float]] = {"list": [], "create": []}
    for what in ("list", "create") * ROUNDS:
        process.start()
        process.process.kill()
        started_s = time.monotonic()
        process.start()
        answer = _first(process, ("GET", "/v1/vms?limit=10", None) if what == "list" else ("POST", "/v1/vms", _body(1)))
        assert answer.get("items") or answer.get("operation_id"), answer
        taken[what].append(time.monotonic() - started_s)
    for what, seconds in taken.items():
        figures.add(f"accept.{kind}.first_{what}_after_kill", statistics.median(seconds), "s", bar="<= 3")


def _first(process: OrchestratorProcess, request: tuple[str, str, object]) -> dict[str, object]:
    """Asked again, as people do, until there is an answer."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with _caller(process) as call:
                return call(*request)
        except OSError:
            if process.process.pid() is None or time.monotonic() > deadline:
                raise RuntimeError(f"the orchestrator does not answer:\n{process.process.tail()}") from None


def _rates(figures: Figures, kind: str, process: OrchestratorProcess, url: str) -> None:
    bare = BareCommits(url)
    for name, count, times, clients, bar in (
        ("batches", BATCH, BATCHES, CLIENTS, ">= 1000"),
        ("one_by_one", 1, SINGLES, SINGLE_CLIENTS, ">= 200"),
        ("one_by_one.one_client", 1, SINGLES // 4, 1, ""),
    ):
        mine, its = [], []
        for _ in range(ROUNDS):
            # The orchestrator has seen what the bare loop changed.
            _rate(process, 1, 1, 1)
            mine.append(_rate(process, count, times, clients))
            its.append(bare.rate(count, times))
        figures.add(f"accept.{kind}.{name}", statistics.median(mine), "VMs/s", bar=bar)
        figures.add(f"accept.{kind}.{name}.bare_commits", statistics.median(its), "VMs/s")
        ratio = statistics.median(one / other for one, other in zip(mine, its, strict=True))
        figures.add(f"accept.{kind}.{name}.ratio", ratio, "x", bar=">= 0.25")
    bare.close()


def _rate(process: OrchestratorProcess, count: int, times: int, clients: int) -> float:
    """VMs accepted per second."""

    def client(requests: int) -> None:
        with _caller(process) as call:
            for _ in range(requests):
                answer = call("POST", "/v1/vms", _body(count))
                assert answer.get("state") == "queued", answer

    with ThreadPoolExecutor(clients) as pool:
        started_s = time.monotonic()
        list(pool.map(client, [times // clients] * clients))
        return count * (times // clients) * clients / (time.monotonic() - started_s)


def _body(count: int) -> dict[str, object]:
    return {"flavor": FLAVORS[0].name, "image": IMAGES[0], "name": f"n{uuid.uuid4().hex[:12]}", "count": count}


Call = Callable[[str, str, object], dict[str, object]]


@contextmanager
def _caller(process: OrchestratorProcess) -> Iterator[Call]:
    """One kept connection, as an SDK has."""
    context = ssl.create_default_context(cafile=str(process.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", process.port, context=context, timeout=120)
    headers = {"Authorization": f"Bearer {process.token}", "Content-Type": "application/json"}

    def call(method: str, path: str, body: object) -> dict[str, object]:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        found = json.loads(connection.getresponse().read())
        assert isinstance(found, dict)
        return found

    try:
        yield call
    finally:
        connection.close()
