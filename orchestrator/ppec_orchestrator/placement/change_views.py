# SPDX-License-Identifier: Apache-2.0
"""Changes as people and programs are told of them: by the API, and by plans on files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ppec_contract.api_placement import ChangeView
from ppec_orchestrator.placement.changes import (
    AddAddresses,
    BringBack,
    Change,
    EndDrain,
    FreeRoom,
    GiveUp,
    OtherSize,
    Retune,
    Several,
    UpgradeAgent,
)

# Offered of one VM.
MOST_CHANGES = 5
_KINDS = {
    GiveUp: "give-up",
    EndDrain: "end-drain",
    UpgradeAgent: "upgrade-agent",
    BringBack: "bring-back",
    Retune: "retune",
    AddAddresses: "add-addresses",
    OtherSize: "other-size",
    FreeRoom: "free-room",
    Several: "several",
}
# What all requests call rules about a size's CPUs and memory.
OF_SIZES = {
    "siblings": "numa.smt",
    "isolation": "numa.smt",
    "huge-pages": "numa.huge_page_kib",
    "shared": "numa.cpus",
    "dedicated": "numa.cpus",
}


def views(cheapest_first: Sequence[Change], called: Mapping[str, str]) -> tuple[ChangeView, ...]:
    """The cheapest of them. `called` has what requests call the rules and resources that the planner has other words
    for."""
    return tuple(_view(change, called) for change in cheapest_first[:MOST_CHANGES])


def _view(change: Change, called: Mapping[str, str]) -> ChangeView:
    if isinstance(change, Several):
        details: dict[str, Any] = {"changes": [_view(each, called).model_dump(mode="json") for each in change.changes]}
        return ChangeView(kind="several", sentence=change.sentence(), details=details)
    details = _plain(asdict(change), called)
    if isinstance(change, GiveUp):
        details["rules"] = [called.get(rule, OF_SIZES.get(rule, rule)) for rule in change.rules]
    return ChangeView(kind=_KINDS[type(change)], sentence=change.sentence(), details=details)


def _plain(value: Any, called: Mapping[str, str]) -> Any:
    """As JSON has it: names of fields are strings, and so are numbers of cells; resources as requests call them."""
    if isinstance(value, dict):
        return {called.get(str(key), str(key)): _plain(each, called) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, called) for each in value]
    return value
