# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's fixtures: `database` on SQLite and on a throw-away PostgreSQL, `client` on the whole API."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from ppec_lab.private_postgres import postgres_url as server_url
from ppec_lab.private_postgres import private_postgres
from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.services import Services, make_services
from ppec_orchestrator.pki.ca import LIFETIME, Issued
from ppec_orchestrator.roles import Role
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.certificates import record_certificate
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.tokens import create_token

# What test modules here share.
sys.path.append(str(Path(__file__).parent))

_TEMPLATE = "ppec_template"


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Path]:
    """A cluster on a UNIX socket in the folder given, with a migrated template database."""
    with private_postgres() as place:
        with psycopg.connect(server_url(place, "postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {_TEMPLATE}")
        database = Database(server_url(place, _TEMPLATE))
        database.migrate()
        database.close()
        yield place


@contextmanager
def postgres_copy(cluster: Path, template: str = _TEMPLATE) -> Iterator[str]:
    """The name of a database like `template`, for the length of the block."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server_url(cluster, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield name
    with psycopg.connect(server_url(cluster, "postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_cluster: Path) -> Iterator[str]:
    """A migrated database of the test's own."""
    with postgres_copy(postgres_cluster) as name:
        yield server_url(postgres_cluster, name)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "ppec.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "ppec.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def fill_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Callable[[Database], None]], AbstractContextManager[Database]]]:
    """For files whose tests all begin with the same rows: `with fill_once(fill) as database`.

    `fill` gets an empty database the first time; the block's is a copy of what that became.
    """
    filled: list[str] = []
    with ExitStack() as stack:
        if request.param == "sqlite":
            template = request.getfixturevalue("sqlite_template")
            folder = tmp_path_factory.mktemp("filled")

            @contextmanager
            def copied(of: str) -> Iterator[tuple[str, str]]:
                path = folder / f"{uuid.uuid4().hex}.db"
                shutil.copy(of or template, path)
                yield str(path), f"sqlite:///{path}"
        else:
            cluster = request.getfixturevalue("postgres_cluster")

            @contextmanager
            def copied(of: str) -> Iterator[tuple[str, str]]:
                with postgres_copy(cluster, of or _TEMPLATE) as name:
                    yield name, server_url(cluster, name)

        @contextmanager
        def filled_database(fill: Callable[[Database], None]) -> Iterator[Database]:
            if not filled:
                name, url = stack.enter_context(copied(""))
                with closing(Database(url)) as database:
                    fill(database)
                filled.append(name)
            with copied(filled[0]) as (_, url), closing(Database(url)) as database:
                yield database

        yield filled_database


@pytest.fixture
def open_database(database_url: str) -> Iterator[Callable[[], Database]]:
    """Opens the test's database once more, as another process would."""
    opened: list[Database] = []

    def open_one() -> Database:
        opened.append(Database(database_url))
        return opened[-1]

    yield open_one
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: Callable[[], Database]) -> Database:
    """A migrated, empty database of the test's own; every test that takes it runs on both kinds."""
    return open_database()


NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


class Clock:
    """The API's clock, moved by the test."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(state_dir=tmp_path / "state", database_url=database_url, max_body_bytes=64 * 1024)


@pytest.fixture
def services(settings: Settings, database: Database, clock: Clock) -> Services:
    return make_services(settings, database, now=clock)


@pytest.fixture
def app(services: Services) -> FastAPI:
    return create_app(services)


@pytest.fixture
def client_as(services: Services, app: FastAPI, clock: Clock) -> Callable[[Role], TestClient]:
    """A client whose token has this role."""

    def make(role: Role) -> TestClient:
        with services.database.write() as conn:
            token = create_token(conn, f"test-{role}", role, now=clock())
        return TestClient(app, headers={"Authorization": f"Bearer {token}"})

    return make


@pytest.fixture
def client(client_as: Callable[[Role], TestClient]) -> TestClient:
    """The API as an admin sees it, on the test's database; every test that takes it runs on both kinds."""
    return client_as(Role.ADMIN)


@pytest.fixture
def host_client(app: FastAPI, services: Services) -> Callable[..., TestClient]:
    """A client with the client certificate of the host named (or of any `ppec://` URI), and no token.

    The certificate is recorded as issued just now, unless the `serial` of another one is given.
    """

    def make(name: str, serial: str = "") -> TestClient:
        uri = name if "://" in name else f"ppec://host/{name}"
        if not serial:
            now, serial = services.now(), f"{uuid.uuid4().int:x}"
            issued = Issued(pem="", serial=serial, uri=uri, not_before=now, not_after=now + LIFETIME)
            with services.database.write() as conn:
                record_certificate(conn, issued, now=now)
        # As OpenSSL spells it: upper case, an even number of digits.
        spelt = f"0{serial}"[len(serial) % 2 == 0 :].upper()
        peer = {"subjectAltName": (("URI", uri),), "serialNumber": spelt}

        async def with_certificate(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                scope = {**scope, "state": {"peer_certificate": peer}}
            await app(scope, receive, send)

        return TestClient(with_certificate)

    return make


@pytest.fixture
def ipv4_site(client: TestClient) -> TestClient:
    """A data centre `dc1`, cluster `c1`, rack `r1`, VRF `red` and an IPv4 prefix of 29 free addresses for it."""
    for path, body in (
        ("datacentres", {"name": "dc1", "region": "north"}),
        ("clusters", {"name": "c1", "datacentre": "dc1"}),
        ("racks", {"name": "r1", "cluster": "c1"}),
        ("vrfs", {"name": "red"}),
        ("prefixes", {"vrf": "red", "cidr": "10.0.0.0/27", "gateway": "10.0.0.1", "bridge": "br0", "cluster": "c1"}),
    ):
        response = client.post(f"/v1/{path}", json=body)
        assert response.status_code == 201, response.text
    return client
