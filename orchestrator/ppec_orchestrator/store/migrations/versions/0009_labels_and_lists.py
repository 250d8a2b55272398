# SPDX-License-Identifier: Apache-2.0
"""Labels of hosts and VMs (of VMs they were called tags), and what lists and searches of a large fleet go by."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_ROWS = 5000


def upgrade() -> None:
    op.alter_column("vm", "tags", new_column_name="labels")
    op.add_column("host", sa.Column("labels", sa.JSON(), server_default="{}", nullable=False))
    _make_tables()
    _make_indexes()
    _fill_hosts(op.get_bind())
    _fill_vms(op.get_bind())


def _make_tables() -> None:
    host_id, vm_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Uuid()
    for owner, kind in (("host", host_id), ("vm", vm_id)):
        column = f"{owner}_id"
        op.create_table(
            f"{owner}_label",
            sa.Column(column, kind, nullable=False),
            sa.Column("key", sa.String(length=64), nullable=False),
            sa.Column("value", sa.String(length=256), nullable=False),
            *([sa.Column("name", sa.String(length=63), nullable=False)] if owner == "vm" else []),
            sa.ForeignKeyConstraint([column], [f"{owner}.id"], name=f"fk_{owner}_label_{column}", ondelete="CASCADE"),
            sa.PrimaryKeyConstraint(column, "key", name=f"pk_{owner}_label"),
            sqlite_with_rowid=False,
        )
        by_name = ["name"] if owner == "vm" else []
        op.create_index(f"ix_{owner}_label_pair", f"{owner}_label", ["key", "value", *by_name, column])
    op.create_table(
        "host_search",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("host_id", host_id, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name="fk_host_search_host_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("name", name="pk_host_search"),
        sa.UniqueConstraint("host_id", name="uq_host_search_host_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "vm_search",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("vm_id", vm_id, nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name="fk_vm_search_vm_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("name", "vm_id", name="pk_vm_search"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_vm_search_vm_id", "vm_search", ["vm_id"])


def _make_indexes() -> None:
    op.create_index("ix_host_list", "host", ["name", "id", "rack_id", "vrf_id", "draining"])
    op.create_index("ix_host_rack", "host", ["rack_id"])
    op.create_index("ix_vm_list", "vm", ["name", "id", "record", "image_id", "flavor", "observed"])
    op.create_index("ix_allocation_host", "allocation", ["host_id", "vm_id"])
    op.drop_index("ix_allocation_host_id", "allocation")
    op.drop_index("ix_address_vm", "address")
    taken = sa.text("vm_id IS NOT NULL")
    for name, columns in (("taken", ["address_hex", "vm_id"]), ("vm", ["vm_id", "prefix_id", "address_hex"])):
        op.create_index(f"ix_address_{name}", "address", columns, sqlite_where=taken, postgresql_where=taken)


def _fill_hosts(conn: sa.Connection) -> None:
    host = sa.table("host", sa.column("id"), sa.column("name"), sa.column("address"))
    search = sa.table("host_search", sa.column("name"), sa.column("host_id"), sa.column("text"))
    rows = conn.execute(sa.select(host)).all()
    _insert(conn, search, [{"name": r.name, "host_id": r.id, "text": _text(r.name, r.address)} for r in rows])


def _fill_vms(conn: sa.Connection) -> None:
    image = sa.table("image", sa.column("id"), sa.column("name"))
    vm = sa.table(
        "vm", sa.column("id", sa.Uuid()), sa.column("name"), sa.column("flavor"), sa.column("image_id"),
        sa.column("labels", sa.JSON()),
    )  # fmt: skip
    label = sa.table("vm_label", sa.column("vm_id", sa.Uuid()), sa.column("key"), sa.column("value"), sa.column("name"))
    search = sa.table("vm_search", sa.column("name"), sa.column("vm_id", sa.Uuid()), sa.column("text"))
    rows = conn.execute(sa.select(vm, image.c.name.label("image")).join(image, image.c.id == vm.c.image_id)).all()
    pairs = [
        {"vm_id": r.id, "key": key, "value": value, "name": r.name} for r in rows for key, value in r.labels.items()
    ]
    _insert(conn, label, pairs)
    texts = [(r, _text(r.name, r.image, r.flavor, *(f"{k}={v}" for k, v in sorted(r.labels.items())))) for r in rows]
    _insert(conn, search, [{"name": r.name, "vm_id": r.id, "text": text} for r, text in texts])


def _text(*parts: str) -> str:
    return "\n".join(parts).casefold()


def _insert(conn: sa.Connection, table: sa.TableClause, rows: list[dict[str, Any]]) -> None:
    for start in range(0, len(rows), _ROWS):
        conn.execute(sa.insert(table), rows[start : start + _ROWS])
