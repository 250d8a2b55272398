# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one exception of the collection's clients: a row of the contract's error table and what it was about."""

from __future__ import annotations

from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import ERRORS, RETRY_CLASSES


class ProblemError(Exception):
    """A failed call. `code` is stable, `detail` says what failed on which subject, `hint` what to do about it."""

    def __init__(self, code, detail, hint="", subject="", details=None):
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.hint = hint
        self.subject = subject
        self.details = details or {}

    def __str__(self):
        return f"{self.code}: {self.detail}" + (f" {self.hint}" if self.hint else "")

    @classmethod
    def from_body(cls, body):
        """From problem+json, or None when `body` is something else."""
        if not isinstance(body, dict) or not isinstance(body.get("code"), str):
            return None
        details = body.get("details")
        return cls(
            body["code"],
            str(body.get("detail", "")),
            hint=str(body.get("hint", "")),
            subject=str(body.get("subject", "")),
            details=details if isinstance(details, dict) else {},
        )

    @property
    def title(self):
        """The table's own words for the code; they never hold text of a tenant or a peer."""
        return ERRORS[self.code][1] if self.code in ERRORS else "An error this version does not know"

    @property
    def retryable(self):
        return self.code in ERRORS and ERRORS[self.code][0] in RETRY_CLASSES

    def body(self):
        """problem+json, as the contract's `Problem` takes it."""
        return {
            "type": f"urn:ppec:error:{self.code}",
            "title": self.title,
            "status": ERRORS[self.code][2] if self.code in ERRORS else 500,
            "code": self.code,
            "detail": self.detail,
            "hint": self.hint,
            "subject": self.subject,
            "details": self.details,
        }
