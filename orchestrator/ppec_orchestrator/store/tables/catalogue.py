# SPDX-License-Identifier: Apache-2.0
"""Tables of what VMs are made of and hosts stand in: datacentres, clusters, racks, flavors, images."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Integer, String, Table

from ppec_orchestrator.store.tables.schema import Id, metadata

datacentre = Table(
    "datacentre",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("region", String(63), nullable=False),
)

cluster = Table(
    "cluster",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("datacentre_id", ForeignKey("datacentre.id"), nullable=False),
    Column("architecture", String(16), nullable=False),
    # An `NPlusOne`; empty: off.
    Column("n_plus_one", JSON, nullable=False, server_default="{}"),
)

rack = Table(
    "rack",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("cluster_id", ForeignKey("cluster.id"), nullable=False),
)

flavor = Table(
    "flavor",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("nvme_drives", Integer, nullable=False, server_default="0"),
    Column("max_vcpus", Integer),
    Column("max_memory_mib", Integer),
    # A `NumaPolicy`, without what is at its default.
    Column("numa", JSON, nullable=False, server_default="{}"),
)

image = Table(
    "image",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("format", String(8), nullable=False),
    Column("architecture", String(16), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("virtual_size_mib", Integer, nullable=False),
)
