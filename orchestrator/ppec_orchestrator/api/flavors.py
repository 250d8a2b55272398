# SPDX-License-Identifier: Apache-2.0
"""/v1/flavors"""

from ppec_contract.api_catalogue import FlavorCreate
from ppec_orchestrator.api.catalogue import catalogue_router
from ppec_orchestrator.store.flavors import FLAVORS

router = catalogue_router(FLAVORS, FlavorCreate, "flavors")
