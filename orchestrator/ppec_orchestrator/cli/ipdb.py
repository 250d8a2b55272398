# SPDX-License-Identifier: Apache-2.0
"""`ppec ipdb vrf|prefix|hold|address …`; `ipdb_exchange.py` has export, import and audit."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from ppec_orchestrator.cli.ipdb_exchange import add_exchange
from ppec_orchestrator.cli.output import count
from ppec_orchestrator.cli.resources import (
    Limit,
    Resource,
    add_delete,
    add_list,
    add_show,
    create,
    made_columns,
    show_items,
)
from ppec_orchestrator.cli.session import session_of

VRF = Resource("VRF", "/v1/vrfs", "VrfView", (("vrf", "name"), ("description", "description")))
PREFIX = Resource(
    "prefix",
    "/v1/prefixes",
    "PrefixView",
    (
        ("id>", "prefix_id"),
        ("vrf", "vrf"),
        ("prefix", "cidr"),
        ("gateway", "gateway"),
        ("vlan>", "vlan"),
        ("bridge", "bridge"),
        ("cluster", "cluster"),
        ("rack", "rack"),
        ("used>", "addresses_used"),
        ("free>", lambda prefix: f"{count(prefix.addresses_free)}/{count(prefix.addresses_total)}"),
    ),
    rarely=(
        ("region", "region"),
        ("resting>", lambda prefix: prefix.addresses_quarantined or "-"),
        ("reserved>", lambda prefix: count(prefix.addresses_reserved) if prefix.addresses_reserved else "-"),
    ),
)
ADDRESS = Resource(
    "address",
    "/v1/addresses",
    "AddressView",
    (("address", "address"), ("prefix", "prefix"), ("vrf", "vrf"), ("state", "state"), ("vm", "vm")),
    rarely=(("until", "until"), ("for", "reserved_for")),
)
HOLD = Resource(
    "hold",
    "/v1/prefixes/{prefix}/holds",
    "HoldView",
    (
        ("id>", "hold_id"),
        ("kind", "kind"),
        ("first", "first"),
        ("last", "last"),
        ("for", "reserved_for"),
        ("note", "note"),
        ("by", "created_by"),
    ),
)
RUNS = (("first", "first"), ("last", "last"), ("count>", lambda run: count(run.count)))

app = typer.Typer(help="VRFs, prefixes and addresses.", no_args_is_help=True)
vrfs = typer.Typer(help="Routing domains; a host's VRF decides its VMs' addresses.", no_args_is_help=True)
prefixes = typer.Typer(help="Networks of a VRF that serve a region, cluster or rack.", no_args_is_help=True)
PrefixId = Annotated[int, typer.Argument(help="The prefix, by id.", min=1)]
holds = typer.Typer(help="Addresses of a prefix that are reserved or excluded.", no_args_is_help=True)
addresses = typer.Typer(help="Addresses: who has which, and which are free.", no_args_is_help=True)
app.add_typer(vrfs, name="vrf")
app.add_typer(prefixes, name="prefix")
app.add_typer(holds, name="hold")
app.add_typer(addresses, name="address")
add_exchange(app)
for _app, _resource in ((vrfs, VRF), (prefixes, PREFIX)):
    add_list(_app, _resource)
    add_show(_app, _resource)
add_delete(vrfs, VRF)


@vrfs.command("create")
def create_vrf(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Its name.")],
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
) -> None:
    """Create a VRF."""
    create(context, VRF, "VrfCreate", {"name": name, "description": description})


@prefixes.command("create")
def create_prefix(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    cidr: Annotated[str, typer.Argument(help="The network, e.g. 10.1.0.0/24.")],
    vrf: Annotated[str, typer.Option(help="Its VRF.")],
    bridge: Annotated[str, typer.Option(help="The bridge on the hosts.")],
    cluster: Annotated[str | None, typer.Option(help="The cluster it serves.")] = None,
    rack: Annotated[str | None, typer.Option(help="Only this rack of it.")] = None,
    region: Annotated[str | None, typer.Option(help="The region it serves, instead of a cluster.")] = None,
    gateway: Annotated[str | None, typer.Option(help="The guests' default gateway.")] = None,
    vlan: Annotated[int | None, typer.Option(help="VLAN that the bridge carries, for the record.")] = None,
    first: Annotated[str | None, typer.Option(help="First address to give out.")] = None,
    last: Annotated[str | None, typer.Option(help="Last address to give out.")] = None,
    nameserver: Annotated[list[str] | None, typer.Option(help="A name server for the guests; may repeat.")] = None,
    quarantine_s: Annotated[int | None, typer.Option(help="How long a released address rests (300).")] = None,
    netbox_id: Annotated[int | None, typer.Option(help="The same prefix in NetBox, which keeps its addresses.")] = None,
) -> None:
    """Create a prefix."""
    values = {
        "vrf": vrf,
        "cidr": cidr,
        "gateway": gateway,
        "vlan": vlan,
        "bridge": bridge,
        "cluster": cluster,
        "rack": rack,
        "region": region,
        "first": first,
        "last": last,
        "nameservers": nameserver,
        "quarantine_s": quarantine_s,
        "netbox_id": netbox_id,
    }
    create(context, PREFIX, "PrefixCreate", values)


@prefixes.command("update")
def update_prefix(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    prefix: PrefixId,
    gateway: Annotated[str | None, typer.Option(help="The default gateway of VMs to come.")] = None,
    no_gateway: Annotated[bool, typer.Option("--no-gateway", help="They get none.")] = False,
    first: Annotated[str | None, typer.Option(help="First address to give out.")] = None,
    last: Annotated[str | None, typer.Option(help="Last address to give out.")] = None,
    vlan: Annotated[int | None, typer.Option(help="VLAN that the bridge carries.")] = None,
    no_vlan: Annotated[bool, typer.Option("--no-vlan", help="It carries none.")] = False,
    nameserver: Annotated[list[str] | None, typer.Option(help="A name server for VMs to come; may repeat.")] = None,
    no_nameservers: Annotated[bool, typer.Option("--no-nameservers", help="They are told none.")] = False,
    quarantine_s: Annotated[int | None, typer.Option(help="How long a released address rests.")] = None,
) -> None:
    """Change a prefix. VMs that exist keep what they were told."""
    from ppec_contract.api_ipdb import PrefixUpdate, PrefixView
    from ppec_contract.validation import parse

    cleared: dict[str, tuple[str, bool, Any]] = {
        "gateway": ("--no-gateway", no_gateway, None),
        "vlan": ("--no-vlan", no_vlan, None),
        "nameservers": ("--no-nameservers", no_nameservers, []),
    }
    options = {
        "gateway": gateway,
        "first": first,
        "last": last,
        "vlan": vlan,
        "nameservers": nameserver or None,
        "quarantine_s": quarantine_s,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    for name, (option, wanted, nothing) in cleared.items():
        if wanted and name in given:
            raise _unusable(f"--{name.removesuffix('s')} and {option} exclude each other")
        if wanted:
            given[name] = nothing
    if not given:
        raise _unusable("nothing is said that is to change; see --help")
    body = parse(PrefixUpdate, given)
    session = session_of(context)
    session.output.item(session.client.patch(PREFIX.url(str(prefix)), body, PrefixView))


def _unusable(why: str) -> Exception:
    from ppec_contract.errors import PpecError

    return PpecError("request.invalid", why, subject="prefix")


@prefixes.command("delete")
def delete_prefix(
    context: typer.Context,
    prefix: PrefixId,
    force: Annotated[
        bool, typer.Option("--force", help="End quarantines and holds of its addresses, instead of refusing.")
    ] = False,
) -> None:
    """Delete a prefix of which no VM has an address, none rests, and none is held back."""
    session = session_of(context)
    session.client.delete(PREFIX.url(str(prefix)), {"force": "true"} if force else None)
    session.output.say(f"prefix {prefix} deleted")


@prefixes.command("free")
def show_free(
    context: typer.Context,
    prefix: PrefixId,
    networks: Annotated[bool, typer.Option("--networks", help="As networks, the largest first.")] = False,
) -> None:
    """Show the free addresses of a prefix, as runs or as networks."""
    from ppec_contract.api_ipdb import PrefixFree

    session = session_of(context)
    found = session.client.get(f"{PREFIX.url(str(prefix))}/free", PrefixFree)
    if session.output.as_json:
        session.output.json(found)
    elif networks:
        session.output.lines(str(one) for one in found.networks)
    else:
        session.output.items(found.runs, made_columns(RUNS))
    if found.more:
        session.output.say("There are more than these.")


@vrfs.command("free")
def show_free_networks(
    context: typer.Context,
    vrf: Annotated[str, typer.Argument(help="The VRF.")],
    within: Annotated[str, typer.Argument(help="The network to look in, e.g. 10.0.0.0/8.")],
) -> None:
    """Show where another prefix would fit."""
    from ppec_contract.api_ipdb import VrfFree

    session = session_of(context)
    found = session.client.get(f"{VRF.url(vrf)}/free", VrfFree, {"within": within})
    if session.output.as_json:
        session.output.json(found)
    else:
        session.output.lines(str(one) for one in found.networks)
    if found.more:
        session.output.say("There are more than these.")


def _holds_of(prefix: int) -> Resource:
    return replace(HOLD, path=HOLD.path.format(prefix=prefix))


@holds.command("list")
def list_holds(context: typer.Context, prefix: PrefixId, limit: Limit = None) -> None:
    """List what is reserved and excluded of a prefix."""
    show_items(context, _holds_of(prefix), limit=limit)


@holds.command("create")
def create_hold(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    prefix: PrefixId,
    first: Annotated[str, typer.Argument(help="The address, or the first of several.")],
    last: Annotated[str | None, typer.Argument(help="The last of them.")] = None,
    excluded: Annotated[bool, typer.Option("--excluded", help="They are in other hands.")] = False,
    reserved_for: Annotated[str | None, typer.Option("--for", help="The VM that may ask for them, by name.")] = None,
    note: Annotated[str | None, typer.Option(help="What for.")] = None,
) -> None:
    """Reserve addresses of a prefix, or exclude them: they are not given out by themselves."""
    kind = "excluded" if excluded else "reserved"
    values = {"kind": kind, "first": first, "last": last, "reserved_for": reserved_for, "note": note}
    create(context, _holds_of(prefix), "HoldCreate", values)


@holds.command("delete")
def delete_hold(
    context: typer.Context, prefix: PrefixId, hold: Annotated[int, typer.Argument(help="The hold, by id.", min=1)]
) -> None:
    """Give held addresses free again."""
    session = session_of(context)
    session.client.delete(_holds_of(prefix).url(str(hold)))
    session.output.say(f"hold {hold} deleted")


@addresses.command("list")
def list_addresses(
    context: typer.Context,
    vrf: Annotated[str | None, typer.Option(help="Only this VRF's.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Only this prefix's, by id.")] = None,
    vm: Annotated[str | None, typer.Option(help="Only this VM's, by name.")] = None,
    free: Annotated[bool, typer.Option("--free", help="Those that anybody may get (IPv4 only).")] = False,
    limit: Limit = None,
) -> None:
    """List the addresses that VMs have, that rest or are held back, or with --free the others.

    Of IPv6 neither free nor held back addresses are listed: `ppec ipdb hold list` shows what is held back.
    """
    query = {"vrf": vrf, "prefix_id": prefix, "vm": vm, "free": "true" if free else None}
    show_items(context, ADDRESS, query, limit)
