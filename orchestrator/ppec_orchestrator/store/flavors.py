# SPDX-License-Identifier: Apache-2.0
"""Flavors: a VM copies its size, so a flavor can be deleted while VMs of it run."""

from ppec_contract.api_catalogue import FlavorView
from ppec_orchestrator.store.catalogue import Catalogue
from ppec_orchestrator.store.tables import flavor

FLAVORS = Catalogue(code="flavor", word="flavor", table=flavor, view=FlavorView)
