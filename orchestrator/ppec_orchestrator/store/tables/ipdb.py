# SPDX-License-Identifier: Apache-2.0
"""The IPDB's tables: VRFs, prefixes, what is held back of them, addresses, and what became of each."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    UniqueConstraint,
    Uuid,
    false,
    text,
)

from ppec_orchestrator.store.tables.schema import Id, UtcTime, metadata

vrf = Table(
    "vrf",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("description", String(256), nullable=False, default=""),
)

_NETBOX = text("netbox_id IS NOT NULL")

# Serves the hosts of a region, of a cluster, or of one rack of the cluster.
prefix = Table(
    "prefix",
    metadata,
    Column("id", Id, primary_key=True),
    Column("vrf_id", ForeignKey("vrf.id"), nullable=False),
    Column("cidr", String(43), nullable=False),
    Column("family", Integer, nullable=False),
    # The whole network's first and last number; what overlaps is found by them.
    Column("low_hex", String(32), nullable=False, server_default=""),
    Column("high_hex", String(32), nullable=False, server_default=""),
    Column("gateway", String(39)),
    Column("vlan", Integer),
    Column("bridge", String(15), nullable=False),
    Column("region", String(63)),
    Column("cluster_id", ForeignKey("cluster.id")),
    Column("rack_id", ForeignKey("rack.id")),
    Column("first", String(39), nullable=False),
    Column("last", String(39), nullable=False),
    Column("nameservers", JSON, nullable=False),
    # IPv6: the next address to hand out, as hex, so that it fits every database. Unused for IPv4.
    Column("next_hex", String(32)),
    # The same prefix in NetBox, if that keeps its addresses: then only those acquired from there have rows.
    Column("netbox_id", BigInteger),
    # For so long an address that was released is not given to another VM.
    Column("quarantine_s", Integer, nullable=False, server_default="300"),
    UniqueConstraint("vrf_id", "cidr"),
    CheckConstraint("(region IS NULL) <> (cluster_id IS NULL)", name="serves_one_place"),
    Index("ix_prefix_networks", "vrf_id", "family", "high_hex"),
    # Two would be given the same addresses.
    Index("ix_prefix_netbox_id", "netbox_id", unique=True, sqlite_where=_NETBOX, postgresql_where=_NETBOX),
)

# Addresses of a prefix that are not given out by themselves: `HoldCreate`.
address_hold = Table(
    "address_hold",
    metadata,
    Column("id", Id, primary_key=True),
    Column("prefix_id", ForeignKey("prefix.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("first_hex", String(32), nullable=False),
    Column("last_hex", String(32), nullable=False),
    Column("reserved_for", String(63)),
    Column("note", String(256), nullable=False, default=""),
    Column("created_at", UtcTime, nullable=False),
    Column("created_by", String(128), nullable=False),
)

_FREE = text("vm_id IS NULL AND hold_id IS NULL")
_USED = text("vm_id IS NOT NULL")
_RELEASED = text("free_from IS NOT NULL")
_HELD = text("hold_id IS NOT NULL")
_ACQUIRED = text("external_id IS NOT NULL")
_SEVERAL = text("last_hex IS NOT NULL")

# IPv4: one row per usable address, free ones included. IPv6: a row per address handed out, or in quarantine.
address = Table(
    "address",
    metadata,
    Column("id", Id, primary_key=True),
    Column("prefix_id", ForeignKey("prefix.id", ondelete="CASCADE"), nullable=False),
    # 32 hex digits: sorts as the number does, for both families.
    Column("address_hex", String(32), nullable=False),
    Column("vm_id", Uuid),
    # The place of the network it was granted for in its VM's request.
    Column("position", Integer, nullable=False, server_default="0"),
    # After a release: who had it, and from when on others may.
    Column("last_vm_id", Uuid),
    Column("free_from", UtcTime),
    Column("hold_id", ForeignKey("address_hold.id", ondelete="SET NULL")),
    # Of an address from NetBox: its number there, who has it as NetBox was told, and whether it is on its way back.
    Column("external_id", BigInteger),
    Column("told_vm_id", Uuid),
    Column("going_back", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("prefix_id", "address_hex"),
    Index("ix_address_free", "prefix_id", "address_hex", sqlite_where=_FREE, postgresql_where=_FREE),
    Index("ix_address_taken", "address_hex", "vm_id", sqlite_where=_USED, postgresql_where=_USED),
    # All that a list of VMs tells of an address.
    Index(
        "ix_address_vm",
        "vm_id",
        "prefix_id",
        "address_hex",
        "position",
        sqlite_where=_USED,
        postgresql_where=_USED,
    ),
    Index("ix_address_released", "prefix_id", "free_from", sqlite_where=_RELEASED, postgresql_where=_RELEASED),
    # Two VMs would have one address of NetBox's.
    Index("ix_address_external", "external_id", unique=True, sqlite_where=_ACQUIRED, postgresql_where=_ACQUIRED),
    Index("ix_address_held", "hold_id", sqlite_where=_HELD, postgresql_where=_HELD),
)

# What befell each address. It refers to nothing: it outlives prefixes, VMs and operations.
address_event = Table(
    "address_event",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", UtcTime, nullable=False, index=True),
    Column("action", String(16), nullable=False),
    Column("vrf", String(63), nullable=False),
    Column("prefix_id", BigInteger, nullable=False),
    Column("cidr", String(43), nullable=False),
    Column("address_hex", String(32), nullable=False),
    # Of several at once: the last one.
    Column("last_hex", String(32)),
    Column("vm_id", Uuid),
    Column("vm", String(63)),
    Column("operation_id", String(64)),
    Column("caller", String(128)),
    Column("note", String(256), nullable=False, server_default=""),
    Index("ix_address_event_address", "address_hex", "id"),
    Index("ix_address_event_vm", "vm_id", "id"),
    # The latest of a VM's name and of a prefix, as lists ask for them.
    Index("ix_address_event_name", "vm", "id"),
    Index("ix_address_event_prefix", "prefix_id", "id"),
    Index("ix_address_event_last", "last_hex", sqlite_where=_SEVERAL, postgresql_where=_SEVERAL),
    # SQLite would give the id of a removed row again.
    sqlite_autoincrement=True,
)
