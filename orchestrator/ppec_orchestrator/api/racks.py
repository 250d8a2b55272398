# SPDX-License-Identifier: Apache-2.0
"""/v1/racks"""

from ppec_contract.api_catalogue import RackCreate
from ppec_orchestrator.api.catalogue import catalogue_router
from ppec_orchestrator.store.racks import RACKS

router = catalogue_router(RACKS, RackCreate, "racks")
