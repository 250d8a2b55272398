# SPDX-License-Identifier: Apache-2.0
"""What hosts say of a failure is cut to size before it reaches the record."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from ppec_contract.api_operations import OperationState
from ppec_contract.api_vms import BatchMode
from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.operations.bounds import MAX_DETAILS_BYTES, MAX_TEXT, MAX_WORD, bounded

LONG = "x" * 1_000_000


def test_problem_of_usual_size_stays_as_it_is() -> None:
    usual = PpecError(
        "disk.full", "é" * MAX_TEXT, hint="Free some.", subject="s" * MAX_WORD, details={"free_mib": 1, "why": ["a"]}
    ).problem()
    assert bounded(usual) == usual


def test_every_text_is_cut() -> None:
    vast = PpecError("disk.full", LONG, hint=LONG, subject=LONG, details={"log": LONG}).problem()
    cut = bounded(vast.model_copy(update={"type": LONG, "title": LONG, "code": LONG}))
    assert [len(text) for text in (cut.detail, cut.hint)] == [MAX_TEXT] * 2
    assert [len(text) for text in (cut.type, cut.title, cut.code, cut.subject)] == [MAX_WORD] * 4
    assert cut.details == {"dropped": True}
    assert len(cut.model_dump_json()) < 2 * (2 * MAX_TEXT + 4 * MAX_WORD + MAX_DETAILS_BYTES)


@pytest.mark.parametrize("whole_host", [False, True])
@pytest.mark.parametrize("mode", list(BatchMode))
def test_record_holds_no_more_than_that(world: Any, whole_host: bool, mode: BatchMode) -> None:
    """Neither the VMs' outcomes nor the step and the operation that quote them; a NUL breaks nothing."""
    vast = PpecError("hypervisor.failed", f"a\x00{LONG}", hint=LONG, details={"log": LONG}).problem()

    def faults(action: str, host: str, vm: UUID) -> Fault | None:
        return Fault(vast, whole_host=whole_host) if action == "CreateVms" else None

    world.settings(attempts=1, poll_s=0.02)
    world.fleet.faults = faults
    view = world.ended(world.replica().create(world.batch(3, mode=mode), world.ask).operation_id)
    assert view.state is OperationState.FAILED
    assert all(item.problem and item.problem.detail.startswith("a\ufffdx") for item in view.items)
    assert len(view.model_dump_json()) < 50_000
    world.assert_empty()
