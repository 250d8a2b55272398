# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them."""

from __future__ import annotations

import re

from ppec_contract.errors import PpecError

_SIZE = re.compile(r"([0-9]{1,12})\s*(?:([MGT])(?:iB?)?)?", re.IGNORECASE)
_MIB = {"M": 1, "G": 1024, "T": 1024 * 1024}


def mib(text: str | None, option: str) -> int | None:
    """MiB of `512`, `512M`, `8G`, `8GiB` or `1T`; None of None. Raises `request.invalid`."""
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise PpecError(
            "request.invalid",
            f"{option}: {text[:40]!r} is no size",
            hint="Give whole MiB, or a number with a unit: 512M, 8G, 1T.",
            subject=option,
        )
    return int(found[1]) * _MIB[(found[2] or "M").upper()]
