# SPDX-License-Identifier: Apache-2.0
"""Puts the API together. `create_app` starts nothing: that is `serve.py`'s part."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from ppec_contract.api_consoles import ConsoleNotice
from ppec_contract.errors import Problem
from ppec_contract.version import API_VERSION
from ppec_orchestrator.api import (
    addresses,
    clusters,
    consoles,
    datacentres,
    document,
    enrol,
    flavors,
    fleet,
    guests,
    health,
    hosts,
    images,
    ipdb,
    operations,
    plans,
    prefixes,
    racks,
    reports,
    vms,
    vrfs,
)
from ppec_orchestrator.api.bodies import BodyLimit, UnreadBodies
from ppec_orchestrator.api.problems import PROBLEM_JSON, UnhandledErrors, install_problems
from ppec_orchestrator.api.services import Services

# Tried one after another: first what is asked most often, by hosts every few seconds and by whoever makes VMs.
ROUTERS: tuple[APIRouter, ...] = (
    reports.router,
    vms.router,
    operations.router,
    hosts.router,
    plans.router,
    health.router,
    document.router,
    datacentres.router,
    clusters.router,
    racks.router,
    flavors.router,
    images.router,
    vrfs.router,
    prefixes.router,
    addresses.router,
    fleet.router,
    ipdb.router,
    enrol.router,
    guests.router,
    consoles.router,
)


def _operation_id(route: APIRoute) -> str:
    return route.name


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's document, with what no endpoint returns: the problem, and what a WebSocket tells."""
        document = super().openapi()
        schemas = document["components"]["schemas"]
        for model in (Problem, ConsoleNotice):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            for name, part in {**schema.pop("$defs", {}), model.__name__: schema}.items():
                schemas.setdefault(name, part)
        return document


def add_routes() -> FastAPI:
    """The API's paths and answers, without the services behind them: enough for the OpenAPI document."""
    app = _Api(
        title="PPEC orchestrator",
        version=str(API_VERSION),
        openapi_url=None,  # `document.py` has it
        docs_url=None,  # its page loads scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        responses={
            "default": {
                "description": "What went wrong: `code` is stable, `hint` says what to do.",
                "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }
        },
    )
    for router in ROUTERS:
        app.include_router(router)
    return app


def create_app(services: Services) -> FastAPI:
    """The whole API on these services; usable at once, with no network and no threads of its own."""
    app = add_routes()
    app.state.services = services
    install_problems(app)
    # The last added is the outermost.
    app.add_middleware(BodyLimit, limit_bytes=services.settings.max_body_bytes)
    app.add_middleware(UnhandledErrors)
    app.add_middleware(UnreadBodies)
    return app
