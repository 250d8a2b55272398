# SPDX-License-Identifier: Apache-2.0
"""/v1/datacentres"""

from ppec_contract.api_catalogue import DatacentreCreate
from ppec_orchestrator.api.catalogue import catalogue_router
from ppec_orchestrator.store.datacentres import DATACENTRES

router = catalogue_router(DATACENTRES, DatacentreCreate, "datacentres")
