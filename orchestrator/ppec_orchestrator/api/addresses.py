# SPDX-License-Identifier: Apache-2.0
"""/v1/addresses"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from ppec_contract.api import AddressView, Page
from ppec_orchestrator.api.auth import Viewer
from ppec_orchestrator.api.pages import ById, Filter
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.store.addresses import AddressFilter, page_of_addresses

router = APIRouter(prefix="/v1/addresses", tags=["addresses"])
PrefixFilter = Annotated[int | None, Query(ge=1, le=2**63 - 1)]
FreeFilter = Annotated[bool | None, Query(description="Free or used ones only; free IPv6 addresses are never listed.")]


def _chosen(
    vrf: Filter = None, vm: Filter = None, prefix_id: PrefixFilter = None, free: FreeFilter = False
) -> AddressFilter:
    return AddressFilter(vrf=vrf, vm=vm, prefix_id=prefix_id, free=free)


@router.get("")
def list_addresses(
    services: Here, caller: Viewer, wanted: ById, chosen: Annotated[AddressFilter, Depends(_chosen)]
) -> Page[AddressView]:
    """List addresses: those in use, unless `free` says otherwise."""
    with services.database.read() as conn:
        return page_of_addresses(conn, wanted, chosen)
