# SPDX-License-Identifier: Apache-2.0
"""Parts of JSON, for lists that write their items as text.

A list has items by the hundred thousand, and each is to take microseconds. To put one together from texts takes a third
of the time that a dict of the same members takes, which is made first and gone through after. Times are most of what is
left, if they are made into Python's and back, so the database writes them as they are shown.
"""

from __future__ import annotations

from json.encoder import encode_basestring
from socket import AF_INET6, inet_ntoa, inet_ntop
from typing import Any

from sqlalchemy import Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from ppec_orchestrator.ipdb.ranges import from_hex

# IPv6 addresses of which these are the first digits may stand for IPv4 ones; the C library writes some of them so.
_EMBEDDED = "0" * 16


class JsonTime(FunctionElement[str]):
    """The text of a `UtcTime` column as pydantic writes it: in UTC with a "Z", and a fraction only if there is one.
    None stays None."""

    type = Text()
    inherit_cache = True
    name = "json_time"


@compiles(JsonTime, "postgresql")
def _in_utc(element: JsonTime, compiler: Any, **options: Any) -> str:
    column = compiler.process(element.clauses, **options)
    return f"""replace(to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), '.000000', '')"""


@compiles(JsonTime, "sqlite")
def _as_it_is_kept(element: JsonTime, compiler: Any, **options: Any) -> str:
    """SQLAlchemy keeps "2026-11-20 12:00:00.000000", and `UtcTime` lets nothing in but UTC."""
    column = compiler.process(element.clauses, **options)
    return f"replace(replace({column}, ' ', 'T'), '.000000', '') || 'Z'"


def quoted(text: str) -> str:
    """What is not ASCII stays as it is, as in all answers."""
    return encode_basestring(text)


def quoted_or_null(text: str | None) -> str:
    return "null" if text is None else encode_basestring(text)


def address_text(digits: str, family: int) -> str:
    """What an address is called, from the database's form; `ipaddress` takes ten times as long to say so."""
    if family == 4:
        return inet_ntoa(bytes.fromhex(digits[-8:]))
    if digits.startswith(_EMBEDDED):
        return str(from_hex(digits, family))
    return inet_ntop(AF_INET6, bytes.fromhex(digits))
