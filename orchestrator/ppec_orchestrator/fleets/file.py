# SPDX-License-Identifier: Apache-2.0
"""What every source of a fleet ends as, and the bounds on all of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated
from uuid import UUID

from pydantic import Field, StringConstraints

from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.request import Group, Profile, VmRequest

# A plan of more VMs is several plans.
MOST_REQUESTS = 100_000
MOST_HOSTS = 100_000
MOST_VMS = 2_000_000
MOST_BYTES = 1024**3

# The planner packs CPUs and memory of a cell into one integer (`placement/packed.py`); these leave it room.
MOST_CPUS, MOST_AMOUNT = 8191, 2**38
Cpus = Annotated[int, Field(strict=True, ge=0, le=MOST_CPUS)]
Amount = Annotated[int, Field(strict=True, ge=0, le=MOST_AMOUNT)]
# What is free may be less than nothing: of a host that lost memory, or cores, under its VMs.
Left = Annotated[int, Field(strict=True, ge=-MOST_AMOUNT, le=MOST_AMOUNT)]
# Python takes a number, or a word, for true.
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=255)]
# Of a place that a fleet may do without.
Place = Annotated[str, StringConstraints(max_length=255)]


@dataclass(frozen=True, slots=True)
class Names:
    """What requests may name: profiles (a bench file's flavours), and groups."""

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FleetFile:
    """A fleet, and the VMs that its source asks for, in whose order they are planned.

    `requests_reader` reads more requests from parsed JSON, written as the fleet's own format writes them; without it
    they are `ppec-requests/1`. `called` has what the requests' format calls the rules that the planner has other words
    for.
    """

    fleet: Fleet
    requests: tuple[VmRequest, ...] = ()
    names: Names = field(default_factory=Names)
    requests_reader: Callable[[object], tuple[VmRequest, ...]] | None = None
    called: Mapping[str, str] = field(default_factory=dict)


def made_up_ids(start: int, taken: Container[UUID] = ()) -> Iterator[UUID]:
    """Ids for what has only a name in its file: the same at every reading, and none of those `taken`. `start` keeps two
    kinds apart."""
    made = (UUID(int=(start << 64) + number) for number in count(1))
    return (each for each in made if each not in taken)
