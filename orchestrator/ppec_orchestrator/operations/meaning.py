# SPDX-License-Identifier: Apache-2.0
"""What the names in a request for VMs mean when it is accepted: sizes, image, places, and names for the VMs."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select

from ppec_contract.api_placement import VmItem, VmSize
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.ipdb.ranges import Address
from ppec_orchestrator.operations.addresses_meant import addresses_meant
from ppec_orchestrator.operations.places_meant import check_places
from ppec_orchestrator.operations.wanted import CreateInput, SizeMeant
from ppec_orchestrator.placement.request import PlanRequest
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.tables import flavor, image

AnyRow = Row[*tuple[Any, ...]]
_FLAVOR = select(flavor).where(flavor.c.name == bindparam("name"))
_IMAGE = select(image.c.id, image.c.sha256, image.c.architecture, image.c.virtual_size_mib).where(
    image.c.name == bindparam("name")
)


_NOBODY_REFUSED: Mapping[str, PpecError] = {}


@dataclass(frozen=True, slots=True)
class Meant:
    """What the names in a request mean right now. `counted`: see `wanted_networks.counted_free`; what a VM has been
    granted is not counted any more, so this is not part of the input. `refused` says of VMs, by name, why they can't
    have an address that they ask for: they find no place."""

    image_id: int
    image_sha256: str
    input: CreateInput
    counted: frozenset[Address] = frozenset()
    refused: Mapping[str, PpecError] = field(default_factory=dict)


def meaning(
    conn: Connection,
    asked: VmsCreate,
    now: datetime,
    catalogue: Catalogue | None = None,
    *,
    refused: Mapping[str, PpecError] = _NOBODY_REFUSED,
) -> Meant:
    """Raises `….not_found` of whatever the request names, `request.invalid` for disks smaller than the image and for
    an item in two places, and what `addresses_meant` raises, which is told of the `refused`. Several requests share a
    `catalogue` of the transaction."""
    catalogue = catalogue or Catalogue(conn)
    own = {item.name: _size_of(item, asked, catalogue) for item in asked.items if item.flavor or item.size or item.pool}
    common = _common_size(asked, catalogue) or next(iter(own.values()))
    source = catalogue.image(asked.image)
    check_places(conn, asked)
    _check_disks(asked, source.virtual_size_mib, [common, *own.values()])
    addresses = addresses_meant(conn, asked, source.architecture, now, refused)
    return Meant(
        source.id,
        source.sha256,
        CreateInput(
            **dict(common),
            request=asked.model_copy(update={"user_data": ""}),
            architecture=source.architecture,
            sizes={name: size for name, size in own.items() if size != common},
            prefixes=addresses.givers,
            own_prefixes=dict(addresses.own),
        ),
        addresses.counted,
        addresses.refused,
    )


def new_plan_request(meant: Meant, asked: VmsCreate) -> PlanRequest:
    """Of all its VMs, with ids made for them."""
    named = ((uuid.uuid4(), name, frozenset[str]()) for name in _names(asked))
    return meant.input.plan_request(meant.input.vm_requests(named, meant.counted))


def _common_size(asked: VmsCreate, catalogue: Catalogue) -> SizeMeant | None:
    """Of VMs that say no other; None where each has its own."""
    if not asked.flavor and not asked.size:
        return None
    return catalogue.size(asked.flavor, asked.size).model_copy(update={"pool": asked.pool})


def _size_of(item: VmItem, asked: VmsCreate, catalogue: Catalogue) -> SizeMeant:
    """What the item leaves out is the request's."""
    said = item if item.flavor or item.size else asked
    return catalogue.size(said.flavor, said.size).model_copy(update={"pool": item.pool or asked.pool})


class Catalogue:
    """Flavors and images as one transaction sees them; each is looked up once."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._flavors: dict[str, SizeMeant] = {}
        self._images: dict[str, AnyRow] = {}

    def size(self, name: str | None, size: VmSize | None) -> SizeMeant:
        """Of a VM that has a flavor or a size of its own. Raises `flavor.not_found`."""
        if size is not None:
            return SizeMeant(**dict(size))
        if name is None:
            raise ValueError("a VM has a flavor or a size: the contract sees to it")
        if name not in self._flavors:
            self._flavors[name] = self._flavor(name)
        return self._flavors[name]

    def image(self, name: str) -> AnyRow:
        """Raises `image.not_found`."""
        if name not in self._images:
            row = self._conn.execute(_IMAGE, {"name": name}).first()
            if row is None:
                raise not_found("image", "image", name)
            self._images[name] = row
        return self._images[name]

    def _flavor(self, name: str) -> SizeMeant:
        row = self._conn.execute(_FLAVOR, {"name": name}).first()
        if row is None:
            raise not_found("flavor", "flavor", name)
        return SizeMeant(
            vcpus=row.vcpus,
            memory_mib=row.memory_mib,
            disk_mib=row.disk_mib,
            nvme_drives=row.nvme_drives,
            max_vcpus=row.max_vcpus,
            max_memory_mib=row.max_memory_mib,
            numa=NumaPolicy(**row.numa),
            flavor=name,
        )


def _check_disks(asked: VmsCreate, needed_mib: int, sizes: Iterable[SizeMeant]) -> None:
    for size in sizes:
        if needed_mib > size.disk_mib:
            what = f"flavor {size.flavor}" if size.flavor else "the size"
            raise PpecError(
                "request.invalid",
                f"image {asked.image} needs a disk of {needed_mib} MiB, {what} has {size.disk_mib} MiB",
                hint="Choose a flavor with a larger disk." if size.flavor else "Ask for a larger disk.",
                subject=what,
            )


def _names(asked: VmsCreate) -> list[str]:
    if asked.items:
        return [item.name for item in asked.items]
    if asked.names:
        return list(asked.names)
    base = asked.name or f"vm-{uuid.uuid4().hex[:8]}"
    return [base] if asked.count == 1 else [f"{base}-{number}" for number in range(1, asked.count + 1)]
