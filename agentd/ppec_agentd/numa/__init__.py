# SPDX-License-Identifier: Apache-2.0
"""Which host CPUs and cells a VM gets. Pure."""

from ppec_agentd.numa.pins import CpuPool, plan_largest_first, plan_pins
from ppec_agentd.numa.plan import GuestCell, NumaPlan, PinRequest

__all__ = ["CpuPool", "GuestCell", "NumaPlan", "PinRequest", "plan_largest_first", "plan_pins"]
