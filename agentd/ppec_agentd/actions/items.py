# SPDX-License-Identifier: Apache-2.0
"""From a changing call to the VMs it is about, each with the action on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps
from ppec_agentd.actions.create import create
from ppec_agentd.actions.delete import delete
from ppec_agentd.actions.freeze import freeze, thaw
from ppec_agentd.actions.power import PAUSE, RESET, RESUME, reboot, switch
from ppec_agentd.actions.resize import resize
from ppec_agentd.actions.retune import flight_of, is_flight, retune_host
from ppec_agentd.actions.start import start
from ppec_agentd.actions.stop import stop
from ppec_agentd.journal import ACTIONS, Action
from ppec_contract.agent import (
    CreateVms,
    DeleteVms,
    FreezeVms,
    PauseVms,
    RebootVms,
    ResetVms,
    ResizeVms,
    ResumeVms,
    RetuneHost,
    StartVms,
    StopVms,
    ThawVms,
    VmSize,
    WriteCall,
)
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmSpec

Act = Callable[[HostContext, Any, UUID, Steps], Awaitable[Outcome]]

# What a call that names its VMs by id does to each. The calls' names are the actions'.
_ACTS: dict[type[WriteCall], Act] = {
    DeleteVms: lambda host, _call, vm_id, steps: delete(host, vm_id, steps),
    StartVms: lambda host, _call, vm_id, steps: start(host, vm_id, steps),
    StopVms: lambda host, call, vm_id, steps: stop(host, vm_id, steps, call.timeout_s, force=call.force),
    RebootVms: lambda host, call, vm_id, steps: reboot(host, vm_id, steps, call.timeout_s, force=call.force),
    ResetVms: lambda host, _call, vm_id, steps: switch(host, vm_id, steps, RESET),
    PauseVms: lambda host, _call, vm_id, steps: switch(host, vm_id, steps, PAUSE),
    FreezeVms: lambda host, call, vm_id, steps: freeze(host, vm_id, steps, call.thaw_after_s),
    ThawVms: lambda host, _call, vm_id, steps: thaw(host, vm_id, steps),
    ResumeVms: lambda host, _call, vm_id, steps: switch(host, vm_id, steps, RESUME),
}


@dataclass(frozen=True, slots=True)
class Item:
    """One VM's part of a call."""

    vm_id: UUID
    name: str
    act: Callable[[Steps], Awaitable[Outcome]]


def items_of(host: HostContext, request: WriteCall) -> tuple[Action, list[Item]]:
    """The call's action and its VMs, in order. Raises `request.invalid` if it names a VM twice, or none."""
    if isinstance(request, CreateVms):
        items = [_creation(host, vm, request.operation_id) for vm in request.vms]
    elif isinstance(request, ResizeVms):
        items = [_resizing(host, size, request.timeout_s) for size in request.sizes]
    elif isinstance(request, RetuneHost):
        _refuse_ids_of_flights(request)
        # One flight for all its VMs: the moves have an order.
        items = [Item(flight_of(request.plan), "", lambda steps: retune_host(host, request, steps))]
    else:
        items = [_by_id(host, vm_id, request) for vm_id in getattr(request, "vm_ids", ())]
    _refuse_twins(items)
    return _action(request), items


def _action(request: WriteCall) -> Action:
    name = type(request).__name__
    if name not in ACTIONS:
        raise TypeError(f"{name} is no changing call")
    return name


def _creation(host: HostContext, vm: VmSpec, operation_id: str) -> Item:
    return Item(vm.vm_id, vm.name, lambda steps: create(host, vm, operation_id, steps))


def _resizing(host: HostContext, size: VmSize, timeout_s: float) -> Item:
    held = host.ledger.holding(size.vm_id)
    return Item(size.vm_id, held.name if held else "", lambda steps: resize(host, size, timeout_s, steps))


def _by_id(host: HostContext, vm_id: UUID, request: WriteCall) -> Item:
    held, act = host.ledger.holding(vm_id), _ACTS[type(request)]
    return Item(vm_id, held.name if held else "", lambda steps: act(host, request, vm_id, steps))


def _refuse_ids_of_flights(request: RetuneHost) -> None:
    """A retune would wait for itself, or be taken for one of its VMs."""
    wrong = [move.vm_id for move in request.plan.moves if is_flight(move.vm_id)]
    if wrong:
        raise PpecError(
            "request.invalid",
            f"the plan moves vm {wrong[0]}: no VM has this id",
            hint="Plan the retune again, and send the plan as it is.",
            subject="request",
        )


def _refuse_twins(items: list[Item]) -> None:
    ids = [item.vm_id for item in items]
    names = [item.name for item in items if item.name]
    if len(set(ids)) != len(ids) or len(set(names)) != len(names):
        raise PpecError("request.invalid", "the call names a VM twice", hint="Name each VM once.", subject="request")
