# SPDX-License-Identifier: Apache-2.0
"""`/v1/operations`: what is under way and how it ended; one operation as a stream of Server-Sent Events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from ppec_contract.api import Page
from ppec_contract.api_operations import OperationState, OperationView
from ppec_contract.errors import PpecError
from ppec_orchestrator.api.auth import Operator, Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.pages import ByName
from ppec_orchestrator.api.services import services_of
from ppec_orchestrator.operations.service import Operations
from ppec_orchestrator.store.operation_views import OperationFilter

router = APIRouter(prefix="/v1/operations", tags=["operations"], route_class=StrictJsonRoute)
_HEARTBEAT_S = 10.0
# Progress comes in bursts: a watcher gets one view of a burst, not one per event.
_BURST_S = 0.05
# A view holds every VM of its operation, so a page of them is kept shorter than others.
_MAX_PAGE = 50
OperationName = Annotated[str, Path(min_length=1, max_length=64, pattern=r"^[a-z0-9-]+$")]


# Asynchronous, as nothing in it waits: it needs no thread.
async def operations_of(request: Request) -> Operations:
    """The operations of this process. A process made without them (for the OpenAPI document) can't answer."""
    operations = (await services_of(request)).operations
    if operations is None:
        raise PpecError("internal.error", "this process was started without its operations engine")
    return operations


Engine = Annotated[Operations, Depends(operations_of)]


@router.get("", name="list_operations", summary="List operations, the newest first")
def list_operations(
    operations: Engine,
    caller: Viewer,
    wanted: ByName,
    state: OperationState | None = None,
    kind: Annotated[str | None, Query(max_length=32)] = None,
) -> Page[OperationView]:
    short = replace(wanted, limit=min(wanted.limit, _MAX_PAGE))
    return operations.page(short, OperationFilter(state, kind))


@router.get("/{operation}", name="get_operation", summary="Show an operation")
def get_operation(operations: Engine, caller: Viewer, operation: OperationName) -> OperationView:
    return operations.show(operation)


@router.post("/{operation}/cancel", name="cancel_operation", summary="Cancel an operation", status_code=202)
def cancel_operation(operations: Engine, caller: Operator, operation: OperationName) -> OperationView:
    """Ends its run and undoes what was done, where that can be undone. It has ended once its state says so."""
    return operations.cancel(operation)


@router.get(
    "/{operation}/events",
    name="watch_operation",
    summary="Watch an operation",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "`operation` events, then one `end`."}},
)
async def watch_operation(operations: Engine, caller: Viewer, operation: OperationName) -> Response:
    """Server-Sent Events: `operation` with the whole view on every change, `end` with the last one."""
    first = await run_in_threadpool(operations.show, operation)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(operations, first), media_type="text/event-stream", headers=headers)


async def _events(operations: Operations, first: OperationView) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    unwatch = operations.watch(first.operation_id, lambda: loop.call_soon_threadsafe(changed.set))
    try:
        shown: OperationView | None = None
        while True:
            changed.clear()
            view = await run_in_threadpool(operations.show, first.operation_id)
            if view != shown:
                yield _event("operation", view)
                shown = view
            if view.state.ended:
                yield _event("end", view)
                return
            try:
                await asyncio.wait_for(changed.wait(), _HEARTBEAT_S)
                await asyncio.sleep(_BURST_S)
            except TimeoutError:
                yield ": still here\n\n"
    finally:
        unwatch()


def _event(name: str, view: OperationView) -> str:
    # One line: JSON has no raw line breaks, so the data can't end the event early.
    return f"event: {name}\ndata: {view.model_dump_json()}\n\n"
