# SPDX-License-Identifier: Apache-2.0
"""Which host CPUs and cells a VM gets. Pure."""

from ppec_agentd.numa.growth import replan
from ppec_agentd.numa.pins import plan_largest_first, plan_pins
from ppec_agentd.numa.plan import GuestCell, NumaPlan, PinRequest
from ppec_agentd.numa.pool import CpuPool

__all__ = ["CpuPool", "GuestCell", "NumaPlan", "PinRequest", "plan_largest_first", "plan_pins", "replan"]
