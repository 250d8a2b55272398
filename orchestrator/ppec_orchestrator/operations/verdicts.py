# SPDX-License-Identifier: Apache-2.0
"""How an operation has ended, told from its VMs. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.operations.steps import Verdict
from ppec_orchestrator.store.operations import Item


def by_items(items: Sequence[Item]) -> Verdict:
    bad = [item for item in items if item.state is not ItemState.SUCCEEDED]
    if not bad:
        return Verdict(OperationState.SUCCEEDED)
    if len(bad) < len(items):
        return Verdict(OperationState.PARTIAL)
    return Verdict(OperationState.FAILED, reason(bad))


def reason(failed: Sequence[Item]) -> Problem:
    """One problem for several VMs: the first one's, which says how many there were."""
    first = next((item for item in failed if item.problem is not None), failed[0])
    problem = first.problem or PpecError("internal.error", f"vm {first.name} ended without a reason").problem()
    if len(failed) == 1:
        return problem
    details = {**problem.details, "failed": len(failed), "names": [item.name for item in failed[:20]]}
    detail = f"{len(failed)} VMs failed; {first.name}: {problem.detail}"
    return problem.model_copy(update={"detail": detail, "details": details})
