# SPDX-License-Identifier: Apache-2.0
"""/v1/fleet: the fleet as the planner sees it, to plan on elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from ppec_orchestrator.api.auth import Viewer
from ppec_orchestrator.api.queries import StrictQueryRoute
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.fleets.snapshot import written
from ppec_orchestrator.store.fleet import load_fleet

router = APIRouter(prefix="/v1/fleet", tags=["fleet"], route_class=StrictQueryRoute)
_PIECE_CHARACTERS = 256 * 1024
_SNAPSHOT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A snapshot, ppec-fleet/1.",
        "content": {"application/json": {"schema": {"type": "object", "required": ["schema", "hosts"]}}},
    }
}


@router.get("", response_class=StreamingResponse, responses=_SNAPSHOT)
def get_fleet(services: Here, caller: Viewer) -> StreamingResponse:
    """The whole fleet at one moment, as a snapshot to plan on: hosts, their VMs, what is free."""
    with services.database.read() as conn:
        fleet = load_fleet(conn, now=services.now(), silent_after_s=services.settings.silent_after_s)
    return StreamingResponse(_in_large_pieces(written(fleet)), media_type="application/json")


def _in_large_pieces(pieces: Iterator[str]) -> Iterator[str]:
    """Each piece that the server sends costs it a switch of threads."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _PIECE_CHARACTERS:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)
