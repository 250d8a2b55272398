# SPDX-License-Identifier: Apache-2.0
"""Reads a fleet's file, or one of requests, whatever format it is in."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Protocol
from uuid import UUID

from ppec_orchestrator.fleets import bench_cluster, ganeti, snapshot
from ppec_orchestrator.fleets.faults import (
    FLEET,
    REQUESTS,
    FleetError,
    Kind,
    invalid,
    refuse_standing,
    shown,
    unreadable,
)
from ppec_orchestrator.fleets.file import MOST_BYTES, FleetFile
from ppec_orchestrator.fleets.groups import Member, refuse_contradictions
from ppec_orchestrator.fleets.json_document import parsed
from ppec_orchestrator.fleets.places import refuse_unknown_scope


class _Reader(Protocol):
    def __call__(self, parsed: object, taken: Container[UUID] = ()) -> FleetFile: ...


_READERS: dict[str, _Reader] = {
    snapshot.SCHEMA: snapshot.read,
    bench_cluster.SCHEMA: bench_cluster.read,
}
# Written by some editors before a text in UTF-8; it says nothing.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What files begin with that are often taken for the text they were made of.
_NO_TEXT = {
    b"\x1f\x8b": ("it is compressed by gzip", "Unpack it first: gzip -d."),
    b"\xfd7zXZ\x00": ("it is compressed by xz", "Unpack it first: xz -d."),
    b"\x28\xb5\x2f\xfd": ("it is compressed by zstd", "Unpack it first: zstd -d."),
    b"PK\x03\x04": ("it is a zip archive", "Unpack it first: unzip."),
    b"\xff\xfe": ("it is text in UTF-16", "Write it in UTF-8."),
    b"\xfe\xff": ("it is text in UTF-16", "Write it in UTF-8."),
}
_HEAD_BYTES = 4096


def read_fleet(data: bytes, source: str) -> FleetFile:
    """Raises PpecError `fleet.unreadable` for what is none of the formats, `fleet.invalid` with the line or path for
    what is wrong inside. `source` is its name in messages."""
    text = _text(data, source, FLEET)
    try:
        if not _is_json(text):
            return ganeti.read(text)
        document = parsed(text)
        schema = _schema(document)
        if schema not in _READERS:
            raise unreadable(source, f"{shown(schema)} is no format of fleets" if schema else "it names no schema")
        return _READERS[schema](document)
    except FleetError as fault:
        raise invalid(source, fault) from fault


def read_requests(data: bytes, source: str, beside: FleetFile) -> FleetFile:
    """The fleet with other requests to try on it: those of another fleet's file, or of a file of requests alone, which
    is `ppec-requests/1` or, where it names no schema, written as the fleet's own format writes them. Raises as
    `read_fleet` does."""
    text = _text(data, source, REQUESTS)
    if not _is_json(text):
        raise unreadable(source, "it is no JSON", REQUESTS)
    try:
        document = parsed(text)
        schema = _schema(document)
        standing = _Standing(beside)
        if schema in _READERS:
            other = _READERS[schema](document, standing.ids)
            found = replace(beside, requests=other.requests, called=other.called)
        elif not schema and beside.requests_reader is not None:
            found = replace(beside, requests=beside.requests_reader(document))
        elif schema in ("", snapshot.REQUESTS_SCHEMA):
            requests = snapshot.read_requests(document, beside, standing.ids)
            found = replace(beside, requests=requests, called=snapshot.CALLED)
        else:
            raise unreadable(source, f"{shown(schema)} is no format of requests", REQUESTS)
        _refuse_unfit(found, standing, "requests.batch" if schema in _READERS else "batch")
    except FleetError as fault:
        raise invalid(source, fault) from fault
    return found


class _Standing:
    """What of a fleet's VMs requests for others are held against."""

    def __init__(self, file: FleetFile) -> None:
        self._hosts = file.fleet.hosts
        vms = [vm for host in self._hosts for vm in host.vms]
        self.names = {vm.name for vm in vms}
        self.ids = {vm.vm_id for vm in vms}
        # Some formats' groups are named nowhere but by their members.
        self.groups = {group.name: group for vm in vms for group in vm.groups} | dict(file.names.groups)

    def members(self) -> Iterator[Member]:
        """A fleet has put its hosts in an order of its own: VMs are told by their names, not by their places."""
        for host in self._hosts:
            for vm in host.vms:
                if vm.groups:
                    yield f"the fleet's hosts[{shown(host.name)}].vms[{shown(vm.name)}]", vm.groups


def _refuse_unfit(file: FleetFile, standing: _Standing, batch: str) -> None:
    """Raises FleetError for requests that the fleet can't be asked for: those of another fleet's file were only held
    against that one. In the order of the file, at `batch`."""
    fleet, groups = file.fleet, standing.groups
    for index, request in enumerate(file.requests):
        where = f"{batch}[{index}]"
        refuse_standing(request.name, standing.names, f"{where}.name")
        refuse_standing(request.vm_id, standing.ids, f"{where}.vm_id")
        refuse_unknown_scope(request.profile, fleet, f"{where}.profile")
        # A request has forgotten their order in its file.
        for unknown in sorted(request.excluded_hosts - fleet.index.keys())[:1]:
            raise FleetError(f"{where}.excluded_hosts", f"there is no host {shown(unknown)}")
        for group in request.groups:
            if groups.get(group.name, group) != group:
                raise FleetError(where, f"group {shown(group.name)} is defined otherwise in the fleet")
    new = [(f"{batch}[{index}]", request.groups) for index, request in enumerate(file.requests) if request.groups]
    # Of groups that hold nobody together, no two contradict each other.
    if any(group.hard and not group.apart for _, several in new for group in several):
        refuse_contradictions(chain(standing.members(), new))


def _text(data: bytes, source: str, kind: Kind) -> bytes:
    """What there is to read; raises PpecError `fleet.unreadable` for what can be seen to be no text."""
    for begin, (what, hint) in _NO_TEXT.items():
        if data.startswith(begin):
            raise unreadable(source, what, kind, hint)
    text = data.removeprefix(_BYTE_ORDER_MARK)
    if not text or text.isspace():
        raise unreadable(source, "it is empty", kind)
    return text


def _is_json(text: bytes) -> bool:
    return text[:_HEAD_BYTES].lstrip()[:1] in (b"{", b"[")


def _schema(document: object) -> str:
    """What the document itself names, not something inside it; "" for none."""
    return str(document.get("schema", "")) if isinstance(document, dict) else ""


def contents(path: Path, kind: Kind = FLEET) -> bytes:
    """Of a file that is not too large to be a fleet; raises PpecError `fleet.unreadable`."""
    try:
        # A device or a pipe has no size of its own; read, then, no more than is taken.
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise unreadable(str(path), error.strerror or type(error).__name__, kind) from error
    if len(data) > MOST_BYTES:
        raise unreadable(str(path), f"it is larger than {MOST_BYTES // 1024**2} MiB", kind)
    return data
