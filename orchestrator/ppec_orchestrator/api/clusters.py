# SPDX-License-Identifier: Apache-2.0
"""/v1/clusters

This file has no `from __future__ import annotations`: FastAPI must see the models themselves, not their local names.
"""

from fastapi import Request

from ppec_contract.api_catalogue import ClusterCreate, ClusterUpdate, ClusterView
from ppec_orchestrator.api.audited import tells
from ppec_orchestrator.api.auth import Admin
from ppec_orchestrator.api.catalogue import catalogue_router
from ppec_orchestrator.api.pages import Name
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.store.clusters import CLUSTERS, update_cluster

router = catalogue_router(CLUSTERS, ClusterCreate, "clusters")


@router.patch("/{name}", name="update_cluster", summary="Change the rule of a cluster about N+1")
def update(request: Request, services: Here, caller: Admin, name: Name, body: ClusterUpdate) -> ClusterView:
    """From now on nothing is placed there, and no VM grows there, but by this rule."""
    tells(request, n_plus_one=f"{body.n_plus_one.mode}:{body.n_plus_one.level}")
    with services.database.write() as conn:
        return update_cluster(conn, name, body)
