# SPDX-License-Identifier: Apache-2.0
"""GET /v1/health: open to everyone, for load balancers and for whoever waits for a start."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from sqlalchemy import literal, select

from ppec_contract.api import HealthView
from ppec_contract.version import API_VERSION
from ppec_orchestrator.api.queries import StrictQueryRoute
from ppec_orchestrator.api.services import Here

router = APIRouter(prefix="/v1/health", tags=["health"], route_class=StrictQueryRoute)


@router.get("")
def get_health(services: Here) -> HealthView:
    """Answers while the database does; `store.unavailable` otherwise."""
    with services.database.read() as conn:
        conn.execute(select(literal(1)))
    return HealthView(version=version("ppec"), api_version=API_VERSION)
