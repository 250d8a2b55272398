# SPDX-License-Identifier: Apache-2.0
"""Who changed what: one line of the log per change made, refused or broken off, under the event `audit`. No secret, no
user data; nothing of a body but the name of what it is about, which of the offered actions was asked, and of a prefix
what was given."""

from __future__ import annotations

from typing import Literal

import structlog

_log = structlog.get_logger(__name__)
_LONGEST = 256
Outcome = Literal["done", "refused", "failed"]


def audit(caller: str, action: str, subject: str, outcome: Outcome, **more: str) -> None:
    """`action` is the operation id of the API's document, or the command's name; `subject` what it was about.

    `failed` is what broke off by a fault of ours: it may have been done all the same. Every value is cut to 256
    characters.
    """
    told = {"caller": caller, "action": action, "subject": subject, "outcome": outcome, **more}
    _log.info("audit", **{name: value[:_LONGEST] for name, value in told.items()})
