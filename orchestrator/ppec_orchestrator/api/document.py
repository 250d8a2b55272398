# SPDX-License-Identifier: Apache-2.0
"""GET /v1/openapi.json: open to everyone; it says nothing that isn't in every copy of PPEC."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from ppec_orchestrator.api.queries import StrictQueryRoute

# FastAPI's own route takes any query.
router = APIRouter(prefix="/v1/openapi.json", tags=["openapi"], route_class=StrictQueryRoute)


@router.get("", response_class=JSONResponse)
async def get_openapi(request: Request) -> JSONResponse:
    """Show this document."""
    app: FastAPI = request.app
    return JSONResponse(app.openapi())
