# SPDX-License-Identifier: Apache-2.0
"""Who changed what: one line of the log per change made or refused, under the event `audit`. Names only: no secret,
no user data, nothing of a body but the name of what it is about."""

from __future__ import annotations

from typing import Literal

import structlog

_log = structlog.get_logger(__name__)
_LONGEST = 256


def audit(caller: str, action: str, subject: str, outcome: Literal["done", "refused"], **more: str) -> None:
    """`action` is the operation id of the API's document, or the command's name; `subject` what it was about."""
    _log.info("audit", caller=caller, action=action, subject=subject[:_LONGEST], outcome=outcome, **more)
