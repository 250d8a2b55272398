# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a fleet's file, and where: a line (`line 12`) or a path (`hosts[3].sockets[0].cores`)."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from ppec_contract.errors import PpecError
from ppec_contract.validation import in_words

# Of a name in a message: it is the file's, and may be of any length.
_SHOWN_NAME = 64


class FleetError(ValueError):
    """Raised by readers; `reading.py` says of which file."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


def fault_of(error: ValidationError, inside: str = "") -> FleetError:
    """The first of pydantic's faults. Input values are left out: they may be huge."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return FleetError(inside + path_of(first["loc"], below=bool(inside)) or "the file", in_words(first["msg"]))


def path_of(loc: Sequence[int | str], *, below: bool = False) -> str:
    """`("hosts", 3, "cores")` as `hosts[3].cores`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:_SHOWN_NAME]}" for part in loc]
    path = "".join(parts)
    return path if below else path.removeprefix(".")


def shown(name: object) -> str:
    """A name from the file, for a message."""
    text = str(name)
    return repr(text if len(text) <= _SHOWN_NAME else text[:_SHOWN_NAME] + "…")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file was taken for."""

    words: str
    formats: str


FLEET = Kind(
    "a fleet", "It takes ppec-fleet/1 (ppec fleet export), ppec-bench-cluster/1, or Ganeti's htools text format."
)
REQUESTS = Kind(
    "requests",
    "It takes ppec-requests/1, JSON as the fleet's own format writes requests, or another fleet's file in JSON.",
)
ANSWER = Kind(
    "a plan's answer",
    "It takes what ppec --output json printed for plan --evidence, explain --evidence or plans show.",
)


def unreadable(source: str, why: str, kind: Kind = FLEET, hint: str = "") -> PpecError:
    return PpecError(
        "fleet.unreadable",
        f"{source} can't be read as {kind.words}: {why}",
        hint=hint or kind.formats,
        subject=source,
    )


def not_utf8(data: bytes, error: UnicodeDecodeError) -> FleetError:
    before = data.count(b"\n", 0, error.start)
    return FleetError(f"line {before + 1}", "it is not text in UTF-8")


def invalid(source: str, fault: FleetError) -> PpecError:
    return PpecError(
        "fleet.invalid",
        f"{source}: {fault.where}: {fault.what}",
        hint="Correct what stands there; nothing was planned.",
        subject=source,
        details={"where": fault.where, "fault": fault.what},
    )


def refuse_doubles(names: Iterable[Hashable], kind: str, where: Callable[[int], str]) -> None:
    """Raises FleetError for the first name that came before; `where` gives the place of the nth."""
    seen: dict[Hashable, int] = {}
    for index, name in enumerate(names):
        first = seen.setdefault(name, index)
        if first != index:
            raise FleetError(where(index), f"{kind} {shown(name)} is there twice, first at {where(first)}")


def refuse_standing(name: Hashable, standing: Container[Hashable], where: str) -> None:
    """Raises FleetError for a request by the name, or the id, of a VM that stands already."""
    if name in standing:
        raise FleetError(where, f"VM {shown(name)} stands in the fleet already")
