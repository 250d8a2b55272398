# SPDX-License-Identifier: Apache-2.0
"""What is asked for when VMs are wanted: the options of `ppec vm create` and `ppec explain`, and the request they
make."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from ppec_orchestrator.cli import lists
from ppec_orchestrator.cli.catalogue import Cpus, Pages, Smt
from ppec_orchestrator.cli.exposure import RULE_HELP, rule_given

if TYPE_CHECKING:
    from ppec_contract.api_vms import VmsCreate

Policy = Literal["balanced", "pack", "spread"]
Mode = Literal["all-or-nothing", "best-effort", "most-vcpus"]
Texts = list[str] | None


def _option(kind: Any, help_text: str, default: Any = None) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(help=help_text)], default


# By parameter: the annotation that typer reads, and the default. Those without one come first.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "image": _option(str, "Image their root disks start from.", ...),
    "names": (Annotated[Texts, typer.Argument(help="Names, one VM each.")], None),
    "flavor": _option(str | None, "Size of the VMs."),
    "vcpus": _option(int | None, "In place of a flavor, with --memory-mib and --disk-mib."),
    "memory_mib": _option(int | None, "In place of a flavor."),
    "disk_mib": _option(int | None, "In place of a flavor."),
    "nvme_drives": _option(int | None, "Besides a size of its own: NVMe drives of its host that each gets whole."),
    "cpus": _option(Cpus | None, "Besides a size of its own: cores of its own (the default), or CPUs shared."),
    "smt": _option(Smt | None, "Besides a size of its own: what it makes of SMT siblings (default: prefer)."),
    "huge_pages": _option(Pages | None, "Besides a size of its own: its memory is made of huge pages of this size."),
    "multi_cell": (
        Annotated[
            bool,
            typer.Option("--multi-cell", help="Besides a size of its own: it may span NUMA cells and is shown them."),
        ],
        False,
    ),
    "pool": _option(str | None, "The storage pool of their disks; without one, where a host keeps VMs by itself."),
    "items": _option(
        str | None,
        "A JSON file with a list of VMs: of each its `name`, and what is not as for all (`flavor` or `size`, `pool`, "
        "`rack`, `host`, `networks`, `groups`, `priority`).",
    ),
    "name": _option(str | None, "Name of one VM, or of a batch: NAME-1, NAME-2, …"),
    "count": _option(int | None, "How many."),
    "policy": _option(Policy, "How hosts that fit are ranked.", "balanced"),
    "mode": _option(Mode, "What happens when not all of them work out.", "all-or-nothing"),
    "at_least": _option(int | None, "Not all are needed: what can be had without waiting for others, or else none."),
    "region": _option(str | None, "Only in this region."),
    "datacentre": _option(str | None, "Only in this data centre."),
    "cluster": _option(str | None, "Only in this cluster."),
    "rack": _option(str | None, "Only in this rack."),
    "host": _option(str | None, "Only on this host."),
    "vrf": _option(str | None, "Only where this VRF is."),
    "network": _option(Texts, "An address it gets: a prefix to take one of, just this address, or any; may repeat."),
    "host_label": _option(Texts, "Only on hosts with this label, KEY or KEY=VALUE; may repeat."),
    "avoid_label": _option(Texts, "Not on hosts with this label, KEY or KEY=VALUE; may repeat."),
    "apart": _option(
        Texts, "Apart from others of this group: NAME, or NAME:host|rack|datacentre, with :soft if need be."
    ),
    "together": _option(Texts, "Together with others of this group; said as for --apart."),
    "n_plus_one": _option(str | None, RULE_HELP),
    "max_moves": _option(
        int | None,
        "For each with dedicated CPUs in one cell, so many running VMs may change cells on its host to open one.",
    ),
    "user_data": _option(str | None, "A file of cloud-init user data; - for stdin."),
    "label": _option(Texts, "KEY=VALUE; may repeat."),
}


def takes_a_request(command: Callable[..., None]) -> Callable[..., None]:
    """For commands that want VMs: they have `OPTIONS` besides their own, and get what these say as `body`."""
    own = {name: each for name, each in signature(command).parameters.items() if name != "body"}
    hints = {name: each for name, each in get_type_hints(command, include_extras=True).items() if name in own}

    @wraps(command)
    def run(**given: Any) -> None:
        body = request({name: given.pop(name) for name in OPTIONS}, command.__name__)
        command(body=body, **given)

    asked = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is ... else default, annotation=kind)
        for name, (kind, default) in OPTIONS.items()
    ]
    mine = [each.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]) for name, each in own.items()]
    # What typer reads: names, defaults and types.
    run.__signature__ = Signature([*mine, *asked])  # type: ignore[attr-defined]
    run.__annotations__ = hints | {name: kind for name, (kind, _) in OPTIONS.items()}
    return run


# Options that go into the request as they are.
_AS_THEY_ARE = (
    "image", "flavor", "pool", "name", "count", "policy", "at_least", "region", "datacentre", "cluster", "rack", "host",
    "vrf", "max_moves",
)  # fmt: skip


# Options that make up a size, and those of its NUMA policy.
_SIZES = ("vcpus", "memory_mib", "disk_mib", "nvme_drives")
_POLICIES = ("cpus", "smt", "huge_pages", "multi_cell")


def request(options: dict[str, Any], subject: str) -> VmsCreate:
    """The request that these options make. Raises `request.invalid` naming what is wrong."""
    from ppec_contract.api_vms import VmsCreate
    from ppec_contract.validation import parse

    _refuse_size_of_flavor(options, subject)
    apart = [_rule(text, apart=True) for text in options["apart"] or ()]
    together = [_rule(text, apart=False) for text in options["together"] or ()]
    all_or_nothing = options["mode"] == "all-or-nothing"
    given: dict[str, Any] = {name: options[name] for name in _AS_THEY_ARE}
    given |= {
        "names": options["names"] or None,
        "mode": "best-effort" if options["at_least"] is not None and all_or_nothing else options["mode"],
        "size": _size(options) or None,
        "items": _items(options["items"], subject) if options["items"] else None,
        "networks": [_network(one) for one in options["network"] or ()] or None,
        "host_labels": options["host_label"] or None,
        "avoid_labels": options["avoid_label"] or None,
        "groups": apart + together or None,
        "n_plus_one": rule_given(options["n_plus_one"]) if options["n_plus_one"] else None,
        "user_data": _user_data(options["user_data"], subject),
        "labels": lists.labels_of(options["label"]) or None,
    }
    return parse(VmsCreate, {key: value for key, value in given.items() if value is not None}, subject=subject)


def _size(options: dict[str, Any]) -> dict[str, Any]:
    """What is said of it."""
    from ppec_orchestrator.cli.sizes import mib

    pages_mib = mib(options["huge_pages"], "huge-pages")
    asked = {"cpus": options["cpus"], "smt": options["smt"], "multi_cell": options["multi_cell"] or None}
    asked["huge_page_kib"] = None if pages_mib is None else pages_mib * 1024
    numa = {name: value for name, value in asked.items() if value is not None}
    size = {name: options[name] for name in _SIZES if options[name] is not None}
    return size | ({"numa": numa} if numa else {})


def _refuse_size_of_flavor(options: dict[str, Any], subject: str) -> None:
    """Here, because of a size that is not whole the contract says only what it lacks."""
    from ppec_contract.errors import PpecError

    said = [name for name in (*_SIZES, *_POLICIES) if options[name] is not None and options[name] is not False]
    given = [f"--{name.replace('_', '-')}" for name in said]
    if options["flavor"] is None or not given:
        return
    raise PpecError(
        "request.invalid",
        f"{', '.join(given)} and --flavor {options['flavor']}: the first {'are' if len(given) > 1 else 'is'} of an "
        "explicit size, which goes in place of a flavor",
        hint="Give a flavor alone, or --vcpus, --memory-mib and --disk-mib without one. A flavor has NVMe "
        "drives and CPU policies of its own.",
        subject=subject,
    )


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
