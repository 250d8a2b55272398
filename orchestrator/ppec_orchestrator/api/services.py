# SPDX-License-Identifier: Apache-2.0
"""What the endpoints work with: made once at start, handed to every request, replaced as a whole in tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, cast

from fastapi import Depends, Request

from ppec_contract.errors import PpecError
from ppec_orchestrator.address_supply import AddressSupply
from ppec_orchestrator.api.places import Places
from ppec_orchestrator.host_views.port import HostViews
from ppec_orchestrator.host_views.proxy import ProxyViews
from ppec_orchestrator.image_store import ImageStore
from ppec_orchestrator.liveness import LivenessBook
from ppec_orchestrator.netbox import NetBox
from ppec_orchestrator.operations.service import Operations
from ppec_orchestrator.pki.ca import FleetCa
from ppec_orchestrator.report_intake import ReportIntake
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.certificates import CertificateBook, record_certificate
from ppec_orchestrator.store.clock import Clock, utc_now
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.hosts import flush_last_seen
from ppec_orchestrator.store.tokens import TokenBook

# Each may wait for a guest for as long as it was asked to.
_MOST_GUEST_QUERIES = 64


@dataclass(frozen=True)
class Services:
    """`now` is the clock everything in the API uses, so that a test can set it."""

    settings: Settings
    database: Database
    ca: FleetCa
    images: ImageStore
    liveness: LivenessBook
    tokens: TokenBook
    certificates: CertificateBook
    reports: ReportIntake
    host_views: HostViews
    guest_queries: Places
    consoles: Places
    operations: Operations | None = None
    supply: AddressSupply | None = None
    now: Clock = field(default=utc_now)


def address_supply(settings: Settings, database: Database, now: Clock) -> AddressSupply | None:
    """From NetBox, if the settings name one. Raises `request.invalid`."""
    if not settings.netbox_url:
        return None
    try:
        token = settings.netbox_token_path.read_text(encoding="utf-8").strip() if settings.netbox_token_path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise PpecError(
            "request.invalid", f"netbox_token_path can't be read: {type(error).__name__}", subject="settings"
        ) from error
    source = NetBox(settings.netbox_url, token, settings.netbox_mark, settings.netbox_ca_path)
    return AddressSupply(database, source, standing=settings.netbox_standing, now=now)


def make_services(settings: Settings, database: Database, *, now: Clock = utc_now) -> Services:
    """The services of one process on a migrated database; makes the fleet CA when there is none. Without an engine."""
    ca = FleetCa.open(settings.pki_dir, now=now())
    issued = ca.ensure_orchestrator(settings.server_names, now=now())
    if issued is not None:
        with database.write() as conn:
            record_certificate(conn, issued, now=now())
    liveness = LivenessBook(partial(flush_last_seen, database), silent_after_s=settings.silent_after_s)
    return Services(
        settings=settings,
        database=database,
        ca=ca,
        images=ImageStore(settings.images_dir, max_bytes=settings.max_image_bytes),
        liveness=liveness,
        tokens=TokenBook(database),
        certificates=CertificateBook(database),
        reports=ReportIntake(database, liveness, settings),
        host_views=ProxyViews(ca.orchestrator_pair),
        guest_queries=Places("questions to guests", _MOST_GUEST_QUERIES),
        consoles=Places("consoles", settings.max_consoles),
        supply=address_supply(settings, database, now),
        now=now,
    )


async def services_of(request: Request) -> Services:
    """Asynchronous, because otherwise each request would change threads for it."""
    return cast("Services", request.app.state.services)


# `def endpoint(services: Here, …)`
Here = Annotated[Services, Depends(services_of)]
