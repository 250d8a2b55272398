# SPDX-License-Identifier: Apache-2.0
"""`/v1/vms`: what changes VMs is accepted as an operation (202 and `Location`); the rest is read from the record."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from ppec_contract.api import LabelsUpdate, Page
from ppec_contract.api_operations import OperationView
from ppec_contract.api_vms import VmAction, VmRecord, VmResize, VmsAction, VmsCreate, VmView
from ppec_contract.host import Architecture
from ppec_contract.vm import VmState
from ppec_orchestrator.api.asks import IdempotencyKey, accepted, ask_of
from ppec_orchestrator.api.audited import changes
from ppec_orchestrator.api.auth import Operator, Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.operations import Engine
from ppec_orchestrator.api.pages import (
    STREAMED,
    ByName,
    Filter,
    LabelFilter,
    SearchText,
    listed,
    wanted_labels,
    wanted_text,
)
from ppec_orchestrator.api.services import Here, Services
from ppec_orchestrator.store import labels, vm_views
from ppec_orchestrator.store.paging import Documents, Slice
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.vm_lists import VmFilter
from ppec_orchestrator.store.vms import find

router = APIRouter(prefix="/v1/vms", tags=["vms"], route_class=StrictJsonRoute)
VmRefInPath = Annotated[str, Path(min_length=1, max_length=63, pattern=r"^[^\x00]+$", description="Name or id.")]
NameFilter = Annotated[str | None, Query(max_length=63, pattern=r"^[^\x00]*$")]


async def chosen_vms(  # noqa: PLR0913, PLR0917 - one parameter per filter
    services: Here,
    architecture: Architecture | None = None,
    region: Filter = None,
    datacentre: Filter = None,
    cluster: Filter = None,
    rack: Filter = None,
    vrf: Filter = None,
    host: Filter = None,
    name: NameFilter = None,
    record: VmRecord | None = None,
    observed: VmState | None = None,
    image: Filter = None,
    flavor: Filter = None,
    pool: Filter = None,
    label: LabelFilter = [],  # noqa: B006 - FastAPI copies it
    q: SearchText = None,
) -> VmFilter:
    """All that are given must hold."""
    return VmFilter(
        silent_before=_silent_before(services),
        place=Place(architecture, region, datacentre, cluster, rack, vrf, host),
        name=name,
        record=record,
        observed=observed,
        image=image,
        flavor=flavor,
        pool=pool,
        labels=wanted_labels(label),
        text=wanted_text(q),
    )


def _silent_before(services: Services) -> datetime:
    return services.now() - timedelta(seconds=services.settings.silent_after_s)


@router.post("", name="create_vms", summary="Create one VM or a batch", status_code=202, response_model=OperationView)
def create_vms(
    operations: Engine,
    caller: Operator,
    request: Request,
    body: VmsCreate,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Placed, given addresses and queued in one transaction, or refused with the reasons counted over hosts."""
    return accepted(request, operations.create(body, ask_of(caller, idempotency_key, request, body)))


@router.post(
    "/actions",
    name="act_on_vms",
    summary="Start, stop, reboot, reset, pause, resume, freeze, thaw, delete VMs",
    status_code=202,
    response_model=OperationView,
)
def act_on_vms(
    operations: Engine,
    caller: Operator,
    request: Request,
    body: VmsAction,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """One operation for all of them; each VM's result is its own."""
    return accepted(request, operations.act(body, ask_of(caller, idempotency_key, request, body)))


@router.get("", name="list_vms", summary="List VMs", response_model=Page[VmView], responses=STREAMED)
def list_vms(
    request: Request, services: Here, caller: Viewer, wanted: ByName, chosen: Annotated[VmFilter, Depends(chosen_vms)]
) -> Response:
    """By name. `q` looks in names, images, flavors, labels and hosts' names, and for addresses that begin so."""

    def read(part: Slice) -> Documents:
        with services.database.read() as conn:
            return vm_views.page(conn, part, chosen)

    return listed(request, wanted, read)


@router.get("/{vm}", name="get_vm", summary="Show a VM")
def get_vm(services: Here, caller: Viewer, vm: VmRefInPath) -> VmView:
    with services.database.read() as conn:
        view = vm_views.show(conn, vm, _silent_before(services))
    use = None if view.host is None else services.reports.vitals.use_of_vm(view.host, view.vm_id)
    return view if use is None else view.model_copy(update={"use": use})


@router.patch("/{vm}", name="resize_vm", summary="Resize a VM", status_code=202, response_model=OperationView)
def resize_vm(
    operations: Engine,
    caller: Operator,
    request: Request,
    vm: VmRefInPath,
    body: VmResize,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """On its host, at once as far as it can be done while the VM runs, the rest at its next start."""
    ask = ask_of(caller, idempotency_key, request, body)
    return accepted(request, operations.resize(vm, body, ask))


@router.patch("/{vm}/labels", name="label_vm", summary="Set and remove labels of a VM")
def label_vm(services: Here, caller: Operator, request: Request, vm: VmRefInPath, body: LabelsUpdate) -> VmView:
    """At once, whatever is under way on the VM: its labels are of the record alone."""
    with services.database.write() as conn:
        known = find(conn, [vm])[0]
        changes(request, [known.name])
        labels.label_vm(conn, known.vm_id, body.labels)
        return vm_views.show(conn, str(known.vm_id), _silent_before(services))


@router.delete("/{vm}", name="delete_vm", summary="Delete a VM", status_code=202, response_model=OperationView)
def delete_vm(
    operations: Engine,
    caller: Operator,
    request: Request,
    vm: VmRefInPath,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    body = VmsAction(action=VmAction.DELETE, vms=(vm,))
    return accepted(request, operations.act(body, ask_of(caller, idempotency_key, request, body)))
