# SPDX-License-Identifier: Apache-2.0
"""/v1/vrfs"""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

from ppec_contract.api_ipdb import IpNetwork, VrfCreate, VrfFree
from ppec_orchestrator.api.auth import Viewer
from ppec_orchestrator.api.catalogue import catalogue_router
from ppec_orchestrator.api.pages import Name
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.store.prefixes import free_in_vrf
from ppec_orchestrator.store.vrfs import VRFS

router = catalogue_router(VRFS, VrfCreate, "vrfs")
Within = Annotated[IpNetwork, Query(description="The network to look in, such as 10.0.0.0/8.")]


@router.get("/{name}/free", name="get_vrf_free", summary="Show where another prefix would fit")
def get_vrf_free(services: Here, caller: Viewer, name: Name, within: Within) -> VrfFree:
    with services.database.read() as conn:
        return free_in_vrf(conn, name, within)
