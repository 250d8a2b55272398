# SPDX-License-Identifier: Apache-2.0
"""The kinds of operation, by name. To add one: a module with its step table, and its line here."""

from __future__ import annotations

from ppec_orchestrator.operations.kinds import cleanup, create, delete, power, resize, retune
from ppec_orchestrator.operations.steps import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (create.KIND, delete.KIND, *power.KINDS.values(), resize.KIND, retune.KIND, cleanup.KIND)
}
