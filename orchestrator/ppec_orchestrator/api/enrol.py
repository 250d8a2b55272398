# SPDX-License-Identifier: Apache-2.0
"""POST /v1/enrol: a host turns its one-time token into a certificate. No other credentials are asked for."""

from __future__ import annotations

from fastapi import APIRouter

from ppec_contract.host import EnrolReply, EnrolRequest
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.store.certificates import record_certificate
from ppec_orchestrator.store.enrolment import use_enrolment_token

router = APIRouter(prefix="/v1/enrol", tags=["hosts"], route_class=StrictJsonRoute)


@router.post("", status_code=201)
def enrol_host(services: Here, body: EnrolRequest) -> EnrolReply:
    """Certify the key of the signing request for the host that the token is of; the token is used up."""
    now = services.now()
    # One transaction: a request that can't be certified doesn't use the token up.
    with services.database.write() as conn:
        enrollee = use_enrolment_token(conn, body.host, body.token, now=now)
        issued = services.ca.issue_host(body.csr_pem, enrollee.name, enrollee.address, now=now)
        record_certificate(conn, issued, now=now)
    return EnrolReply(certificate_pem=issued.pem, ca_pem=services.ca.ca_pem, not_after=issued.not_after.isoformat())
