# SPDX-License-Identifier: Apache-2.0
"""What the host has given away, and whether it can give more. Pure and thread-safe; `admission` says how."""

from ppec_agentd.ledger.admission import Ledger
from ppec_agentd.ledger.audit import Finding, FindingKind, audit
from ppec_agentd.ledger.claims import Claim, Holding, Move, Totals
from ppec_agentd.ledger.drives import DriveState

__all__ = ["Claim", "DriveState", "Finding", "FindingKind", "Holding", "Ledger", "Move", "Totals", "audit"]
