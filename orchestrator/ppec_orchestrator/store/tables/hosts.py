# SPDX-License-Identifier: Apache-2.0
"""Tables of hosts: what they have and what of it is in use, their labels and events, how they enrol.

Capacity lives in `host_cell`: its `…_used` columns are sums over `allocation_cell` rows and change only together with
them and with `host.generation` (compare-and-swap). So are a host's own disk and its pools, sums over `allocation` rows.
"""

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
    Text,
)

from ppec_orchestrator.store.changes import ChangeMark
from ppec_orchestrator.store.tables.schema import Id, UtcTime, metadata

host = Table(
    "host",
    metadata,
    Column("id", Id, primary_key=True),
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
    # Set by whatever statement changes the row, unless the statement says otherwise: see `store/changes.py`.
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
    Column("id", Id, primary_key=True),
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

# What a search looks through: see `store/search.py`. Kept by name, so that a look from there on is in the order of
# lists.
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
    Column("id", Id, primary_key=True),
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

# Storage pools for VMs' disks, besides the host's own. One that is gone while disks are there stays, without a size.
host_pool = Table(
    "host_pool",
    metadata,
    Column("host_id", ForeignKey("host.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("size_mib", BigInteger, nullable=False),
    Column("used_mib", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("used_mib >= 0", name="used_not_negative"),
    sqlite_with_rowid=False,
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
