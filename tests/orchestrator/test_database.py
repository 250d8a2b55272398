# SPDX-License-Identifier: Apache-2.0
"""Transactions, commit count, wake-ups and migrations, on both databases."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, insert, inspect, select, update
from sqlalchemy.exc import IntegrityError

from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import LOCK_TIMEOUT_S, MIGRATION_LOCK, Database
from ppec_orchestrator.store.faults import TransactionLostError, is_reference_violation, is_unique_violation
from ppec_orchestrator.store.migrations.upgrade import alembic_config, newest_revision
from ppec_orchestrator.store.reservations import release

VRF = {"name": "red", "description": ""}
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def _count(database: Database) -> int:
    with database.read() as connection:
        return connection.execute(select(func.count()).select_from(tables.vrf)).scalar_one()


def test_a_write_is_kept_and_counted(database: Database) -> None:
    with database.write() as connection:
        connection.execute(insert(tables.vrf).values(VRF))
    assert _count(database) == 1
    assert database.commits == 1


def test_a_block_that_raises_keeps_nothing(database: Database) -> None:
    def write_and_fail() -> None:
        with database.write() as connection:
            connection.execute(insert(tables.vrf).values(VRF))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert _count(database) == 0
    assert database.commits == 0


def test_what_fails_is_told_without_the_values(database: Database) -> None:
    """They may be user data, and the exception goes to the log."""
    hidden = VRF | {"description": "a tenant's secret"}
    with database.write() as connection:
        connection.execute(insert(tables.vrf).values(hidden))
    with pytest.raises(IntegrityError) as failed, database.write() as connection:
        connection.execute(insert(tables.vrf).values(hidden))
    assert "a tenant's secret" not in str(failed.value)


def test_a_reader_sees_one_state_throughout(database: Database) -> None:
    with database.read() as reader:
        before = reader.execute(select(func.count()).select_from(tables.vrf)).scalar_one()
        with database.write() as connection:
            connection.execute(insert(tables.vrf).values(VRF))
        after = reader.execute(select(func.count()).select_from(tables.vrf)).scalar_one()
    assert (before, after) == (0, 0)
    assert _count(database) == 1


@pytest.mark.postgres
def test_postgresql_compiles_no_statement(postgres_url: str) -> None:
    """Its compiler takes several times as long as the longest of them."""
    database = Database(postgres_url)
    try:
        for opened in (database.read, database.write):
            with opened() as connection:
                assert connection.exec_driver_sql("SHOW jit").scalar_one() == "off"
    finally:
        database.close()


@pytest.mark.postgres
def test_postgresql_lets_no_write_wait_without_end(postgres_url: str) -> None:
    """What is only read waits for nobody's rows."""
    database = Database(postgres_url)
    try:
        with database.write() as writer, database.read() as reader:
            found = [conn.exec_driver_sql("SHOW lock_timeout").scalar_one() for conn in (writer, reader)]
        assert found == [f"{LOCK_TIMEOUT_S:.0f}s", "0"]
    finally:
        database.close()


@pytest.mark.postgres
def test_row_that_somebody_holds_is_an_error_that_keeps_nothing(postgres_url: str) -> None:
    database = Database(postgres_url, lock_timeout_s=0.1)

    def describe(said: str) -> None:
        with database.write() as conn:
            conn.execute(insert(tables.setting).values(name=said, value=0))
            conn.execute(update(tables.vrf).values(description=said))

    try:
        with database.write() as conn:
            conn.execute(insert(tables.vrf).values(VRF))
        with psycopg.connect(postgres_url) as person:
            # So that who would wait for ever fails this test and doesn't hang in it.
            person.execute("SET idle_in_transaction_session_timeout = '30s'")
            person.execute("SELECT * FROM vrf FOR UPDATE")
            with pytest.raises(PpecError) as held:
                describe("in vain")
            assert (held.value.code, held.value.retryable) == ("store.unavailable", True)
            assert not isinstance(held.value, TransactionLostError), "whoever repeats those would wait again and again"
            assert "pg_blocking_pids" in held.value.hint
            assert _count(database) == 1, "whoever reads goes on"
            person.rollback()
            describe("at last")
        with database.read() as conn:
            assert conn.execute(select(tables.setting.c.name)).scalars().all() == ["at last"]
    finally:
        database.close()


@pytest.mark.postgres
def test_migration_waits_for_another_one_as_long_as_that_takes(postgres_url: str) -> None:
    database = Database(postgres_url, lock_timeout_s=0.05)
    waits = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND now() - query_start > interval '0.5 s'"
    )
    try:
        with psycopg.connect(postgres_url, autocommit=True) as other, ThreadPoolExecutor(1) as pool:
            other.execute("SELECT pg_advisory_lock(%s)", (MIGRATION_LOCK,))
            migrated = pool.submit(database.migrate)
            wait_until(lambda: migrated.done() or other.execute(waits).fetchone() == (1,), "it waits", timeout_s=30)
            assert not migrated.done()
            other.execute("SELECT pg_advisory_unlock(%s)", (MIGRATION_LOCK,))
            assert migrated.result(30) is None
    finally:
        database.close()


def test_racing_read_modify_writes_lose_no_update(database: Database, open_database: Callable[[], Database]) -> None:
    with database.write() as connection:
        connection.execute(insert(tables.setting).values(name="n", value=0))
    databases = [database, open_database()]

    def add(index: int) -> None:
        with databases[index % 2].write() as connection:
            row = select(tables.setting.c.value).where(tables.setting.c.name == "n").with_for_update()
            value = connection.execute(row).scalar_one()
            connection.execute(update(tables.setting).values(value=value + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    with database.read() as connection:
        assert connection.execute(select(tables.setting.c.value)).scalar_one() == 40
    assert databases[0].commits + databases[1].commits == 41


def test_constraint_violations_are_told_apart(database: Database) -> None:
    with pytest.raises(IntegrityError) as unique, database.write() as connection:
        connection.execute(insert(tables.vrf), [VRF, VRF])
    with pytest.raises(IntegrityError) as reference, database.write() as connection:
        connection.execute(insert(tables.rack).values(name="r1", cluster_id=7))
    assert (is_unique_violation(unique.value), is_reference_violation(unique.value)) == (True, False)
    assert (is_unique_violation(reference.value), is_reference_violation(reference.value)) == (False, True)


def bridged_s(database: Database) -> float:
    """How long to wait for the first wake-up: PostgreSQL's bridge wakes everyone once when it has connected."""
    return 30 if database.dialect == "postgresql" else 0


def test_a_notice_within_a_transaction_comes_with_its_commit(database: Database) -> None:
    with database.listen("work") as listener:
        listener.wait(bridged_s(database))
        with database.write() as connection:
            database.notify("work", "one", within=connection)
            assert listener.wait(0.1) is None
        assert listener.wait(30) == ("one",)
        with pytest.raises(RuntimeError):
            _notify_and_fail(database)
        assert listener.wait(0.2) is None


def _notify_and_fail(database: Database) -> None:
    with database.write() as connection:
        database.notify("work", "two", within=connection)
        raise RuntimeError


def test_a_notice_before_the_wait_is_not_lost(database: Database) -> None:
    assert database.wait("work", 30)
    database.wait("work", bridged_s(database))
    database.notify("work")
    database.notify("other")
    assert database.wait("work", 30)
    assert not database.wait("work", 0.1)


@pytest.mark.postgres
def test_a_notice_reaches_another_replica(postgres_url: str) -> None:
    one, two = Database(postgres_url), Database(postgres_url)
    try:
        with two.listen("work") as listener:
            listener.wait(bridged_s(two))
            one.notify("work", "payload")
            assert listener.wait(30) == ("payload",)
    finally:
        one.close()
        two.close()


@pytest.mark.postgres
def test_a_cut_connection_is_an_error_and_the_next_request_works(postgres_url: str) -> None:
    database = Database(postgres_url)
    try:
        with pytest.raises(PpecError) as cut, database.write() as connection:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        assert cut.value.code == "store.unavailable"
        assert _count(database) == 0
    finally:
        database.close()


def _write_much(database: Database) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
        connection.execute(insert(tables.setting).values(name="big", value="x" * 1_000_000))


def test_a_full_disk_is_an_error_that_keeps_nothing(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    try:
        with pytest.raises(PpecError) as full:
            _write_much(database)
        assert full.value.code == "disk.full"
        with database.read() as connection:
            assert connection.execute(select(func.count()).select_from(tables.setting)).scalar_one() == 0
    finally:
        database.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://x/y", "nonsense"])
def test_unusable_urls_are_refused_without_being_shown(url: str) -> None:
    with pytest.raises(PpecError) as refused:
        Database(url)
    assert refused.value.code == "request.invalid"


def test_the_database_file_is_private(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/state/ppec.db")
    database.migrate()
    database.close()
    assert (tmp_path / "state" / "ppec.db").stat().st_mode & 0o777 == 0o600


def test_the_migrations_make_the_schema_of_tables(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Without a schema."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/empty.db"
    else:
        url = request.getfixturevalue("postgres_url")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    made = Database(url)
    yield made
    made.close()


def test_schema_of_every_version_is_brought_to_this_one(empty_database: Database) -> None:
    """With what it holds: here the first schema's certificates, by the index of the second."""
    held = {"serial": "1", "uri": "ppec://host/h1", "issued_at": NOW, "not_after": NOW}
    with empty_database.write() as connection:
        command.upgrade(alembic_config(connection), "0001")
        connection.execute(insert(tables.certificate).values(held))
        assert inspect(connection).get_indexes("certificate") == []
    empty_database.migrate()
    with empty_database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        assert dict(connection.execute(select(tables.certificate)).one()._mapping) == held
        assert [index["column_names"] for index in inspect(connection).get_indexes("certificate")] == [["uri"]]


def test_the_newest_revision_is_alembics_head(database: Database) -> None:
    with database.read() as connection:
        scripts = ScriptDirectory.from_config(alembic_config(connection))
    assert newest_revision() == scripts.get_current_head()


def test_a_schema_of_today_is_opened_without_alembic_and_the_other_databases_driver(sqlite_url: str) -> None:
    """They take a tenth of the time that an orchestrator needs to be up again."""
    program = (
        "import sys; from ppec_orchestrator.store.database import Database; "
        f"Database({sqlite_url!r}).migrate(); print(sorted({{'alembic', 'psycopg'}} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_addresses_survive_the_migration_that_makes_their_tables_anew(empty_database: Database) -> None:
    """With who has them; and prefixes serve what they served."""
    holder = "0" * 31 + "7"
    columns = "id, vrf_id, cidr, family, bridge, cluster_id, first, last, nameservers"
    with empty_database.write() as connection:
        command.upgrade(alembic_config(connection), "0006")
        for statement in (
            "INSERT INTO vrf (id, name, description) VALUES (1, 'red', '')",
            "INSERT INTO datacentre (id, name, region) VALUES (1, 'd1', 'north')",
            "INSERT INTO cluster (id, name, datacentre_id, architecture) VALUES (1, 'c1', 1, 'x86_64')",
            f"INSERT INTO prefix ({columns}) VALUES (4, 1, '10.0.0.0/30', 4, 'br0', 1, '10.0.0.1', '10.0.0.2', '[]')",
            "INSERT INTO address (id, prefix_id, address_hex, vm_id) VALUES (8, 4, '0a000001', NULL)",
            f"INSERT INTO address (id, prefix_id, address_hex, vm_id) VALUES (9, 4, '0a000002', '{holder}')",
        ):
            connection.exec_driver_sql(statement)
    empty_database.migrate()
    with empty_database.write() as connection:
        found = connection.execute(select(tables.prefix)).one()
        assert (found.id, found.cluster_id, found.region, found.quarantine_s) == (4, 1, None, 300)
        assert (found.low_hex, found.high_hex) == ("0" * 24 + "0a000000", "0" * 24 + "0a000003")
        rows = connection.execute(select(tables.address).order_by(tables.address.c.id)).all()
        assert [(row.id, row.address_hex, row.vm_id, row.position, row.free_from) for row in rows] == [
            (8, "0a000001", None, 0, None),
            (9, "0a000002", UUID(holder), 0, None),
        ]
        connection.execute(tables.prefix.delete())
        assert connection.execute(select(tables.address)).all() == [], "they refer to the new table"


def test_what_hosts_and_vms_hold_survives_that_they_may_have_pools_and_drives(empty_database: Database) -> None:
    vm_id = UUID(int=7)
    image = "1, 'i', 'raw', 'x86_64', '0', 1, 1"
    one = f"'{vm_id.hex}', 'v', 'active', 'f', 1, 2, 64, 500, '', '{{}}', '2026-11-20 12:00:00+00:00', 'op', 'running'"
    of_vm = "id, name, record, flavor, image_id, vcpus, memory_mib, disk_mib, user_data, labels, created_at"
    with empty_database.write() as connection:
        command.upgrade(alembic_config(connection), "0013")
        for statement in (
            "INSERT INTO vrf (id, name, description) VALUES (1, 'red', '')",
            "INSERT INTO datacentre (id, name, region) VALUES (1, 'd1', 'north')",
            "INSERT INTO cluster (id, name, datacentre_id, architecture) VALUES (1, 'c1', 1, 'x86_64')",
            "INSERT INTO rack (id, name, cluster_id) VALUES (1, 'r1', 1)",
            "INSERT INTO flavor (id, name, vcpus, memory_mib, disk_mib) VALUES (1, 'f', 2, 64, 500)",
            (
                "INSERT INTO image (id, name, format, architecture, sha256, size_bytes, virtual_size_mib) "
                f"VALUES ({image})"
            ),
            (
                "INSERT INTO host (id, name, rack_id, vrf_id, address, port, draining, generation, "
                "agent_started_at_unix_ms, report_sequence, disk_mib, disk_used_mib) "
                "VALUES (1, 'h1', 1, 1, 'a', 1, false, 4, 0, 0, 1000, 500)"
            ),
            (
                "INSERT INTO host_cell (host_id, cell, socket, threads_per_core, cores, memory_mib, cores_reserved, "
                "memory_reserved_mib, cores_used, memory_used_mib) VALUES (1, 0, 0, 1, 8, 4096, 0, 0, 2, 64)"
            ),
            f"INSERT INTO vm ({of_vm}, operation_id, observed) VALUES ({one})",
            f"INSERT INTO allocation (vm_id, host_id, disk_mib) VALUES ('{vm_id.hex}', 1, 500)",
            f"INSERT INTO allocation_cell (vm_id, cell, cores, memory_mib) VALUES ('{vm_id.hex}', 0, 2, 64)",
        ):
            connection.exec_driver_sql(statement)
    empty_database.migrate()
    with empty_database.write() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        flavor = connection.execute(select(tables.flavor)).one()
        vm = connection.execute(select(tables.vm)).one()
        assert (flavor.nvme_drives, vm.id, vm.pool, vm.nvme_drives) == (0, vm_id, None, 0)
        # On the host's own disk, where it was, and from there it is given back.
        assert release(connection, [vm_id]) == 1
        assert connection.execute(select(tables.host.c.disk_used_mib)).scalar_one() == 0
        pool = {"host_id": 1, "name": "ssd", "size_mib": 10}
        connection.execute(insert(tables.host_pool).values(pool))
        with pytest.raises(IntegrityError), connection.begin_nested():
            connection.execute(update(tables.host_pool).values(used_mib=-1))
        connection.execute(tables.host.delete())
        assert connection.execute(select(tables.host_pool)).all() == []


def test_two_processes_may_migrate_at_once(tmp_path: Path) -> None:
    databases = [Database(f"sqlite:///{tmp_path}/ppec.db") for _ in range(2)]
    barrier = threading.Barrier(2)

    def migrate(database: Database) -> None:
        barrier.wait(60)
        database.migrate()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(migrate, databases))
    assert [_count(database) for database in databases] == [0, 0]
    for database in databases:
        database.close()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_statement_left_in_mid_way_keeps_no_snapshot(open_database: Callable[[], Database], kind: str) -> None:
    """Its exception is still held when the connection is used again: that must see what others wrote since."""
    here, elsewhere = open_database(), open_database()
    with here.write() as conn:
        conn.execute(insert(tables.vrf), [{"name": f"v{n}", "description": ""} for n in range(3)])

    def breaks() -> None:
        with getattr(here, kind)() as conn:
            for row in conn.execute(select(tables.vrf)):
                assert row.id / 0

    with pytest.raises(ZeroDivisionError) as held:
        breaks()
    with elsewhere.write() as conn:
        conn.execute(insert(tables.vrf).values(name="later", description=""))
    with getattr(here, kind)() as conn:
        assert "later" in conn.execute(select(tables.vrf.c.name)).scalars().all()
    with here.write() as conn:
        conn.execute(insert(tables.vrf).values(name="last", description=""))
    assert held.value is not None
