# SPDX-License-Identifier: Apache-2.0
"""Tables of VMs: what they are, what each holds on its host, how they stand to each other, plans that were shown."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    Uuid,
    literal_column,
    or_,
    text,
)

from ppec_orchestrator.store.tables.schema import UtcTime, metadata

_POOLED = text("pool IS NOT NULL")
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
    # The other size that its host keeps room for, while a resize has not ended: see `store/sizes.py`. Both or none.
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
    Column("nvme_drives", Integer, nullable=False, server_default="0"),
    # The storage pool of its disk; null for the host's own disk.
    Column("pool", String(63)),
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
    # Most VMs are in no pool.
    Index("ix_vm_pool", "pool", "id", sqlite_where=_POOLED, postgresql_where=_POOLED),
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
    # Of which pool of the host; null for its own disk.
    Column("pool", String(63)),
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

# How VMs of one group stand to each other: the same in all rows of a name, see `store/vm_groups.py`.
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

# Plans that were shown, by their hash: see `store/plans.py`.
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
    # As it was answered, and what a list says of it, which reads no document; an older replica's plans lack it.
    Column("shown", JSON(none_as_null=True)),
    Column("image", String(63)),
    Column("first_vm", String(63)),
    Column("vms", Integer),
    Column("placed", Integer),
    Column("approved_by", String(128)),
    Column("approved_at", UtcTime),
    Index("ix_plan_created_at", "created_at"),
)
