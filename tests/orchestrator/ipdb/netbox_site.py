# SPDX-License-Identifier: Apache-2.0
"""What the tests of NetBox share: a prefix of the site that NetBox keeps, and the rows of what came from there."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

from netbox_stand_in import NetBoxStandIn
from sqlalchemy import select

from ppec_contract.api_ipdb import NetworkWanted
from ppec_orchestrator.ipdb.provider import SourcePrefix
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database

MARK = "ppec test"
CIDR = ip_network("10.9.0.0/28")
AT_NETBOX = SourcePrefix(3, 7, CIDR)
ONE_OF_IT = NetworkWanted(prefix=CIDR)
PREFIX = {
    "vrf": "red", "cidr": "10.9.0.0/28", "gateway": "10.9.0.1", "bridge": "br0", "cluster": "c1", "netbox_id": 7,
    "quarantine_s": 60,
}  # fmt: skip


def rows(database: Database, prefix_id: int | None = None) -> list[Any]:
    """Of one prefix or of all."""
    query = select(tables.address).where(tables.address.c.external_id.is_not(None))
    if prefix_id is not None:
        query = query.where(tables.address.c.prefix_id == prefix_id)
    with database.read() as conn:
        return list(conn.execute(query.order_by(tables.address.c.address_hex)).all())


def in_step(database: Database, stand_in: NetBoxStandIn) -> bool:
    """What bears our mark there has a row here, and the other way round."""
    here = {row.external_id for row in rows(database)}
    return here == {one["id"] for one in stand_in.addresses.values() if one["description"] == MARK}
