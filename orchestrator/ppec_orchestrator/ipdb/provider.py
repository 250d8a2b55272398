# SPDX-License-Identifier: Apache-2.0
"""Where addresses come from: the built-in store, which has a row for each, or a source outside that is asked for them.

An address of an outside source is acquired before the transaction that grants it, and given back after its quarantine;
in between it has a row like any other. So a VM and its addresses commit together whoever keeps the books. No I/O here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_orchestrator.ipdb.ranges import Address, AddressRange, Network


class AddressProvider(Protocol):
    """Called outside of transactions, around the one that grants: on the way to it, and when it was refused. `wanted`
    says of each network how often the VMs of a request ask for it."""

    def under_way(self, wanted: Mapping[NetworkWanted, int]) -> AbstractContextManager[None]:
        """Meanwhile a request is seen to: what is supplied for it is not taken away again."""

    def prepare(self, networks: Sequence[NetworkWanted], vrf: str | None) -> None:
        """Sees to it that the addresses asked for by number can be granted, in a VRF at least. Raises
        `address.in_use`."""

    def supply(self, wanted: Mapping[NetworkWanted, int], vrf: str | None, *, scarce: Collection[str] = ()) -> bool:
        """Wants addresses of which there were too few; says whether it is worth another try: some more came in, or a
        prefix has enough by now, for others may have seen to it meanwhile. Those of the prefixes in `scarce` are wanted
        most, and if there are any, only they count as having enough. Raises nothing for what it is not given."""


class BuiltIn:
    """All there are have rows already."""

    def under_way(self, wanted: Mapping[NetworkWanted, int]) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, networks: Sequence[NetworkWanted], vrf: str | None) -> None: ...

    def supply(self, wanted: Mapping[NetworkWanted, int], vrf: str | None, *, scarce: Collection[str] = ()) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class SourcePrefix:
    """A prefix of ours (`prefix_id`) as the source knows it, and what of it may be given out; None: all of it."""

    prefix_id: int
    source_id: int
    network: Network
    usable: AddressRange | None = None

    @property
    def is_part(self) -> bool:
        """Whether `first` and `last` leave out addresses that the source would give."""
        if self.usable is None:
            return False
        pair = self.network.prefixlen >= self.network.max_prefixlen - 1
        never = 0 if pair else 2 if self.network.version == 4 else 1
        return self.network.num_addresses - (int(self.usable.last) - int(self.usable.first) + 1) > never

    def gives_out(self, address: Address) -> bool:
        return self.usable is None or address in self.usable

    def overlaps(self, other: SourcePrefix) -> bool:
        mine, theirs = self.network, other.network
        return mine.version == theirs.version and mine.overlaps(theirs)


@dataclass(frozen=True, slots=True)
class Acquired:
    """An address that the source has marked as ours, by the source's own number."""

    source_id: int
    address: Address


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the source left as it was of several addresses, by its own numbers: those that bear our mark no more, and
    those that it refused to change, each with why. The others are changed."""

    not_ours: frozenset[int]
    refused: Mapping[int, PpecError]


class PrefixGoneError(PpecError):
    """The source has no such prefix any more: `netbox.refused`, and no use to ask again."""

    def __init__(self, prefix: SourcePrefix) -> None:
        super().__init__(
            "netbox.refused",
            f"NetBox refused: it has no prefix {prefix.source_id} ({prefix.network}) any more",
            hint="Delete the prefix here, and register the one that replaces it.",
            subject="netbox",
        )


class AddressSource(Protocol):
    """Somebody else's books. Every address that is ours bears our mark there from the moment it is acquired, so that
    none is lost whoever dies when. Raises `netbox.unavailable` and `netbox.refused`, of a prefix that it has no more
    `PrefixGoneError`."""

    def check(self, prefix: SourcePrefix, gateway: Address | None, others: Sequence[SourcePrefix]) -> None:
        """Whether the prefix is there, is the same network, and would neither give away the gateway nor addresses of
        `others`, registered or about to be, which overlap it and may be in another VRF there: `prefix.invalid`."""

    def acquire(self, prefix: SourcePrefix, count: int) -> list[Acquired]:
        """The next free ones that the prefix gives out; fewer, or none, when there are no more."""

    def acquire_fixed(self, prefix: SourcePrefix, address: Address) -> Acquired:
        """Just this one, or `address.in_use`."""

    def owned(self, prefix: SourcePrefix) -> list[Acquired]:
        """Everything of the prefix that bears our mark."""

    def still_ours(self, source_ids: Collection[int]) -> set[int]:
        """Those of them that are there and bear our mark."""

    def tell(self, holders: Sequence[tuple[int, str | None]]) -> Outcome:
        """Who has which, for people to read: the source's number and the VM's name; None: nobody."""

    def give_back(self, source_ids: Sequence[int]) -> Outcome:
        """They are free again over there, whether or not it still has their prefix. What is gone already is gone."""
