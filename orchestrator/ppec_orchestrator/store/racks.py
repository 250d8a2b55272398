# SPDX-License-Identifier: Apache-2.0
"""Racks of a cluster."""

from ppec_contract.api_catalogue import RackView
from ppec_orchestrator.store.catalogue import Catalogue
from ppec_orchestrator.store.tables import cluster, rack

RACKS = Catalogue(code="rack", word="rack", table=rack, view=RackView, references={"cluster": cluster})
