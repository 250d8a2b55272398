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
# JSON names its format near its beginning.
_SCHEMA = re.compile(rb'"schema"\s*:\s*"([\x20-\x7e]{1,64}?)"')
_HEAD_BYTES = 4096


def read_fleet(path: Path) -> FleetFile:
    """Raises PpecError `fleet.unreadable` for a file that is none of the formats, `fleet.invalid` with the line or
    path for one that is wrong inside."""
    data = _bytes(path)
    try:
        return _reader(path, data)(data)
    except FleetError as fault:
        raise invalid(path, fault) from fault


def read_requests(path: Path, beside: FleetFile) -> tuple[VmRequest, ...]:
    """Requests to try on a fleet: those of another fleet's file, or a file of requests alone, which is
    `ppec-requests/1` or, where it names no schema, written as the fleet's own format writes them."""
    data = _bytes(path)
    schema = _schema(data) if _is_json(data) else None
    try:
        if schema in _READERS:
            found = _READERS[schema](data).requests
        elif schema == "" and beside.requests_reader is not None:
            found = beside.requests_reader(data)
        elif schema in ("", snapshot.REQUESTS_SCHEMA):
            found = snapshot.read_requests(data, beside.names)
        else:
            raise unreadable(path, "it is no file of requests")
        standing = {vm.name for host in beside.fleet.hosts for vm in host.vms}
        for index, request in enumerate(found):
            refuse_standing(request.name, standing, f"batch[{index}].name")
    except FleetError as fault:
        raise invalid(path, fault) from fault
    return found


def _reader(path: Path, data: bytes) -> Callable[[bytes], FleetFile]:
    if not _is_json(data):
        return ganeti.read
    schema = _schema(data)
    if schema not in _READERS:
        raise unreadable(path, f"{schema!r} is no format of fleets" if schema else "it names no schema")
    return _READERS[schema]


def _is_json(data: bytes) -> bool:
    return data[:_HEAD_BYTES].lstrip()[:1] in (b"{", b"[")


def _schema(data: bytes) -> str:
    found = _SCHEMA.search(data[:_HEAD_BYTES])
    return found[1].decode() if found else ""


def _bytes(path: Path) -> bytes:
    try:
        # A device or a pipe has no size of its own; read, then, no more than is taken.
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error.strerror or type(error).__name__) from error
    if len(data) > MOST_BYTES:
        raise unreadable(path, f"it is larger than {MOST_BYTES // 1024**2} MiB")
    return data
