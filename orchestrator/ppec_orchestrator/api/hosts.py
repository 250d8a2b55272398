# SPDX-License-Identifier: Apache-2.0
"""/v1/hosts"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from ppec_contract.api import LabelsUpdate, Page
from ppec_contract.api_hosts import (
    EnrolmentTokenView,
    HostCreate,
    HostEvents,
    HostLiveness,
    HostRetune,
    HostUpdate,
    HostView,
)
from ppec_contract.api_operations import OperationView
from ppec_contract.host import Architecture
from ppec_orchestrator.api.asks import IdempotencyKey, accepted, ask_of
from ppec_orchestrator.api.auth import Admin, Operator, Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.operations import Engine
from ppec_orchestrator.api.pages import (
    STREAMED,
    ByName,
    Filter,
    LabelFilter,
    Limit,
    Name,
    SearchText,
    listed,
    wanted_labels,
    wanted_text,
)
from ppec_orchestrator.api.services import Here, Services
from ppec_orchestrator.liveness import liveness_of
from ppec_orchestrator.pki.names import check_name
from ppec_orchestrator.store import host_views, hosts, labels
from ppec_orchestrator.store.enrolment import create_enrolment_token
from ppec_orchestrator.store.host_health import events_of
from ppec_orchestrator.store.host_lists import HostFilter
from ppec_orchestrator.store.host_views import Judge
from ppec_orchestrator.store.paging import DEFAULT_LIMIT, Documents, Slice
from ppec_orchestrator.store.places import Place

router = APIRouter(prefix="/v1/hosts", tags=["hosts"], route_class=StrictJsonRoute)


async def chosen_hosts(  # noqa: PLR0913, PLR0917 - one parameter per filter
    services: Here,
    architecture: Architecture | None = None,
    region: Filter = None,
    datacentre: Filter = None,
    cluster: Filter = None,
    rack: Filter = None,
    vrf: Filter = None,
    liveness: HostLiveness | None = None,
    draining: bool | None = None,
    label: LabelFilter = [],  # noqa: B006 - FastAPI copies it
    q: SearchText = None,
) -> HostFilter:
    """All that are given must hold."""
    place = Place(architecture, region, datacentre, cluster, rack, vrf)
    silent_before = services.now() - timedelta(seconds=services.settings.silent_after_s)
    return HostFilter(silent_before, place, liveness, draining, wanted_labels(label), wanted_text(q))


def judge_of(services: Services) -> Judge:
    """Liveness as of now, from what the database says and what this process heard since."""
    now = services.now()

    def judge(name: str, enrolled_at: datetime | None, stored: datetime | None) -> tuple[HostLiveness, datetime | None]:
        last_seen_at = services.liveness.last_seen(name, stored)
        silent_after_s = services.settings.silent_after_s
        return liveness_of(enrolled_at, last_seen_at, now=now, silent_after_s=silent_after_s), last_seen_at

    return judge


@router.get("", response_model=Page[HostView], responses=STREAMED)
def list_hosts(
    request: Request,
    services: Here,
    caller: Viewer,
    wanted: ByName,
    chosen: Annotated[HostFilter, Depends(chosen_hosts)],
) -> Response:
    """List hosts, with what is free on them by the record."""
    judge = judge_of(services)

    def read(part: Slice) -> Documents:
        with services.database.read() as conn:
            return host_views.page(conn, part, chosen, judge)

    return listed(request, wanted, read)


@router.post("", status_code=201)
def create_host(services: Here, caller: Admin, body: HostCreate) -> HostView:
    """Register bare metal. It takes VMs once it has enrolled and reported."""
    check_name(body.address)
    with services.database.write() as conn:
        return hosts.create_host(conn, body, judge_of(services))


@router.get("/{name}")
def get_host(services: Here, caller: Viewer, name: Name) -> HostView:
    """Show a host."""
    with services.database.read() as conn:
        view = host_views.get_host(conn, name, judge_of(services))
    use = services.reports.vitals.use_of(name)
    return view if use is None else view.model_copy(update={"use": use[0]})


@router.get("/{name}/events")
def list_host_events(services: Here, caller: Viewer, name: Name, limit: Limit = DEFAULT_LIMIT) -> HostEvents:
    """List what befell a host, the latest first: checks of its health that changed their level."""
    with services.database.read() as conn:
        return HostEvents(items=events_of(conn, name, limit))


@router.patch("/{name}")
def update_host(services: Here, caller: Operator, name: Name, body: HostUpdate) -> HostView:
    """Let a host take new VMs, or no longer."""
    with services.database.write() as conn:
        return hosts.update_host(conn, name, body, judge_of(services))


@router.patch("/{name}/labels")
def label_host(services: Here, caller: Operator, name: Name, body: LabelsUpdate) -> HostView:
    """Set labels of a host, and remove those given as null."""
    with services.database.write() as conn:
        labels.label_host(conn, name, body.labels)
        return host_views.get_host(conn, name, judge_of(services))


@router.post("/{name}/retune", status_code=202, response_model=OperationView)
def retune_host(
    operations: Engine,
    caller: Operator,
    request: Request,
    name: Name,
    body: HostRetune,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Move running VMs between the host's NUMA cells, so that a large one fits; or only show what would move."""
    ask = ask_of(caller, idempotency_key, request, body)
    return accepted(request, operations.retune(name, body, ask))


@router.delete("/{name}", status_code=204)
def delete_host(services: Here, caller: Admin, name: Name) -> Response:
    """Forget a host that holds no VMs. Its certificates stop working here."""
    with services.database.write() as conn:
        hosts.delete_host(conn, name)
    services.liveness.forget(name)
    services.reports.vitals.forget(name)
    services.certificates.forget()
    return Response(status_code=204)


@router.post("/{name}/enrolment-token", status_code=201)
def make_enrolment_token(services: Here, caller: Admin, name: Name) -> EnrolmentTokenView:
    """Make the token with which this host enrols, once. It is shown only here; earlier ones stop working."""
    lifetime_s = services.settings.enrolment_token_lifetime_s
    with services.database.write() as conn:
        token, expires_at = create_enrolment_token(conn, name, now=services.now(), lifetime_s=lifetime_s)
    return EnrolmentTokenView(host=name, token=token, expires_at=expires_at)
