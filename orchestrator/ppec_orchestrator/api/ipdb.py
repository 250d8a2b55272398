# SPDX-License-Identifier: Apache-2.0
"""/v1/ipdb: import and export."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from ppec_contract.api_ipdb import ImportSkipped, IpdbDocument, IpdbImport, IpdbImported, PrefixCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.api.audited import changes
from ppec_orchestrator.api.auth import Admin, Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.pages import Filter
from ppec_orchestrator.api.prefixes import check_source
from ppec_orchestrator.api.services import Here, Services
from ppec_orchestrator.ipdb.exchange import Fault, Row, as_csv, rows_of_csv, rows_of_document
from ppec_orchestrator.ipdb.provider import SourcePrefix
from ppec_orchestrator.ipdb.unusable_prefixes import Sifted, sifted
from ppec_orchestrator.store.exchange import Importer, check_rows, check_size, export_document, new_prefixes

router = APIRouter(prefix="/v1/ipdb", tags=["ipdb"], route_class=StrictJsonRoute)


@router.get("/export", summary="Export the IPDB")
def export_ipdb(services: Here, caller: Viewer, vrf: Filter = None) -> IpdbDocument:
    """VRFs, prefixes and what is held back of them: as `import` takes it."""
    with services.database.read() as conn:
        return export_document(conn, vrf)


@router.get("/export.csv", summary="Export the IPDB as a table", response_class=Response)
def export_ipdb_as_csv(services: Here, caller: Viewer, vrf: Filter = None) -> Response:
    with services.database.read() as conn:
        table = as_csv(export_document(conn, vrf))
    return Response(table, media_type="text/csv", headers={"content-disposition": 'attachment; filename="ipdb.csv"'})


@router.post("/import", summary="Import into the IPDB")
def import_ipdb(services: Here, caller: Admin, request: Request, body: IpdbImport) -> IpdbImported:
    """All or nothing. What is there just so is left alone; every fault is told with its place and reason."""
    rows, faults = _rows(body)
    cidrs = [str(row.item.cidr) for row in rows if isinstance(row.item, PrefixCreate)]
    changes(request, ["a dry run"] if body.dry_run else cidrs or ["no prefixes"])
    new, left = _sifted(services, rows, faults, skip=body.skip_refused)
    faults += [*left.faults, *_unlike_source(services, new)]
    with services.database.write() as conn:
        done = Importer(conn, caller.name, services.now).carry_out(left.rows, faults, dry_run=body.dry_run)
    skipped = tuple(ImportSkipped(place=one.place, reason=one.reason) for one in left.skipped)
    return done.model_copy(update={"skipped": skipped})


def _sifted(
    services: Services, rows: Sequence[Row], faults: Sequence[Fault], *, skip: bool
) -> tuple[list[tuple[str, PrefixCreate]], Sifted]:
    """The new prefixes that aren't refused for what their addresses are, and the rows without those that are."""
    check_rows(rows, faults)
    with services.database.read() as conn:
        new = new_prefixes(conn, rows)
        left = sifted(rows, new, skip=skip)
        # What is skipped makes no addresses.
        check_size(conn, left.rows, [*faults, *left.faults])
    places = {row.place for row in left.rows}
    return [one for one in new if one[0] in places], left


def _unlike_source(services: Services, new: Sequence[tuple[str, PrefixCreate]]) -> list[Fault]:
    """New prefixes that are not what NetBox has under their `netbox_id`. Raises `netbox.unavailable`."""
    found, beside = [], list[SourcePrefix]()
    for place, wanted in new:
        if wanted.netbox_id is not None:
            try:
                beside.append(check_source(services, wanted, beside))
            except PpecError as error:
                if error.retryable:
                    raise
                found.append(Fault(place, error.message))
    return found


def _rows(body: IpdbImport) -> tuple[list[Row], list[Fault]]:
    if body.csv is not None:
        return rows_of_csv(body.csv)
    return rows_of_document(body.document or IpdbDocument()), []
