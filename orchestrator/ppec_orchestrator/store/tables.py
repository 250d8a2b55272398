# SPDX-License-Identifier: Apache-2.0
"""The database schema, whole. SQLite and PostgreSQL alike; migrations are in `migrations/`.

Ids that leave the process are UUIDs or names; integers stay inside. Times are UTC (`UtcTime`). JSON columns hold
contract models.
Capacity lives in `host_cell`: its `…_used` columns are sums over `allocation_cell` rows and change only together with
them and with `host.generation` (compare-and-swap).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    false,
    literal_column,
    or_,
    text,
)
from sqlalchemy.engine import Dialect

from ppec_orchestrator.store.changes import ChangeMark

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite only grows an autoincrement key on a plain INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC datetime in and out; SQLite alone would lose the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone must not reach the database")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# --- catalogue -------------------------------------------------------------------------------------------------------

datacentre = Table(
    "datacentre",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("region", String(63), nullable=False),
)

cluster = Table(
    "cluster",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("datacentre_id", ForeignKey("datacentre.id"), nullable=False),
    Column("architecture", String(16), nullable=False),
)

rack = Table(
    "rack",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("cluster_id", ForeignKey("cluster.id"), nullable=False),
)

flavor = Table(
    "flavor",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("max_vcpus", Integer),
    Column("max_memory_mib", Integer),
    # A `NumaPolicy`, without what is at its default.
    Column("numa", JSON, nullable=False, server_default="{}"),
)

image = Table(
    "image",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("format", String(8), nullable=False),
    Column("architecture", String(16), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("virtual_size_mib", Integer, nullable=False),
)

# --- hosts -----------------------------------------------------------------------------------------------------------

host = Table(
    "host",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("rack_id", ForeignKey("rack.id"), nullable=False),
    Column("vrf_id", ForeignKey("vrf.id"), nullable=False),
    Column("address", String(253), nullable=False),
    Column("port", Integer, nullable=False),
    Column("draining", Boolean, nullable=False, default=False),
    Column("enrolled_at", UtcTime),
    # Bumped by every change of what is allocated on the host: the compare-and-swap of a reservation.
    Column("generation", BigInteger, nullable=False, default=0),
    Column("last_seen_at", UtcTime),
    # The agent process and message the stored report came from: an older message never overwrites a newer one.
    Column("agent_started_at_unix_ms", BigInteger, nullable=False, default=0),
    Column("report_sequence", BigInteger, nullable=False, default=0),
    Column("report_digest", String(64)),
    # The moment in that process before the report's snapshot began; null from agents that don't say.
    Column("report_tick", BigInteger),
    Column("report", JSON),
    # The small part of the report that every list shows; parsing 500 whole reports for a page would be slow.
    Column("facts", JSON),
    # The findings with which the host's checks entered their levels (`HealthFinding`); written when a level changes.
    Column("health", JSON),
    Column("disk_mib", BigInteger, nullable=False, default=0),
    Column("disk_used_mib", BigInteger, nullable=False, default=0),
    # As they are shown, and as a snapshot of the fleet reads them; `host_label` has the same to find hosts by.
    Column("labels", JSON, nullable=False, server_default="{}"),
    # Set by whatever statement changes the row, unless the statement says otherwise: see `changes.py`.
    Column("changed", BigInteger, nullable=False, default=ChangeMark(), onupdate=ChangeMark(), server_default="0"),
    CheckConstraint("disk_used_mib >= 0", name="disk_used_not_negative"),
    # What lists choose hosts by, without their rows, which are large.
    Index("ix_host_list", "name", "id", "rack_id", "vrf_id", "draining"),
    Index("ix_host_rack", "rack_id"),
    Index("ix_host_changed", "changed"),
)

# Hosts that were deleted: they can't say so themselves to who looks for changed ones.
host_removal = Table(
    "host_removal",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False),
)

host_label = Table(
    "host_label",
    metadata,
    Column("host_id", ForeignKey("host.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("ix_host_label_pair", "key", "value", "host_id"),
    sqlite_with_rowid=False,
)

# What a search looks through: see `search.py`. Kept by name, so that a look from there on is in the order of lists.
host_search = Table(
    "host_search",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("host_id", ForeignKey("host.id", ondelete="CASCADE"), nullable=False, unique=True),
    Column("text", Text, nullable=False),
    sqlite_with_rowid=False,
)

# What befell a host: so far, checks of its health that changed their level. The latest few hundred of each are kept.
host_event = Table(
    "host_event",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("host_id", ForeignKey("host.id", ondelete="CASCADE"), nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("check", String(256), nullable=False),
    Column("before", String(16)),
    Column("after", String(16), nullable=False),
    Column("found", Text, nullable=False),
    Index(None, "host_id", "id"),
)

host_cell = Table(
    "host_cell",
    metadata,
    Column("host_id", ForeignKey("host.id", ondelete="CASCADE"), primary_key=True),
    Column("cell", Integer, primary_key=True),
    Column("socket", Integer, nullable=False),
    Column("threads_per_core", Integer, nullable=False),
    # Usable: total less reserved, as reported.
    Column("cores", Integer, nullable=False),
    Column("memory_mib", BigInteger, nullable=False),
    Column("cores_reserved", Integer, nullable=False, default=0),
    Column("memory_reserved_mib", BigInteger, nullable=False, default=0),
    Column("cores_used", Integer, nullable=False, default=0),
    Column("memory_used_mib", BigInteger, nullable=False, default=0),
    # vCPUs that may share, and on how many CPUs: no VM has more vCPUs than that. Huge pages of 2 MiB and of 1 GiB.
    Column("shared_cpus", Integer, nullable=False, server_default="0"),
    Column("shared_vcpus", Integer, nullable=False, server_default="0"),
    Column("shared_vcpus_used", Integer, nullable=False, server_default="0"),
    Column("pages_2m", BigInteger, nullable=False, server_default="0"),
    Column("pages_2m_used", BigInteger, nullable=False, server_default="0"),
    Column("pages_1g", BigInteger, nullable=False, server_default="0"),
    Column("pages_1g_used", BigInteger, nullable=False, server_default="0"),
    # Whole drives for VMs.
    Column("nvme", Integer, nullable=False, server_default="0"),
    Column("nvme_used", Integer, nullable=False, server_default="0"),
    CheckConstraint("cores_used >= 0", name="cores_used_not_negative"),
    CheckConstraint("memory_used_mib >= 0", name="memory_used_not_negative"),
    CheckConstraint("shared_vcpus_used >= 0", name="shared_vcpus_used_not_negative"),
    CheckConstraint("pages_2m_used >= 0", name="pages_2m_used_not_negative"),
    CheckConstraint("pages_1g_used >= 0", name="pages_1g_used_not_negative"),
    CheckConstraint("nvme_used >= 0", name="nvme_used_not_negative"),
)

enrolment_token = Table(
    "enrolment_token",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("host_id", ForeignKey("host.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("used_at", UtcTime),
)

certificate = Table(
    "certificate",
    metadata,
    Column("serial", String(40), primary_key=True),
    # Every host's, once a minute, by who it is.
    Column("uri", String(128), nullable=False, index=True),
    Column("issued_at", UtcTime, nullable=False),
    Column("not_after", UtcTime, nullable=False),
)

# --- addresses -------------------------------------------------------------------------------------------------------

vrf = Table(
    "vrf",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("description", String(256), nullable=False, default=""),
)

# Serves the hosts of a region, of a cluster, or of one rack of the cluster.
_NETBOX = text("netbox_id IS NOT NULL")

prefix = Table(
    "prefix",
    metadata,
    Column("id", _Id, primary_key=True),
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
    Column("id", _Id, primary_key=True),
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
_SEVERAL = text("last_hex IS NOT NULL")

# IPv4: one row per usable address, free ones included. IPv6: a row per address handed out, or in quarantine.
address = Table(
    "address",
    metadata,
    Column("id", _Id, primary_key=True),
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
    Index("ix_address_held", "hold_id", sqlite_where=_HELD, postgresql_where=_HELD),
)

# What befell each address. It refers to nothing: it outlives prefixes, VMs and operations.
address_event = Table(
    "address_event",
    metadata,
    Column("id", _Id, primary_key=True),
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
    Index("ix_address_event_last", "last_hex", sqlite_where=_SEVERAL, postgresql_where=_SEVERAL),
    # SQLite would give the id of a removed row again.
    sqlite_autoincrement=True,
)

# --- VMs -------------------------------------------------------------------------------------------------------------

_ODD = text("record <> 'active' OR observed <> 'running'")

vm = Table(
    "vm",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", String(63), nullable=False),
    Column("record", String(16), nullable=False),
    Column("flavor", String(63), nullable=False),
    Column("image_id", ForeignKey("image.id"), nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("user_data", Text, nullable=False, default=""),
    # As they are shown; `vm_label` has the same rows to find VMs by.
    Column("labels", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("operation_id", String(64), nullable=False),
    # The other size that its host keeps room for, while a resize has not ended: see `sizes.py`. Both or none.
    Column("held_vcpus", Integer),
    Column("held_memory_mib", Integer),
    # What the host last reported of it.
    Column("observed", String(16), nullable=False, default="unknown"),
    Column("observed_at", UtcTime),
    Column("pins", JSON),
    # Of the flavor, as the size is.
    Column("max_vcpus", Integer),
    Column("max_memory_mib", Integer),
    Column("numa", JSON, nullable=False, server_default="{}"),
    # A name is taken by every VM but the failed ones, which keep theirs only as history.
    Index(
        "uq_vm_name_live",
        "name",
        unique=True,
        sqlite_where=text("record <> 'failed'"),
        postgresql_where=text("record <> 'failed'"),
    ),
    # What lists choose VMs by, in their order and without their rows, which hold user data.
    Index("ix_vm_list", "name", "id", "record", "image_id", "flavor", "observed"),
    # The same of the few that are not as most are: who asks for failed, paused or unknown VMs asks for some of them.
    Index(
        "ix_vm_odd",
        "name",
        "id",
        "record",
        "image_id",
        "flavor",
        "observed",
        sqlite_where=_ODD,
        postgresql_where=_ODD,
    ),
)
# What the index of odd VMs says, with nothing bound, so that it is seen to be the same.
VM_IS_ODD: ColumnElement[bool] = or_(
    vm.c.record != literal_column("'active'"), vm.c.observed != literal_column("'running'")
)

vm_label = Table(
    "vm_label",
    metadata,
    Column("vm_id", ForeignKey("vm.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    # The VM's: so those that have a label lie in the order of lists.
    Column("name", String(63), nullable=False),
    Index("ix_vm_label_pair", "key", "value", "name", "vm_id"),
    sqlite_with_rowid=False,
)

vm_search = Table(
    "vm_search",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("vm_id", ForeignKey("vm.id", ondelete="CASCADE"), primary_key=True, index=True),
    Column("text", Text, nullable=False),
    sqlite_with_rowid=False,
)

# What a VM holds on a host: written with the reservation, deleted with the release.
allocation = Table(
    "allocation",
    metadata,
    Column("vm_id", ForeignKey("vm.id", ondelete="CASCADE"), primary_key=True),
    Column("host_id", ForeignKey("host.id"), nullable=False),
    Column("disk_mib", BigInteger, nullable=False),
    # The moment, by the host's agent, of the latest answer about the VM: a report from before it says nothing of it.
    # Kept here, because another host's moments are of another order.
    Column("seen_started_at_unix_ms", BigInteger),
    Column("seen_tick", BigInteger),
    Index("ix_allocation_host", "host_id", "vm_id"),
)

allocation_cell = Table(
    "allocation_cell",
    metadata,
    Column("vm_id", ForeignKey("allocation.vm_id", ondelete="CASCADE"), primary_key=True),
    Column("cell", Integer, primary_key=True),
    Column("cores", Integer, nullable=False),
    # On ordinary pages.
    Column("memory_mib", BigInteger, nullable=False),
    Column("shared_vcpus", Integer, nullable=False, server_default="0"),
    Column("pages_2m", BigInteger, nullable=False, server_default="0"),
    Column("pages_1g", BigInteger, nullable=False, server_default="0"),
    Column("nvme", Integer, nullable=False, server_default="0"),
)

# How VMs of one group stand to each other: the same in all rows of a name, see `vm_groups.py`.
vm_group = Table(
    "vm_group",
    metadata,
    Column("vm_id", ForeignKey("vm.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("apart", Boolean, nullable=False),
    Column("level", String(16), nullable=False),
    Column("hard", Boolean, nullable=False),
    Index("ix_vm_group_name", "name"),
)

# Plans that were shown, by their hash: see `plans.py`.
plan = Table(
    "plan",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("created_by", String(128), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("asked", JSON, nullable=False),
    Column("input", JSON, nullable=False),
    Column("places", JSON, nullable=False),
    Column("generations", JSON, nullable=False),
    Index("ix_plan_created_at", "created_at"),
)

# --- operations ------------------------------------------------------------------------------------------------------

operation = Table(
    "operation",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", Integer, nullable=False, default=0),
    Column("created_by", String(128), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
    # What was asked, as the kind's own model.
    Column("input", JSON, nullable=False),
    Column("problem", JSON),
    Column("counters", JSON, nullable=False),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    # The owner's lease; the fence grows with every claim and travels to the agents.
    Column("owner", String(64)),
    Column("lease_until", UtcTime),
    Column("fence", BigInteger, nullable=False, default=0),
    Index(
        "ix_operation_open",
        "priority",
        "created_at",
        sqlite_where=text("state IN ('queued', 'running')"),
        postgresql_where=text("state IN ('queued', 'running')"),
    ),
    Index("ix_operation_created", "created_at"),
)

step = Table(
    "step",
    metadata,
    Column("operation_id", ForeignKey("operation.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("name", String(48), nullable=False),
    Column("state", String(16), nullable=False),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
    # The check-point: what the step needs to be continued or undone.
    Column("data", JSON, nullable=False),
    Column("detail", Text, nullable=False, default=""),
)

operation_item = Table(
    "operation_item",
    metadata,
    Column("operation_id", ForeignKey("operation.id", ondelete="CASCADE"), primary_key=True),
    Column("vm_id", Uuid, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("name", String(63), nullable=False),
    Column("state", String(16), nullable=False),
    Column("host", String(63)),
    Column("attempt", Integer, nullable=False, default=1),
    # Hosts that failed this VM: a replan leaves them out.
    Column("excluded_hosts", JSON, nullable=False),
    Column("stage", String(16)),
    Column("stage_ms", JSON, nullable=False),
    Column("problem", JSON(none_as_null=True)),
    Index("ix_operation_item_vm", "vm_id"),
)

# --- callers and settings --------------------------------------------------------------------------------------------

api_token = Table(
    "api_token",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
)

idempotency_key = Table(
    "idempotency_key",
    metadata,
    Column("caller", String(128), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("operation_id", String(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

# Limits and intervals that may change at run time.
setting = Table(
    "setting",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", JSON, nullable=False),
)
