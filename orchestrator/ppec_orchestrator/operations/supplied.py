# SPDX-License-Identifier: Apache-2.0
"""Around the acceptance of a request: its addresses may have to be acquired first, for some are asked for by number and
others ran out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.provider import AddressProvider
from ppec_orchestrator.operations.address_refusals import lacks_addresses
from ppec_orchestrator.operations.addresses_meant import may_do_without
from ppec_orchestrator.store.fixed_addresses import of_one_vm, refuses_an_address
from ppec_orchestrator.store.ipdb import ANY_NETWORK

T = TypeVar("T")
# How often a request has addresses acquired.
_MOST_SUPPLIED = 3


@dataclass(frozen=True, slots=True)
class AddressesAsked:
    """`wanted` says of each network how often VMs ask for it, `fixed` which VMs, by name, ask for addresses by number.
    The one VM of a request may have none yet: ""."""

    vrf: str | None
    wanted: Mapping[NetworkWanted, int]
    fixed: Mapping[str, Sequence[NetworkWanted]]

    @classmethod
    def of(cls, asked: VmsCreate) -> AddressesAsked:
        common = asked.networks or ANY_NETWORK
        if asked.items:
            return cls.of_vms(asked.vrf, {item.name: item.networks or common for item in asked.items})
        wanted = {one: count * asked.total for one, count in Counter(common).items()}
        return cls(asked.vrf, wanted, {"": common} if _is_fixed(common) else {})

    @classmethod
    def of_vms(cls, vrf: str | None, networks: Mapping[str, Sequence[NetworkWanted]]) -> AddressesAsked:
        """By the VMs' names."""
        wanted = Counter(one for mine in networks.values() for one in mine)
        return cls(vrf, wanted, {name: mine for name, mine in networks.items() if _is_fixed(mine)})


def supplied(
    provider: AddressProvider,
    asked: VmsCreate,
    addresses: AddressesAsked,
    accept: Callable[[Mapping[str, PpecError]], T],
    *,
    whole: bool,
) -> T:
    """What `accept` makes of it, which is told of VMs, by name, why addresses that they ask for can't be had. Of a
    `whole`, and of a request that can do without none of its VMs, that is raised. What was acquired, another request
    may have been given by then."""
    with provider.under_way(addresses.wanted):
        refused = _prepared(provider, asked, addresses, whole=whole)
        for _ in range(_MOST_SUPPLIED):
            try:
                return accept(refused)
            except PpecError as error:
                if not lacks_addresses(error):
                    raise
                # Others are told besides, which have enough.
                told = error.details.get("prefixes", ())
                scarce = [one["prefix"] for one in told if one["free"] < sum(addresses.wanted.values())]
                if not provider.supply(addresses.wanted, addresses.vrf, scarce=scarce):
                    raise
        return accept(refused)


def _prepared(
    provider: AddressProvider, asked: VmsCreate, addresses: AddressesAsked, *, whole: bool
) -> dict[str, PpecError]:
    refused: dict[str, PpecError] = {}
    for name, networks in addresses.fixed.items():
        try:
            provider.prepare(networks, addresses.vrf)
        except PpecError as error:
            if not refuses_an_address(error) or asked.total == 1:
                raise
            if whole or not may_do_without(asked):
                raise of_one_vm(error, name) from error
            refused[name] = error
    return refused


def _is_fixed(networks: Sequence[NetworkWanted]) -> bool:
    return any(one.address is not None for one in networks)
