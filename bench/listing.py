# SPDX-License-Identifier: Apache-2.0
"""Lists of a large fleet, on both databases: how long a page takes, what a whole list costs beside `json.dumps` of the
same items, and what memory the orchestrator has afterwards."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlencode

import psycopg

from bench.figures import Figures
from bench.process_memory import memory_mib
from bench.released_host import cpu_s
from ppec_lab.fleet_in_store import write_fleet
from ppec_lab.generated_fleet import GeneratedFleet, generate
from ppec_lab.orchestrator_process import OrchestratorProcess, free_port
from ppec_lab.private_postgres import postgres_url, private_postgres
from ppec_orchestrator.store.database import Database

HOSTS, VMS = 10_000, 113_000
PAGE = 500
ROUNDS = 20
WHOLE_LISTS = 3
# Silence that nobody hears the end of: nobody reports here, and still hosts are to be up.
SETTINGS = {"heartbeat_interval_s": 3600}
LINES = "application/x-ndjson"
VM_QUERIES: dict[str, dict[str, str]] = {
    "all": {},
    "host": {"host": "h00100"},
    "rack": {"rack": "r010"},
    "cluster": {"cluster": "c03"},
    "vrf": {"vrf": "blue"},
    "architecture": {"architecture": "aarch64"},
    "image": {"image": "debian-12"},
    "label": {"label": "tier=web"},
    "label_rare": {"label": "app=app-0007"},
    "failed": {"record": "failed"},
    "paused": {"observed": "paused"},
    "unknown": {"observed": "unknown"},
    "text": {"q": "web"},
    "text_rare": {"q": "web-01234"},
    "text_none": {"q": "nowhere"},
    "text_address": {"q": "10.3.0.1"},
    "combined": {"cluster": "c03", "image": "debian-12", "label": "tier=web", "observed": "running"},
}
HOST_QUERIES: dict[str, dict[str, str]] = {
    "all": {},
    "architecture": {"architecture": "aarch64"},
    "rack": {"rack": "r010"},
    "label": {"label": "gpu"},
    "unknown": {"liveness": "unknown"},
    "text": {"q": "10.200.3"},
}


def run(figures: Figures) -> None:
    fleet = generate(HOSTS, VMS)
    with tempfile.TemporaryDirectory(prefix="ppec-bench-", dir="/tmp") as directory:
        place = Path(directory)
        _on(figures, fleet, "sqlite", f"sqlite:///{place}/ppec.db", place / "sqlite")
        with private_postgres(shared_buffers_mib=256) as server:
            with psycopg.connect(postgres_url(server, "postgres"), autocommit=True) as connection:
                connection.execute("CREATE DATABASE ppec")
            _on(figures, fleet, "postgresql", postgres_url(server, "ppec"), place / "postgresql")


def _on(figures: Figures, fleet: GeneratedFleet, kind: str, url: str, directory: Path) -> None:
    started_s = time.monotonic()
    database = Database(url)
    database.migrate()
    write_fleet(database, fleet, datetime.now(UTC))
    database.close()
    figures.add(f"lists.{kind}.fill", time.monotonic() - started_s, "s")
    if kind == "postgresql":
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
    orchestrator = OrchestratorProcess(directory, free_port(), database_url=url, settings=SETTINGS)
    orchestrator.start()
    try:
        with _connected(orchestrator) as connection:
            pid = orchestrator.process.pid()
            if pid is None:
                raise RuntimeError("the orchestrator is gone")
            caller = Caller(connection, orchestrator.token, pid)
            _wait_until_idle(pid)
            _pages(figures, f"lists.{kind}.vms", caller, "/v1/vms", VM_QUERIES)
            _pages(figures, f"lists.{kind}.hosts", caller, "/v1/hosts", HOST_QUERIES)
            _whole(figures, f"lists.{kind}.vms", caller)
        own_mib, resident_mib = memory_mib(pid, [])
        figures.add(f"lists.{kind}.memory", own_mib, "MiB", bar="<= 400")
        figures.add(f"lists.{kind}.memory_rss", resident_mib, "MiB")
    finally:
        orchestrator.stop()


def _wait_until_idle(pid: int) -> None:
    """It reads the fleet beside its first answers, which is `accepting`'s to measure."""
    for _ in range(60):
        before_s = cpu_s(pid)
        time.sleep(1)
        if cpu_s(pid) - before_s < 0.1:
            return
    raise RuntimeError("the orchestrator has not come to rest in a minute")


@contextlib.contextmanager
def _connected(orchestrator: OrchestratorProcess) -> Iterator[http.client.HTTPSConnection]:
    context = ssl.create_default_context(cafile=str(orchestrator.ca))
    connection = http.client.HTTPSConnection("127.0.0.1", orchestrator.port, context=context, timeout=120)
    with contextlib.closing(connection):
        yield connection


@dataclass(frozen=True)
class Caller:
    """Who asks one orchestrator, on one connection; `pid` is the orchestrator's."""

    connection: http.client.HTTPSConnection
    token: str
    pid: int

    def get(self, path: str, accept: str = "application/json") -> bytes:
        headers = {"Authorization": f"Bearer {self.token}", "Accept": accept}
        self.connection.request("GET", path, headers=headers)
        response = self.connection.getresponse()
        body = response.read()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{path} was answered with {response.status}: {body[:500]!r}")
        return body


def _pages(figures: Figures, name: str, caller: Caller, path: str, queries: dict[str, dict[str, str]]) -> None:
    """Each query's first pages, in turn with the others'; the first answer of each is no measurement.

    Beside the time stands the orchestrator's CPU time, which other work on the machine doesn't lengthen.
    """
    taken_ms: dict[str, list[float]] = {query: [] for query in queries}
    cpu_ms: dict[str, list[float]] = {query: [] for query in queries}
    cursors: dict[str, str | None] = dict.fromkeys(queries)
    for number in range(ROUNDS + 1):
        for query, filters in queries.items():
            cursor = cursors[query]
            asked = filters | {"limit": str(PAGE)} | ({"cursor": cursor} if cursor else {})
            before_s, started_s = cpu_s(caller.pid), time.monotonic()
            body = caller.get(f"{path}?{urlencode(asked)}")
            if number:
                taken_ms[query].append((time.monotonic() - started_s) * 1000)
                cpu_ms[query].append((cpu_s(caller.pid) - before_s) * 1000)
            cursors[query] = json.loads(body)["next_cursor"]
    for query, ms in taken_ms.items():
        figures.add(f"{name}.{query}.p95", statistics.quantiles(ms, n=20)[-1], "ms", bar="<= 60")
        figures.add(f"{name}.{query}.cpu", statistics.median(cpu_ms[query]), "CPU-ms")
    every = [one for ms in taken_ms.values() for one in ms]
    figures.add(f"{name}.p95", statistics.quantiles(every, n=20)[-1], "ms", bar="<= 60")


def _whole(figures: Figures, name: str, caller: Caller) -> None:
    """CPU seconds of the orchestrator for the whole list, beside this process's for `json.dumps`, in turn."""
    ratios, seconds = [], []
    for _ in range(WHOLE_LISTS):
        # The orchestrator closes what was idle while the last list was counted.
        caller.connection.close()
        before_s = cpu_s(caller.pid)
        lines = caller.get("/v1/vms", LINES).splitlines()
        taken_s = cpu_s(caller.pid) - before_s
        items = [json.loads(line) for line in lines]
        if len(items) != VMS:
            raise RuntimeError(f"{len(items)} VMs are on the whole list, {VMS} wanted")
        started_s = time.process_time()
        json.dumps(items)
        dumped_s = time.process_time() - started_s
        ratios.append(taken_s / dumped_s)
        seconds.append(taken_s)
    figures.add(f"{name}.whole", statistics.median(seconds), "CPU-s")
    figures.add(f"{name}.whole_ratio", statistics.median(ratios), "x json.dumps", bar="<= 3")
