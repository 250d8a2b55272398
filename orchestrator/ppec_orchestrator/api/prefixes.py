# SPDX-License-Identifier: Apache-2.0
"""/v1/prefixes, with what is held back of each and what is free."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from ppec_contract.api import Page
from ppec_contract.api_ipdb import HoldCreate, HoldView, PrefixCreate, PrefixFree, PrefixUpdate, PrefixView
from ppec_contract.errors import PpecError
from ppec_contract.model import Model
from ppec_orchestrator.api.audited import tells
from ppec_orchestrator.api.auth import Admin, Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.pages import ById, Filter
from ppec_orchestrator.api.services import Here, Services
from ppec_orchestrator.ipdb.provider import SourcePrefix
from ppec_orchestrator.store import holds, prefixes

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=StrictJsonRoute)
PrefixId = Annotated[int, Path(ge=1, le=2**63 - 1)]
Force = Annotated[
    bool,
    Query(description="Also if addresses rest, whose quarantine then ends, or are held back, which then ends too."),
]
HoldId = Annotated[int, Path(ge=1, le=2**63 - 1)]


@router.get("")
def list_prefixes(services: Here, caller: Viewer, wanted: ById, vrf: Filter = None) -> Page[PrefixView]:
    """List prefixes, with how many addresses each has and has free."""
    with services.database.read() as conn:
        return prefixes.page_of_prefixes(conn, wanted, vrf, services.now())


@router.post("", status_code=201)
def create_prefix(request: Request, services: Here, caller: Admin, body: PrefixCreate) -> PrefixView:
    """Create a prefix. Prefixes of one VRF don't overlap; IPv4 prefixes have 65536 addresses at most."""
    tells(request, prefix=f"{body.cidr} of {body.vrf}", given=_given(body, leave_out={"vrf", "cidr"}))
    if body.netbox_id is not None:
        check_source(services, body)
    with services.database.write() as conn:
        return prefixes.create_prefix(conn, body, services.now())


def check_source(services: Services, wanted: PrefixCreate, beside: Sequence[SourcePrefix] = ()) -> SourcePrefix:
    """The prefix of NetBox's that its `netbox_id` names, if it is the same one and may be registered with those of
    `beside`: `prefix.invalid`. NetBox is asked before the transaction."""
    if services.supply is None or wanted.netbox_id is None:
        raise PpecError(
            "prefix.invalid",
            f"prefix {wanted.cidr}: netbox_id is given and no NetBox is configured",
            hint="Set netbox_url in the orchestrator's settings.",
            subject=f"prefix {wanted.cidr}",
        )
    # It has no number here yet.
    source = SourcePrefix(0, wanted.netbox_id, wanted.cidr)
    services.supply.check(source, wanted.gateway, beside)
    return source


@router.get("/{prefix_id}")
def get_prefix(services: Here, caller: Viewer, prefix_id: PrefixId) -> PrefixView:
    """Show a prefix."""
    with services.database.read() as conn:
        return prefixes.get_prefix(conn, prefix_id, services.now())


@router.patch("/{prefix_id}")
def update_prefix(
    request: Request, services: Here, caller: Admin, prefix_id: PrefixId, body: PrefixUpdate
) -> PrefixView:
    """Change what VMs to come are told, which addresses it gives out, and how long they rest."""
    with services.database.write() as conn:
        view = prefixes.update_prefix(conn, prefix_id, body, services.now())
        tells(request, prefix=f"{view.cidr} of {view.vrf}", given=_given(body))
    return view


@router.delete("/{prefix_id}", status_code=204)
def delete_prefix(
    request: Request, services: Here, caller: Admin, prefix_id: PrefixId, force: Force = False
) -> Response:
    """Delete a prefix of which no VM has an address, none rests, and none is held back."""
    now = services.now()
    with services.database.read() as conn:
        gone = prefixes.get_prefix(conn, prefix_id, now)
    tells(request, prefix=f"{gone.cidr} of {gone.vrf}", given="force=true" if force else "")
    if services.supply is not None:
        if not force:
            with services.database.read() as conn:
                prefixes.check_deletable(conn, prefix_id, now)
        services.supply.retire(prefix_id, force=force)
    how = prefixes.Deletion(caller.name, services.now, force=force, forget_acquired=services.supply is None)
    with services.database.write() as conn:
        prefixes.delete_prefix(conn, prefix_id, how)
    return Response(status_code=204)


def _given(body: Model, leave_out: Collection[str] = ()) -> str:
    """What was asked for, for the audit line: a prefix has no secrets."""
    given = body.model_dump(mode="json", exclude_unset=True, exclude=set(leave_out))
    return " ".join(f"{name}={json.dumps(value)}" for name, value in given.items())


@router.get("/{prefix_id}/free")
def get_prefix_free(services: Here, caller: Viewer, prefix_id: PrefixId) -> PrefixFree:
    """Show a prefix's free addresses, as runs and as networks."""
    with services.database.read() as conn:
        return prefixes.free_in_prefix(conn, prefix_id, services.now())


@router.get("/{prefix_id}/holds")
def list_holds(services: Here, caller: Viewer, wanted: ById, prefix_id: PrefixId) -> Page[HoldView]:
    """List what is reserved and excluded of a prefix."""
    with services.database.read() as conn:
        return holds.page_of_holds(conn, prefix_id, wanted)


@router.post("/{prefix_id}/holds", status_code=201)
def create_hold(services: Here, caller: Admin, prefix_id: PrefixId, body: HoldCreate) -> HoldView:
    """Reserve or exclude addresses: they are not given out by themselves."""
    with services.database.write() as conn:
        return holds.create_hold(conn, prefix_id, body, caller.name, services.now)


@router.delete("/{prefix_id}/holds/{hold_id}", status_code=204)
def delete_hold(services: Here, caller: Admin, prefix_id: PrefixId, hold_id: HoldId) -> Response:
    """Give addresses free that were reserved or excluded."""
    with services.database.write() as conn:
        holds.delete_hold(conn, prefix_id, hold_id, caller.name, services.now)
    return Response(status_code=204)
