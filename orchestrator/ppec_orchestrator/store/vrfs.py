# SPDX-License-Identifier: Apache-2.0
"""VRFs: address spaces apart."""

from ppec_contract.api_ipdb import VrfView
from ppec_orchestrator.store.catalogue import Catalogue
from ppec_orchestrator.store.tables import vrf

VRFS = Catalogue(code="vrf", word="VRF", table=vrf, view=VrfView)
