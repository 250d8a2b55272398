# SPDX-License-Identifier: Apache-2.0
"""Prefixes that serve a region, addresses held back, quarantine, and the history of addresses."""

from __future__ import annotations

from ipaddress import ip_network

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.DateTime(timezone=True)
_ADDRESS_INDICES = {
    "ix_address_free": (["prefix_id", "address_hex"], "vm_id IS NULL AND hold_id IS NULL"),
    "ix_address_taken": (["address_hex", "vm_id"], "vm_id IS NOT NULL"),
    "ix_address_vm": (["vm_id", "prefix_id", "address_hex", "position"], "vm_id IS NOT NULL"),
    "ix_address_released": (["prefix_id", "free_from"], "free_from IS NOT NULL"),
    "ix_address_held": (["hold_id"], "hold_id IS NOT NULL"),
}


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        _prefixes_anew()
    else:
        op.alter_column("prefix", "cluster_id", nullable=True)
        for name in ("low_hex", "high_hex"):
            op.add_column("prefix", sa.Column(name, sa.String(32), nullable=False, server_default=""))
        op.add_column("prefix", sa.Column("region", sa.String(63), nullable=True))
        op.add_column("prefix", sa.Column("netbox_id", sa.BigInteger(), nullable=True))
        op.add_column("prefix", sa.Column("quarantine_s", sa.Integer(), nullable=False, server_default="300"))
        op.create_check_constraint(
            op.f("ck_prefix_serves_one_place"), "prefix", "(region IS NULL) <> (cluster_id IS NULL)"
        )
    _number_networks()
    op.create_index("ix_prefix_networks", "prefix", ["vrf_id", "family", "high_hex"], unique=False)
    op.create_table(
        "address_hold",
        sa.Column("id", _Id, nullable=False),
        sa.Column("prefix_id", _Id, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("first_hex", sa.String(32), nullable=False),
        sa.Column("last_hex", sa.String(32), nullable=False),
        sa.Column("reserved_for", sa.String(63), nullable=True),
        sa.Column("note", sa.String(256), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
        sa.ForeignKeyConstraint(
            ["prefix_id"], ["prefix.id"], name=op.f("fk_address_hold_prefix_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_address_hold")),
    )
    op.create_index(op.f("ix_address_hold_prefix_id"), "address_hold", ["prefix_id"], unique=False)
    if op.get_context().dialect.name == "sqlite":
        _addresses_anew()
    else:
        for name in ("ix_address_free", "ix_address_taken", "ix_address_vm"):
            op.drop_index(name, "address")
        op.add_column("address", sa.Column("position", sa.Integer(), nullable=False, server_default="0"))
        op.add_column("address", sa.Column("last_vm_id", sa.Uuid(), nullable=True))
        op.add_column("address", sa.Column("free_from", _TIME, nullable=True))
        op.add_column("address", sa.Column("hold_id", _Id, nullable=True))
        op.add_column("address", sa.Column("external_id", sa.BigInteger(), nullable=True))
        op.add_column("address", sa.Column("told_vm_id", sa.Uuid(), nullable=True))
        op.add_column("address", sa.Column("going_back", sa.Boolean(), nullable=False, server_default=sa.false()))
        op.create_foreign_key(
            op.f("fk_address_hold_id"), "address", "address_hold", ["hold_id"], ["id"], ondelete="SET NULL"
        )
    for name, (columns, where) in _ADDRESS_INDICES.items():
        op.create_index(name, "address", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
    op.create_table(
        "address_event",
        sa.Column("id", _Id, nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("vrf", sa.String(63), nullable=False),
        sa.Column("prefix_id", sa.BigInteger(), nullable=False),
        sa.Column("cidr", sa.String(43), nullable=False),
        sa.Column("address_hex", sa.String(32), nullable=False),
        sa.Column("last_hex", sa.String(32), nullable=True),
        sa.Column("vm_id", sa.Uuid(), nullable=True),
        sa.Column("vm", sa.String(63), nullable=True),
        sa.Column("operation_id", sa.String(64), nullable=True),
        sa.Column("caller", sa.String(128), nullable=True),
        sa.Column("note", sa.String(256), nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_address_event")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_address_event_at"), "address_event", ["at"], unique=False)
    op.create_index("ix_address_event_address", "address_event", ["address_hex", "id"], unique=False)
    op.create_index("ix_address_event_vm", "address_event", ["vm_id", "id"], unique=False)
    several = sa.text("last_hex IS NOT NULL")
    op.create_index(
        "ix_address_event_last", "address_event", ["last_hex"], sqlite_where=several, postgresql_where=several
    )


def _number_networks() -> None:
    connection = op.get_bind()
    table = sa.table("prefix", sa.column("id"), sa.column("cidr"), sa.column("low_hex"), sa.column("high_hex"))
    for prefix_id, cidr in connection.execute(sa.select(table.c.id, table.c.cidr)).all():
        network = ip_network(cidr)
        edges = {
            "low_hex": f"{int(network.network_address):032x}",
            "high_hex": f"{int(network.broadcast_address):032x}",
        }
        connection.execute(sa.update(table).where(table.c.id == prefix_id).values(edges))


def _prefixes_anew() -> None:
    """SQLite can't drop a NOT NULL, and dropping a table deletes what refers to it. So addresses are put aside first:
    in a table that refers to nothing."""
    op.create_table(
        "prefix_anew",
        sa.Column("id", _Id, nullable=False),
        sa.Column("vrf_id", _Id, nullable=False),
        sa.Column("cidr", sa.String(43), nullable=False),
        sa.Column("family", sa.Integer(), nullable=False),
        sa.Column("low_hex", sa.String(32), nullable=False, server_default=""),
        sa.Column("high_hex", sa.String(32), nullable=False, server_default=""),
        sa.Column("gateway", sa.String(39), nullable=True),
        sa.Column("vlan", sa.Integer(), nullable=True),
        sa.Column("bridge", sa.String(15), nullable=False),
        sa.Column("region", sa.String(63), nullable=True),
        sa.Column("cluster_id", _Id, nullable=True),
        sa.Column("rack_id", _Id, nullable=True),
        sa.Column("first", sa.String(39), nullable=False),
        sa.Column("last", sa.String(39), nullable=False),
        sa.Column("nameservers", sa.JSON(), nullable=False),
        sa.Column("next_hex", sa.String(32), nullable=True),
        sa.Column("netbox_id", sa.BigInteger(), nullable=True),
        sa.Column("quarantine_s", sa.Integer(), nullable=False, server_default="300"),
        sa.CheckConstraint("(region IS NULL) <> (cluster_id IS NULL)", name=op.f("ck_prefix_serves_one_place")),
        sa.ForeignKeyConstraint(["cluster_id"], ["cluster.id"], name=op.f("fk_prefix_cluster_id")),
        sa.ForeignKeyConstraint(["rack_id"], ["rack.id"], name=op.f("fk_prefix_rack_id")),
        sa.ForeignKeyConstraint(["vrf_id"], ["vrf.id"], name=op.f("fk_prefix_vrf_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prefix")),
        sa.UniqueConstraint("vrf_id", "cidr", name=op.f("uq_prefix_vrf_id_cidr")),
    )
    kept = "id, vrf_id, cidr, family, gateway, vlan, bridge, cluster_id, rack_id, first, last, nameservers, next_hex"
    op.execute(f"INSERT INTO prefix_anew ({kept}) SELECT {kept} FROM prefix")  # noqa: S608 - names of our own
    op.execute("CREATE TABLE address_aside AS SELECT id, prefix_id, address_hex, vm_id FROM address")
    op.drop_table("address")
    op.drop_table("prefix")
    op.rename_table("prefix_anew", "prefix")


def _addresses_anew() -> None:
    op.create_table(
        "address",
        sa.Column("id", _Id, nullable=False),
        sa.Column("prefix_id", _Id, nullable=False),
        sa.Column("address_hex", sa.String(32), nullable=False),
        sa.Column("vm_id", sa.Uuid(), nullable=True),
        sa.Column("position", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("last_vm_id", sa.Uuid(), nullable=True),
        sa.Column("free_from", _TIME, nullable=True),
        sa.Column("hold_id", _Id, nullable=True),
        sa.Column("external_id", sa.BigInteger(), nullable=True),
        sa.Column("told_vm_id", sa.Uuid(), nullable=True),
        sa.Column("going_back", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.ForeignKeyConstraint(["prefix_id"], ["prefix.id"], name=op.f("fk_address_prefix_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["hold_id"], ["address_hold.id"], name=op.f("fk_address_hold_id"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_address")),
        sa.UniqueConstraint("prefix_id", "address_hex", name=op.f("uq_address_prefix_id_address_hex")),
    )
    op.execute(
        "INSERT INTO address (id, prefix_id, address_hex, vm_id) "
        "SELECT id, prefix_id, address_hex, vm_id FROM address_aside ORDER BY id"
    )
    op.drop_table("address_aside")
