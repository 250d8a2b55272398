# SPDX-License-Identifier: Apache-2.0
"""What a failed attempt means: may another host do better, and may the first one have something left? Pure rules."""

from __future__ import annotations

from ppec_contract.errors import ERROR_TABLE, ErrorClass, Problem

# A host that answers one of these has refused before it changed anything, or found what isn't ours.
_REFUSED_BEFORE_CHANGE = frozenset(
    {
        "host.no_capacity",
        "host.bridge_missing",
        "host.pool_missing",
        "vm.exists",
        "vm.odd_vcpus",
        "vm.exceeds_socket",
        "request.invalid",
        "image.fetch_failed",
        "image.checksum_mismatch",
        "image.invalid",
        "retune.not_possible",
        "retune.outdated",
        "retune.failed",
        "operation.fenced",
        "agent.busy",
        "agent.recovering",
    }
)

# What a host says of one VM: others may be well there.
_OF_ONE_VM = frozenset({"host.no_capacity", "host.pool_missing"})
_HOST_SUBJECTS = frozenset({"host", "agent", "auth", "hypervisor"})


def may_move(problem: Problem) -> bool:
    """Whether another host may do better. Not when the request itself is wrong, or the operation is over."""
    row = ERROR_TABLE.get(problem.code)
    if row is None:
        return True
    return row.error_class is not ErrorClass.FIX_REQUEST and not problem.code.startswith("operation.")


def may_have_left_something(problem: Problem) -> bool:
    """Whether the host that gave this problem is to be cleaned. A lost reply, above all, proves nothing."""
    return problem.code not in _REFUSED_BEFORE_CHANGE


def whole_host(problem: Problem) -> bool:
    """Whether the host as such is out of order, so that no other VM should be moved to it now."""
    return problem.code.split(".")[0] in _HOST_SUBJECTS and problem.code not in _OF_ONE_VM
