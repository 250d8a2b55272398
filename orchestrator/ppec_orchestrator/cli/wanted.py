# SPDX-License-Identifier: Apache-2.0
"""What is asked for when VMs are wanted: the options of `ppec vm create` and `ppec explain`, and the request they
make."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ppec_orchestrator.cli import lists

if TYPE_CHECKING:
    from ppec_contract.api import VmsCreate

Image = Annotated[str, typer.Option(help="Image their root disks start from.")]
NewNames = Annotated[list[str] | None, typer.Argument(help="Names, one VM each.")]
Flavor = Annotated[str | None, typer.Option(help="Size of the VMs.")]
Vcpus = Annotated[int | None, typer.Option(help="In place of a flavor, with --memory-mib and --disk-mib.")]
MemoryMib = Annotated[int | None, typer.Option(help="In place of a flavor.")]
DiskMib = Annotated[int | None, typer.Option(help="In place of a flavor.")]
Items = Annotated[
    str | None, typer.Option(help="A JSON file with a list of VMs of different sizes (`name`, `flavor` or `size`, …).")
]
BaseName = Annotated[str | None, typer.Option(help="Name of one VM, or of a batch: NAME-1, NAME-2, …")]
Count = Annotated[int | None, typer.Option(help="How many.")]
Policy = Annotated[Literal["balanced", "pack", "spread"], typer.Option(help="How hosts that fit are ranked.")]
Mode = Annotated[
    Literal["all-or-nothing", "best-effort"], typer.Option(help="What happens when not all of them work out.")
]
AtLeast = Annotated[
    int | None, typer.Option(help="Best effort: what can be had without waiting for others, or else none.")
]
Region = Annotated[str | None, typer.Option(help="Only in this region.")]
Datacentre = Annotated[str | None, typer.Option(help="Only in this data centre.")]
Cluster = Annotated[str | None, typer.Option(help="Only in this cluster.")]
Rack = Annotated[str | None, typer.Option(help="Only in this rack.")]
Host = Annotated[str | None, typer.Option(help="Only on this host.")]
Vrf = Annotated[str | None, typer.Option(help="Only where this VRF is.")]
Networks = Annotated[
    list[str] | None,
    typer.Option(help="An address it gets: a prefix to take one of, just this address, or any; may repeat."),
]
HostLabels = Annotated[
    list[str] | None, typer.Option(help="Only on hosts with this label, KEY or KEY=VALUE; may repeat.")
]
AvoidLabels = Annotated[
    list[str] | None, typer.Option(help="Not on hosts with this label, KEY or KEY=VALUE; may repeat.")
]
Apart = Annotated[
    list[str] | None,
    typer.Option(help="Apart from others of this group: NAME, or NAME:host|rack|datacentre, with :soft if need be."),
]
Together = Annotated[list[str] | None, typer.Option(help="Together with others of this group; said as for --apart.")]
NPlusOne = Annotated[
    str | None, typer.Option(help="off, warn or required; with :rack after the loss of a rack in place of a host.")
]
UserData = Annotated[str | None, typer.Option(help="A file of cloud-init user data; - for stdin.")]
VmLabels = Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may repeat.")]

# Options that go into the request as they are.
_AS_THEY_ARE = (
    "image", "flavor", "name", "count", "policy", "at_least", "region", "datacentre", "cluster", "rack", "host", "vrf",
)  # fmt: skip


def request(options: dict[str, Any], subject: str) -> VmsCreate:
    """The request that these options make. Raises `request.invalid` naming what is wrong."""
    from ppec_contract.api import VmsCreate
    from ppec_contract.validation import parse

    sizes = {name: options[name] for name in ("vcpus", "memory_mib", "disk_mib")}
    apart = [_rule(text, apart=True) for text in options["apart"] or ()]
    together = [_rule(text, apart=False) for text in options["together"] or ()]
    given: dict[str, Any] = {name: options[name] for name in _AS_THEY_ARE}
    given |= {
        "names": options["names"] or None,
        "mode": options["mode"] if options["at_least"] is None else "best-effort",
        "size": sizes if any(value is not None for value in sizes.values()) else None,
        "items": _items(options["items"], subject) if options["items"] else None,
        "networks": [_network(one) for one in options["network"] or ()] or None,
        "host_labels": options["host_label"] or None,
        "avoid_labels": options["avoid_label"] or None,
        "groups": apart + together or None,
        "n_plus_one": _n_plus_one(options["n_plus_one"]) if options["n_plus_one"] else None,
        "user_data": _user_data(options["user_data"], subject),
        "labels": lists.labels_of(options["label"]) or None,
    }
    if given["size"] is not None:
        given["size"] = {name: value for name, value in given["size"].items() if value is not None}
    return parse(VmsCreate, {key: value for key, value in given.items() if value is not None}, subject=subject)


def _rule(text: str, *, apart: bool) -> dict[str, Any]:
    name, *terms = text.split(":")
    rule: dict[str, Any] = {"name": name, "apart": apart}
    for term in terms:
        # What is no level is refused by the contract, with all levels there are.
        rule |= {"hard": False} if term == "soft" else {"level": term}
    return rule


def _network(given: str) -> dict[str, str]:
    if given == "any":
        return {}
    return {"prefix" if "/" in given else "address": given}


def _n_plus_one(text: str) -> dict[str, Any]:
    mode, _, level = text.partition(":")
    return {"mode": mode} | ({"level": level} if level else {})


def _items(file: str, subject: str) -> Any:
    from ppec_contract.errors import PpecError

    try:
        return json.loads(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise PpecError("request.invalid", f"{file} can't be read as JSON: {error}", subject=subject) from error


def _user_data(source: str | None, subject: str) -> str | None:
    """The file's text, byte for byte: no newline is translated."""
    from ppec_contract.errors import PpecError

    if source is None:
        return None
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PpecError("request.invalid", f"user data {source!r} can't be read: {error}", subject=subject) from error
