# SPDX-License-Identifier: Apache-2.0
"""How an operation ended: the table of its VMs, what went wrong, and the exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import UUID

from ppec_contract.api_operations import ItemState, OperationItem, OperationState, OperationView
from ppec_contract.api_vms import VmView
from ppec_contract.errors import PpecError, Problem, exit_code
from ppec_orchestrator.cli.output import Column, table

if TYPE_CHECKING:
    from ppec_orchestrator.cli.client import Client
    from ppec_orchestrator.cli.session import Session

# Up to here VMs are asked for one by one; for more, reading the list is less work for everybody.
_ONE_BY_ONE = 32
_WHEN = {"unchanged": "unchanged", "now": "changed", "next_start": "changed at the next start"}


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "-"


def exit_code_of(view: OperationView) -> int:
    """0 when all went well, else the code of the first VM's problem, else of the operation's own."""
    if view.state is OperationState.SUCCEEDED:
        return 0
    problem = first_problem(view)
    if problem:
        return exit_code(problem.code)
    return exit_code("operation.cancelled" if view.state is OperationState.CANCELLED else "internal.error")


def first_problem(view: OperationView) -> Problem | None:
    return next((item.problem for item in view.items if item.problem), None) or view.problem


def show(session: Session, view: OperationView) -> None:
    """JSON: the operation. Otherwise a table of its VMs, and each distinct problem once."""
    output = session.output
    if output.as_json:
        output.json(view)
        return
    if view.items:
        output.results.print(table(view.items, _columns(_vms(session.client, view.items))))
    done = sum(item.state is ItemState.SUCCEEDED for item in view.items)
    took = f" in {(view.ended_at - view.created_at).total_seconds():.1f} s" if view.ended_at else ""
    output.say(f"operation {view.operation_id}: {view.state}, {done} of {len(view.items)} VMs{took}")
    for item in view.items:
        if item.resized is not None:
            output.say(f"{item.name}: vCPUs {_WHEN[item.resized.vcpus]}, memory {_WHEN[item.resized.memory_mib]}")
    problems = [item.problem for item in view.items if item.problem] + ([view.problem] if view.problem else [])
    for problem in {(problem.code, problem.detail): problem for problem in problems}.values():
        output.error(problem.error())


def _vms(client: Client, items: Sequence[OperationItem]) -> dict[UUID, VmView]:
    """The VMs that are there to be shown; one deleted meanwhile, or never made, is simply not among them."""
    wanted = {item.vm_id for item in items if item.state is ItemState.SUCCEEDED}
    found: dict[UUID, VmView] = {}
    if len(wanted) > _ONE_BY_ONE:
        return {vm.vm_id: vm for vm in client.items("/v1/vms", VmView) if vm.vm_id in wanted}
    for vm_id in wanted:
        try:
            found[vm_id] = client.get(f"/v1/vms/{quote(str(vm_id))}", VmView)
        except PpecError as error:
            if error.code != "vm.not_found":
                raise
    return found


def _columns(vms: dict[UUID, VmView]) -> list[Column[OperationItem]]:
    from ppec_orchestrator.cli.operations import stages

    def of_vm(header: str, cell: object) -> Column[OperationItem]:
        def shown(item: OperationItem) -> object:
            vm = vms.get(item.vm_id)
            return cell(vm) if vm is not None and callable(cell) else "-"

        return Column(header, shown)

    return [
        Column("VM", lambda item: item.name),
        Column("state", lambda item: item.state),
        Column("host", lambda item: item.host or "-"),
        of_vm("cells", lambda vm: ranges(vm.cells)),
        of_vm("pins", lambda vm: ranges(pin.pcpu for pin in vm.pins)),
        of_vm("vrf", lambda vm: vm.vrf or "-"),
        of_vm("address", lambda vm: ", ".join(str(a.address) for a in vm.addresses) or "-"),
        Column("stages, ms", stages),
    ]
