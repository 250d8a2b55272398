# SPDX-License-Identifier: Apache-2.0
"""A delta makes exactly the report that it was taken for, by way of JSON, or there is none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given

from ppec_contract.host import HostReport, ReportEnvelope
from ppec_contract.host_delta import ReportChanges, ReportDelta, changes_between
from ppec_contract.vm import VmState
from ppec_contract.words import MAX_VMS

from .host_reports import drifts, report, reports, vm


def by_wire(changes: ReportChanges) -> ReportChanges:
    return ReportChanges.model_validate_json(changes.model_dump_json())


@given(reports(), reports())
def test_what_changed_makes_the_new_report_of_the_old(before: HostReport, after: HostReport) -> None:
    changes = changes_between(before, after)
    assert changes is not None
    made = by_wire(changes).put_to(before)
    assert made.model_dump_json() == after.model_dump_json()
    assert made.digest() == after.digest()


@given(reports())
def test_of_the_same_report_nothing_is_carried(one: HostReport) -> None:
    changes = changes_between(one, one)
    assert changes is not None
    assert changes.model_dump_json() == "{}"


def test_only_what_changed_is_carried() -> None:
    before = report(vms=tuple(vm(number) for number in range(20)))
    after = before.model_copy(
        update={
            "vms": (before.vms[0].model_copy(update={"state": VmState.STOPPED}), *before.vms[2:]),
            "cells": (before.cells[0].model_copy(update={"cores_free": 1}), *before.cells[1:]),
            "drift": (drifts[0],),
            "bridges": (),
        }
    )
    changes = changes_between(before, after)
    assert changes is not None
    carried = changes.model_dump(mode="json")
    assert carried.keys() == {"vms", "vms_gone", "cells", "drift", "bridges"}
    assert [one["vm_id"] for one in carried["vms"]] == [str(before.vms[0].vm_id)]
    assert carried["vms_gone"] == [str(before.vms[1].vm_id)]
    assert [one["cell"] for one in carried["cells"]] == [0]
    assert carried["bridges"] == []


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another"},
        {"kernel_version": "6.2"},
        {"capabilities": ("more",)},
        {"cells": ()},
        {"cpu": None},
        # Not as an agent orders them: only the whole report can say it.
        {"vms": (vm(2), vm(1))},
        {"vms": (vm(1), vm(1))},
    ],
    ids=str,
)
def test_what_a_delta_does_not_carry_takes_the_whole_report(change: dict[str, Any]) -> None:
    assert changes_between(report(), report().model_copy(update=change)) is None


def test_what_a_change_of_one_vm_of_twenty_costs() -> None:
    """The figures in the agent's README: of VMs with eight vCPUs, on a host with eight drives and four NICs."""
    before = report(vms=tuple(vm(number) for number in range(20)), drives=report().drives * 8, nics=report().nics * 4)
    stopped = before.vms[0].model_copy(update={"state": VmState.STOPPED})
    after = before.model_copy(update={"vms": (stopped, *before.vms[1:])})
    changes = changes_between(before, after)
    assert changes is not None
    known = {"agent_started_at_unix_ms": 1_800_000_000_000, "sequence": 4242, "snapshot_tick": 9999}
    delta = ReportDelta(before=before.digest(), after=after.digest(), changes=changes, **known)
    whole = ReportEnvelope(report=after, **known)
    assert (len(delta.model_dump_json()), len(whole.model_dump_json())) == (913, 15410)


def test_deltas_make_no_report_that_is_too_long() -> None:
    full = report(vms=tuple(vm(number) for number in range(MAX_VMS)))
    with pytest.raises(ValueError, match="vms"):
        ReportChanges(vms=(vm(MAX_VMS),)).put_to(full)
