# SPDX-License-Identifier: Apache-2.0
"""/v1/vrfs"""

from ppec_contract.api import VrfCreate
from ppec_orchestrator.api.catalogue import catalogue_router
from ppec_orchestrator.store.vrfs import VRFS

router = catalogue_router(VRFS, VrfCreate, "vrfs")
