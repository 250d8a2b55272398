# SPDX-License-Identifier: Apache-2.0
"""Data centres: a name and a region."""

from ppec_contract.api_catalogue import DatacentreView
from ppec_orchestrator.store.catalogue import Catalogue
from ppec_orchestrator.store.tables import datacentre

DATACENTRES = Catalogue(code="datacentre", word="data centre", table=datacentre, view=DatacentreView)
