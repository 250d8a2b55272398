# SPDX-License-Identifier: Apache-2.0
"""Clusters: one architecture, in one data centre."""

from ppec_contract.api_catalogue import ClusterView
from ppec_orchestrator.store.catalogue import Catalogue
from ppec_orchestrator.store.tables import cluster, datacentre

CLUSTERS = Catalogue(
    code="cluster",
    word="cluster",
    table=cluster,
    view=ClusterView,
    references={"datacentre": datacentre},
)
