# SPDX-License-Identifier: Apache-2.0
"""How much a host may say: its words go into the record and to callers, for every VM of a batch. Pure."""

from __future__ import annotations

from ppec_contract.errors import Problem
from ppec_contract.model import canonical_json

MAX_TEXT = 2000
MAX_WORD = 200
MAX_DETAILS_BYTES = 4000


def bounded(problem: Problem) -> Problem:
    """The same problem with its texts cut, and without details that are larger than any of ours.

    A NUL character becomes a visible one: PostgreSQL has none in texts.
    """
    details = problem.details if len(canonical_json(problem.details)) <= MAX_DETAILS_BYTES else {"dropped": True}
    return problem.model_copy(
        update={
            "type": _cut(problem.type, MAX_WORD),
            "title": _cut(problem.title, MAX_WORD),
            "code": _cut(problem.code, MAX_WORD),
            "detail": _cut(problem.detail, MAX_TEXT),
            "hint": _cut(problem.hint, MAX_TEXT),
            "subject": _cut(problem.subject, MAX_WORD),
            "details": details,
        }
    )


def _cut(text: str, most: int) -> str:
    clean = text.replace("\x00", "\ufffd")
    return clean if len(clean) <= most else clean[: most - 1] + "\u2026"
