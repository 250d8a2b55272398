# SPDX-License-Identifier: Apache-2.0
"""`ppec ipdb vrf|prefix|address …`"""

from __future__ import annotations

from typing import Annotated

import typer

from ppec_orchestrator.cli.resources import Limit, Resource, add_delete, add_list, add_show, create, show_items

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
        ("free>", lambda prefix: f"{prefix.addresses_free}/{prefix.addresses_total}"),
    ),
)
ADDRESS = Resource(
    "address",
    "/v1/addresses",
    "AddressView",
    (("address", "address"), ("prefix", "prefix"), ("vrf", "vrf"), ("vm", "vm")),
)

app = typer.Typer(help="VRFs, prefixes and addresses.", no_args_is_help=True)
vrfs = typer.Typer(help="Routing domains; a host's VRF decides its VMs' addresses.", no_args_is_help=True)
prefixes = typer.Typer(help="Address ranges of a VRF that serve a cluster or rack.", no_args_is_help=True)
addresses = typer.Typer(help="Addresses in use.", no_args_is_help=True)
app.add_typer(vrfs, name="vrf")
app.add_typer(prefixes, name="prefix")
app.add_typer(addresses, name="address")
for _app, _resource in ((vrfs, VRF), (prefixes, PREFIX)):
    add_list(_app, _resource)
    add_show(_app, _resource)
    add_delete(_app, _resource)


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
    cluster: Annotated[str, typer.Option(help="The cluster it serves.")],
    rack: Annotated[str | None, typer.Option(help="Only this rack of it.")] = None,
    gateway: Annotated[str | None, typer.Option(help="The guests' default gateway.")] = None,
    vlan: Annotated[int | None, typer.Option(help="VLAN that the bridge carries, for the record.")] = None,
    first: Annotated[str | None, typer.Option(help="First address to give out.")] = None,
    last: Annotated[str | None, typer.Option(help="Last address to give out.")] = None,
    nameserver: Annotated[list[str] | None, typer.Option(help="A name server for the guests; may repeat.")] = None,
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
        "first": first,
        "last": last,
        "nameservers": nameserver,
    }
    create(context, PREFIX, "PrefixCreate", values)


@addresses.command("list")
def list_addresses(
    context: typer.Context,
    vrf: Annotated[str | None, typer.Option(help="Only this VRF's.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Only this prefix's, by id.")] = None,
    limit: Limit = None,
) -> None:
    """List addresses and the VMs that hold them."""
    show_items(context, ADDRESS, {"vrf": vrf, "prefix_id": prefix}, limit)
