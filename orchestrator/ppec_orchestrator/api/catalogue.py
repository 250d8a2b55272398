# SPDX-License-Identifier: Apache-2.0
"""The endpoints every catalogue resource has: list, create, get, delete.

This file has no `from __future__ import annotations`: FastAPI must see the models themselves, not their local names.
"""

from typing import Any, cast

from fastapi import APIRouter, Response

from ppec_contract.api import Page
from ppec_contract.model import Model
from ppec_orchestrator.api.auth import Admin, Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.pages import ByName, Name
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.store.catalogue import Catalogue


def catalogue_router(catalogue: Catalogue[Any], create_model: type[Model], path: str) -> APIRouter:
    """`GET`, `POST /v1/<path>` and `GET`, `DELETE /v1/<path>/{name}`."""
    router = APIRouter(prefix=f"/v1/{path}", tags=[path], route_class=StrictJsonRoute)
    view, code = catalogue.view, catalogue.code
    page: Any = cast("Any", Page)[view]

    @router.get("", name=f"list_{path}", summary=f"List {path}", response_model=page)
    def list_all(services: Here, caller: Viewer, wanted: ByName) -> Page[Any]:
        with services.database.read() as conn:
            return catalogue.page(conn, wanted)

    @router.post("", name=f"create_{code}", summary=f"Create a {catalogue.word}", status_code=201, response_model=view)
    def create(services: Here, caller: Admin, body: create_model) -> Any:  # type: ignore[valid-type]
        with services.database.write() as conn:
            return catalogue.create(conn, body)

    @router.get("/{name}", name=f"get_{code}", summary=f"Show a {catalogue.word}", response_model=view)
    def get(services: Here, caller: Viewer, name: Name) -> Any:
        with services.database.read() as conn:
            return catalogue.get(conn, name)

    @router.delete("/{name}", name=f"delete_{code}", summary=f"Delete a {catalogue.word}", status_code=204)
    def delete(services: Here, caller: Admin, name: Name) -> Response:
        with services.database.write() as conn:
            catalogue.delete(conn, name)
        return Response(status_code=204)

    return router
