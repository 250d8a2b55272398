# SPDX-License-Identifier: Apache-2.0
"""What the networks of a request's VMs mean: those of the request, and those that an item has of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.api_vms import BatchMode, VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import Address
from ppec_orchestrator.operations.places_meant import place_of
from ppec_orchestrator.store.fixed_addresses import of_one_vm, refuses_an_address
from ppec_orchestrator.store.wanted_networks import Requester, candidates, counted_free, known

# Of each of some networks: see `wanted_networks.candidates`.
Givers = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class AddressesMeant:
    """`givers` are those of the request's networks, `own` those of VMs, by name, that have networks of their own.
    `counted` are the addresses asked for by number that `wanted_networks.counted_free` says. `refused` says of VMs, by
    name, why they can't have an address that they ask for; no prefix gives them any."""

    givers: Givers
    own: Mapping[str, Givers]
    counted: frozenset[Address]
    refused: Mapping[str, PpecError]


@dataclass(frozen=True, slots=True)
class _Wish:
    """Networks of the one VM of that name; None: of several, or of one that is still to be given a name."""

    networks: Sequence[NetworkWanted]
    name: str | None
    requester: Requester


def addresses_meant(
    conn: Connection, asked: VmsCreate, architecture: str, now: datetime, refused: Mapping[str, PpecError]
) -> AddressesMeant:
    """Raises what `wanted_networks.candidates` raises; of a request that can do without some of its VMs, only what is
    wrong with it as such. `refused` are VMs that can't be given an address, as is known already."""
    wishes = list(_wishes(asked, architecture, now))
    every = [one for wish in wishes for one in wish.networks]
    looked_up = known(conn, asked.vrf, every, now) if len(wishes) > 1 else None
    found: list[Givers] = []
    counted: frozenset[Address] = frozenset()
    without: dict[str, PpecError] = {}
    for wish in wishes:
        try:
            if (known_already := refused.get(wish.name or "")) is not None:
                raise known_already
            givers = candidates(conn, wish.networks, wish.requester, looked_up)
            counted |= counted_free(conn, wish.networks, givers, looked_up)
        except PpecError as error:
            unaddressed = refuses_an_address(error)
            if wish.name is None or asked.total == 1 or not (unaddressed or error.code == "prefix.not_found"):
                raise
            told = of_one_vm(error, wish.name)
            if not unaddressed or not may_do_without(asked):
                raise told from error
            without[wish.name] = told
            givers = ((),) * len(wish.networks)
        found.append(givers)
    own = zip((wish.name or "" for wish in wishes[1:]), found[1:], strict=True)
    return AddressesMeant(found[0], dict(own), counted, without)


def may_do_without(asked: VmsCreate) -> bool:
    """Whether one of its VMs may be refused and the others made."""
    return asked.total > 1 and asked.mode is not BatchMode.ALL_OR_NOTHING


def _wishes(asked: VmsCreate, architecture: str, now: datetime) -> Iterator[_Wish]:
    """The request's first, then those of items that have networks of their own."""
    users = [item for item in asked.items if not item.networks]
    only = users[0] if len(users) == 1 else None
    name = only.name if only else None
    if not asked.items and asked.total == 1:
        name = asked.names[0] if asked.names else asked.name
    yield _Wish(asked.networks, name, Requester(place_of(asked, architecture, only), name, now))
    for item in asked.items:
        if item.networks:
            where = place_of(asked, architecture, item)
            yield _Wish(item.networks, item.name, Requester(where, item.name, now))
