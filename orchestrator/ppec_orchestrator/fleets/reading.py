# SPDX-License-Identifier: Apache-2.0
"""Reads a fleet's file, whatever format it is in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ppec_orchestrator.fleets import bench_cluster, ganeti, snapshot
from ppec_orchestrator.fleets.faults import FleetError, invalid, refuse_standing, unreadable
from ppec_orchestrator.fleets.file import MOST_BYTES, FleetFile
from ppec_orchestrator.placement.request import VmRequest

_READERS: dict[str, Callable[[bytes], FleetFile]] = {
    snapshot.SCHEMA: snapshot.read,
    bench_cluster.SCHEMA: bench_cluster.read,
}
# JSON names its format, as a rule at its beginning. No text inside it looks like this: its quotes are escaped.
_SCHEMA = re.compile(rb'"schema"\s*:\s*"([\x20-\x7e]{1,64}?)"')
_HEAD_BYTES = 4096


def read_fleet(data: bytes, source: str) -> FleetFile:
    """Raises PpecError `fleet.unreadable` for what is none of the formats, `fleet.invalid` with the line or path for
    what is wrong inside. `source` is its name in messages."""
    try:
        return _reader(data, source)(data)
    except FleetError as fault:
        raise invalid(source, fault) from fault


def read_requests(data: bytes, source: str, beside: FleetFile) -> tuple[VmRequest, ...]:
    """Requests to try on a fleet: those of another fleet's file, or a file of requests alone, which is
    `ppec-requests/1` or, where it names no schema, written as the fleet's own format writes them."""
    schema = _schema(data) if _is_json(data) else None
    try:
        if schema in _READERS:
            found = _READERS[schema](data).requests
        elif schema == "" and beside.requests_reader is not None:
            found = beside.requests_reader(data)
        elif schema in ("", snapshot.REQUESTS_SCHEMA):
            found = snapshot.read_requests(data, beside.names)
        else:
            raise unreadable(source, "it is no file of requests")
        standing = {vm.name for host in beside.fleet.hosts for vm in host.vms}
        for index, request in enumerate(found):
            refuse_standing(request.name, standing, f"batch[{index}].name")
    except FleetError as fault:
        raise invalid(source, fault) from fault
    return found


def _reader(data: bytes, source: str) -> Callable[[bytes], FleetFile]:
    if not _is_json(data):
        return ganeti.read
    schema = _schema(data)
    if schema not in _READERS:
        raise unreadable(source, f"{schema!r} is no format of fleets" if schema else "it names no schema")
    return _READERS[schema]


def _is_json(data: bytes) -> bool:
    return data[:_HEAD_BYTES].lstrip()[:1] in (b"{", b"[")


def _schema(data: bytes) -> str:
    found = _SCHEMA.search(data)
    return found[1].decode() if found else ""


def contents(path: Path) -> bytes:
    """Of a file that is not too large to be a fleet; raises PpecError `fleet.unreadable`."""
    try:
        # A device or a pipe has no size of its own; read, then, no more than is taken.
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise unreadable(str(path), error.strerror or type(error).__name__) from error
    if len(data) > MOST_BYTES:
        raise unreadable(str(path), f"it is larger than {MOST_BYTES // 1024**2} MiB")
    return data
