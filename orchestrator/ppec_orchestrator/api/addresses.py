# SPDX-License-Identifier: Apache-2.0
"""/v1/addresses, and what became of each."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from ppec_contract.api import Page
from ppec_contract.api_ipdb import AddressAction, AddressEventView, AddressView, IpAddress
from ppec_orchestrator.api.auth import Viewer
from ppec_orchestrator.api.pages import ById, Filter
from ppec_orchestrator.api.queries import StrictQueryRoute
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.store.address_events import EventFilter, page_of_events
from ppec_orchestrator.store.addresses import AddressFilter, page_of_addresses

router = APIRouter(prefix="/v1/addresses", tags=["addresses"], route_class=StrictQueryRoute)
PrefixFilter = Annotated[int | None, Query(ge=1, le=2**63 - 1)]
FreeFilter = Annotated[
    bool | None, Query(description="Only those that anybody may get, or only the others; free IPv6 is never listed.")
]


async def _chosen(
    vrf: Filter = None, vm: Filter = None, prefix_id: PrefixFilter = None, free: FreeFilter = False
) -> AddressFilter:
    return AddressFilter(vrf=vrf, vm=vm, prefix_id=prefix_id, free=free)


async def _chosen_events(
    address: IpAddress | None = None,
    vrf: Filter = None,
    vm: Filter = None,
    prefix_id: PrefixFilter = None,
    action: AddressAction | None = None,
) -> EventFilter:
    return EventFilter(address=address, vrf=vrf, vm=vm, prefix_id=prefix_id, action=action)


@router.get("")
def list_addresses(
    services: Here, caller: Viewer, wanted: ById, chosen: Annotated[AddressFilter, Depends(_chosen)]
) -> Page[AddressView]:
    """List addresses: those in use, in quarantine or held back, unless `free` says otherwise. Of IPv6 only those that
    VMs have or had are listed; what is held back of a prefix is in its holds."""
    with services.database.read() as conn:
        return page_of_addresses(conn, wanted, chosen, services.now())


@router.get("/events")
def list_address_events(
    services: Here, caller: Viewer, wanted: ById, chosen: Annotated[EventFilter, Depends(_chosen_events)]
) -> Page[AddressEventView]:
    """List what befell addresses, the latest first."""
    with services.database.read() as conn:
        return page_of_events(conn, wanted, chosen)
