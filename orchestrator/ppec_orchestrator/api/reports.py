# SPDX-License-Identifier: Apache-2.0
"""PUT and PATCH /v1/hosts/{host}/report, POST /v1/hosts/{host}/heartbeat: for the host itself, by its certificate."""

from __future__ import annotations

from fastapi import APIRouter

from ppec_contract.host import Heartbeat, HeartbeatReply, ReportEnvelope
from ppec_contract.host_delta import ReportDelta
from ppec_orchestrator.api.auth import HostItself
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.services import Here


class ReportRoute(StrictJsonRoute):
    """Not audited, nor let wait: what hosts observe, every few seconds, is no change of anybody's."""

    audited = False
    may_wait = False


router = APIRouter(prefix="/v1/hosts/{host}", tags=["reports"], route_class=ReportRoute)


@router.put("/report")
def put_report(services: Here, host: HostItself, body: ReportEnvelope) -> HeartbeatReply:
    """Take a host's full report. One that is older than the last message changes nothing."""
    return services.reports.report(host, body, now=services.now())


@router.patch("/report")
def patch_report(services: Here, host: HostItself, body: ReportDelta) -> HeartbeatReply:
    """Take what changed since the report that is held, or ask for the full one. An older one changes nothing."""
    return services.reports.delta(host, body, now=services.now())


@router.post("/heartbeat")
def post_heartbeat(services: Here, host: HostItself, body: Heartbeat) -> HeartbeatReply:
    """Note that a host is alive and unchanged, or ask for its full report."""
    return services.reports.heartbeat(host, body, now=services.now())
