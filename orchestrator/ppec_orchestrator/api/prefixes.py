# SPDX-License-Identifier: Apache-2.0
"""/v1/prefixes"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from ppec_contract.api import Page, PrefixCreate, PrefixView
from ppec_orchestrator.api.auth import Admin, Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.pages import ById, Filter
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.store import prefixes

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=StrictJsonRoute)
PrefixId = Annotated[int, Path(ge=1, le=2**63 - 1)]


@router.get("")
def list_prefixes(services: Here, caller: Viewer, wanted: ById, vrf: Filter = None) -> Page[PrefixView]:
    """List prefixes, with how many addresses each has and has free."""
    with services.database.read() as conn:
        return prefixes.page_of_prefixes(conn, wanted, vrf)


@router.post("", status_code=201)
def create_prefix(services: Here, caller: Admin, body: PrefixCreate) -> PrefixView:
    """Create a prefix. Prefixes of one VRF don't overlap; IPv4 prefixes have 65536 addresses at most."""
    with services.database.write() as conn:
        return prefixes.create_prefix(conn, body)


@router.get("/{prefix_id}")
def get_prefix(services: Here, caller: Viewer, prefix_id: PrefixId) -> PrefixView:
    """Show a prefix."""
    with services.database.read() as conn:
        return prefixes.get_prefix(conn, prefix_id)


@router.delete("/{prefix_id}", status_code=204)
def delete_prefix(services: Here, caller: Admin, prefix_id: PrefixId) -> Response:
    """Delete a prefix none of whose addresses is in use."""
    with services.database.write() as conn:
        prefixes.delete_prefix(conn, prefix_id)
    return Response(status_code=204)
