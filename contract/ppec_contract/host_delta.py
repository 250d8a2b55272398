# SPDX-License-Identifier: Apache-2.0
"""What of a host's report has changed: taken off two reports by the agent, put to the stored one by the orchestrator.

Both digests go along, so that a delta is put to the one report that it was taken off, and makes exactly the report that
the agent has. Whatever else is the case, the whole report is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar
from uuid import UUID

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ppec_contract.host import (
    Bridges,
    CellReport,
    Cells,
    Count,
    Drifts,
    Drives,
    FileSystems,
    HostReport,
    Nics,
    Pools,
    Vitals,
    Vms,
)
from ppec_contract.model import Model, Sha256
from ppec_contract.vm import VmInfo
from ppec_contract.words import MAX_VMS

_T = TypeVar("_T")
# What is carried whole when it changes: it seldom does, or is small.
_WHOLE = ("disk_mib", "disk_free_mib", "bridges", "drives", "file_systems", "nics", "pools")


class ReportChanges(Model):
    """What is new or different of a report's cells, VMs and drift, and what is gone; of the rest None is "as before".

    What a delta doesn't carry (versions, capabilities, a cell that goes) changes once in an agent's life at most.
    """

    cells: Cells = ()
    vms: Vms = ()
    vms_gone: Annotated[tuple[UUID, ...], Field(max_length=MAX_VMS)] = ()
    drift: Drifts = ()
    drift_gone: Drifts = ()
    disk_mib: Count | None = None
    disk_free_mib: Count | None = None
    bridges: Bridges | None = None
    drives: Drives | None = None
    file_systems: FileSystems | None = None
    nics: Nics | None = None
    pools: Pools | None = None

    @model_serializer(mode="wrap")
    def _of_what_changed(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the parts that are as before. What it has of an item is all of it: it is stored as it is spoken."""
        return {name: part for name, part in whole(self).items() if part or (name in _WHOLE and part is not None)}

    def put_to(self, report: HostReport) -> HostReport:
        """Raises ValueError if that makes no report: there is a bound to each list of it."""
        gone, over = set(self.vms_gone), set(self.drift_gone)
        parts: dict[str, Any] = {name: getattr(report, name) for name in HostReport.model_fields}
        parts |= {name: value for name in _WHOLE if (value := getattr(self, name)) is not None}
        parts["cells"] = _with(report.cells, self.cells, _cell)
        parts["vms"] = _with((vm for vm in report.vms if vm.vm_id not in gone), self.vms, _vm_id)
        drift = (*(one for one in report.drift if one not in over), *self.drift)
        parts["drift"] = tuple(sorted(drift, key=lambda one: one.order()))
        return HostReport.model_validate(parts)


class ReportDelta(Model):
    """`PATCH /v1/hosts/{host}/report`: what became of the report with the digest `before`; `after` is the new one's.

    The other fields are those of `ReportEnvelope`. One without changes says that the picture is true at a later moment.
    """

    agent_started_at_unix_ms: Count
    sequence: Count
    before: Sha256
    after: Sha256
    changes: ReportChanges
    snapshot_tick: Annotated[int, Field(strict=True, ge=0, le=2**53)] | None = None
    vitals: Vitals | None = None


def changes_between(before: HostReport, after: HostReport) -> ReportChanges | None:
    """None if something changed that a delta doesn't carry: the whole report has to be sent."""
    known_cells, known_vms = set(before.cells), {vm.vm_id: vm for vm in before.vms}
    drift_before, drift_after = set(before.drift), set(after.drift)
    changes = ReportChanges(
        cells=tuple(cell for cell in after.cells if cell not in known_cells),
        vms=tuple(vm for vm in after.vms if known_vms.get(vm.vm_id) != vm),
        vms_gone=tuple(sorted(known_vms.keys() - {vm.vm_id for vm in after.vms})),
        drift=tuple(one for one in after.drift if one not in drift_before),
        drift_gone=tuple(one for one in before.drift if one not in drift_after),
        **{name: getattr(after, name) for name in _WHOLE if getattr(before, name) != getattr(after, name)},
    )
    return changes if changes.put_to(before) == after else None


def _with(before: Iterable[_T], new: Iterable[_T], key: Callable[[_T], Any]) -> tuple[_T, ...]:
    """Ordered by their key, the new in the place of the known ones."""
    found = {key(one): one for one in before} | {key(one): one for one in new}
    return tuple(found[each] for each in sorted(found))


def _cell(cell: CellReport) -> int:
    return cell.cell


def _vm_id(vm: VmInfo) -> UUID:
    return vm.vm_id
