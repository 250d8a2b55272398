# SPDX-License-Identifier: Apache-2.0
"""/v1/clusters"""

from ppec_contract.api_catalogue import ClusterCreate
from ppec_orchestrator.api.catalogue import catalogue_router
from ppec_orchestrator.store.clusters import CLUSTERS

router = catalogue_router(CLUSTERS, ClusterCreate, "clusters")
