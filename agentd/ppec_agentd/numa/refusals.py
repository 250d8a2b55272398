# SPDX-License-Identifier: Apache-2.0
"""What the planner says when it can't: each names the VM, the resource, what was wanted and what is free."""

from __future__ import annotations

from collections.abc import Iterable

from ppec_agentd.numa.plan import PinRequest
from ppec_agentd.numa.pool import CpuPool
from ppec_agentd.topology import format_cpu_list
from ppec_contract.errors import PpecError
from ppec_contract.vm import SmtPolicy

_CORES = {
    SmtPolicy.PREFER: "",
    SmtPolicy.ISOLATE: ", one to a core",
    SmtPolicy.REQUIRE: " on cores with SMT siblings",
}
_SHARED = ", each to find a shared CPU free of the VM's others"


def odd_vcpus(request: PinRequest) -> PpecError:
    return PpecError(
        "vm.odd_vcpus",
        f"{request.subject} asks for {request.vcpus} vCPUs; whole cores come in even numbers from 2",
        hint=f"Ask for {max(2, request.vcpus + 1)}.",
        subject=request.subject,
        details={"resource": "vcpus", "wanted": request.vcpus},
    )


def exceeds_socket(request: PinRequest, largest: int) -> PpecError:
    return PpecError(
        "vm.exceeds_socket",
        f"{request.subject} asks for {request.vcpus} vCPUs{_SHARED if request.shared else _CORES[request.smt]}; "
        f"this host's largest socket offers {largest}",
        hint="Choose a smaller flavor, a host with larger sockets, or a dedicated flavor that spans cells.",
        subject=request.subject,
        details={"resource": "vcpus", "wanted": request.vcpus, "largest_socket": largest},
    )


def too_large(pool: CpuPool, request: PinRequest, free: int) -> PpecError:
    """For now, or for good if no socket of this host is large enough."""
    largest = pool.largest_socket(request.smt)
    return exceeds_socket(request, largest) if request.vcpus > largest else too_few_cores(request, free)


def too_few_cores(request: PinRequest, free: int) -> PpecError:
    return PpecError(
        "host.no_capacity",
        f"{request.subject} asks for {request.vcpus} vCPUs{_CORES[request.smt]} on NUMA cells "
        f"{numbers(request.cells)}; {free} are free there",
        subject=request.subject,
        details={"resource": "vcpus", "wanted": request.vcpus, "free": free, "cells": list(request.cells)},
    )


def too_few_shared(request: PinRequest, free: int) -> PpecError:
    return PpecError(
        "host.no_capacity",
        f"{request.subject} asks for {request.vcpus} vCPUs on the shared CPUs of NUMA cells "
        f"{numbers(request.cells)}; {free} more are admitted there",
        subject=request.subject,
        details={"resource": "shared_vcpus", "wanted": request.vcpus, "free": free, "cells": list(request.cells)},
    )


def missing_cells(request: PinRequest, known: Iterable[int]) -> PpecError:
    found = sorted(known)
    return PpecError(
        "host.no_capacity",
        f"{request.subject} is planned for NUMA cells {numbers(request.cells)}; this host has {numbers(found)}",
        hint="The host's layout changed since the plan was made; plan again.",
        subject=request.subject,
        details={"resource": "cells", "wanted": list(request.cells), "found": found},
    )


def several_sockets(request: PinRequest, sockets: Iterable[int]) -> PpecError:
    found = sorted(sockets)
    return PpecError(
        "request.invalid",
        f"{request.subject} names NUMA cells {numbers(request.cells)} of sockets {numbers(found)}; "
        "a VM stays on one socket",
        hint="Name cells of one socket, or choose a flavor that spans cells.",
        subject=request.subject,
        details={"cells": list(request.cells), "sockets": found},
    )


def numbers(them: Iterable[int]) -> str:
    return format_cpu_list(them) or "none"
