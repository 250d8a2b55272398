# SPDX-License-Identifier: Apache-2.0
"""`ppec host …`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ppec_orchestrator.cli import lists
from ppec_orchestrator.cli.host_fields import HOST_FIELDS
from ppec_orchestrator.cli.resources import Resource, add_delete, add_show, create, made_columns, show_item
from ppec_orchestrator.cli.session import session_of

if TYPE_CHECKING:
    from ppec_contract.api_hosts import HostView

Liveness = Literal["registered", "enrolled", "up", "unknown"]
SIZE = "In MiB, or with a unit: 512M, 8G, 1T."
Name = Annotated[str, typer.Argument(help="The host.")]


def _cores(host: HostView) -> str:
    return f"{sum(c.cores_free for c in host.cells)}/{sum(c.cores for c in host.cells)}"


def _memory(host: HostView) -> str:
    return f"{sum(c.memory_free_mib for c in host.cells)}/{sum(c.memory_mib for c in host.cells)}"


def _drives(host: HostView) -> str:
    drives = sum(c.nvme_drives for c in host.cells)
    return f"{sum(c.nvme_drives_free for c in host.cells)}/{drives}" if drives else "-"


HOST = Resource(
    "host",
    "/v1/hosts",
    "HostView",
    (
        ("host", "name"),
        ("liveness", lambda host: f"{host.liveness}{', draining' if host.draining else ''}"),
        ("cluster", "cluster"),
        ("rack", "rack"),
        ("vrf", "vrf"),
        ("address", lambda host: f"{host.address}:{host.port}"),
        ("cells>", lambda host: len(host.cells)),
        ("cores free>", _cores),
        ("memory free MiB>", _memory),
        ("disk free MiB>", lambda host: f"{host.disk_free_mib}/{host.disk_mib}"),
        ("VMs>", "vm_count"),
        ("health", "health_level"),
        ("drift>", "drift_count"),
        ("agent", "agent_version"),
        ("labels", lists.shown_labels),
    ),
    rarely=(("NVMe drives free>", _drives),),
    told=HOST_FIELDS,
)

app = typer.Typer(help="Bare-metal hosts.", no_args_is_help=True)
add_show(app, HOST)
add_delete(app, HOST)


@app.command("list")
def list_hosts(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    query: lists.Text = None,
    architecture: lists.Architecture = None,
    region: lists.Region = None,
    datacentre: lists.Datacentre = None,
    cluster: lists.Cluster = None,
    rack: lists.Rack = None,
    vrf: lists.Vrf = None,
    label: lists.Labels = None,
    liveness: Annotated[Liveness | None, typer.Option(help="Only those that are so.")] = None,
    draining: Annotated[
        bool | None, typer.Option("--draining/--not-draining", help="Only (not) draining ones.")
    ] = None,
    limit: lists.Limit = None,
    whole: lists.Whole = False,
    paged: lists.Paged = False,
    cursor: lists.Cursor = None,
) -> None:
    """List hosts. -q looks in names, addresses and labels."""
    wanted: dict[str, str | list[str] | None] = {
        "q": query,
        "architecture": architecture,
        "region": region,
        "datacentre": datacentre,
        "cluster": cluster,
        "rack": rack,
        "vrf": vrf,
        "label": label,
        "liveness": liveness,
        "draining": None if draining is None else str(draining).lower(),
    }
    lists.show_list(context, HOST, wanted, lists.Part(limit, whole, paged, cursor))


@app.command("label")
def label(
    context: typer.Context,
    name: Name,
    labels: Annotated[list[str], typer.Argument(help="KEY=VALUE sets a label, KEY- removes it.")],
) -> None:
    """Set and remove labels of a host."""
    lists.relabel(context, HOST, name, labels)


@app.command("add")
def add(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    name: Name,
    rack: Annotated[str, typer.Option(help="The rack it stands in.")],
    vrf: Annotated[str, typer.Option(help="The VRF its VMs get addresses of.")],
    address: Annotated[str, typer.Option(help="Where its proxy listens: a name or an address.")],
    port: Annotated[int | None, typer.Option(help="The proxy's port.  [default: 7443]")] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may repeat.")] = None,
) -> None:
    """Register a host. It takes VMs once it has enrolled and reported."""
    labels = lists.labels_of(label) or None
    values = {"name": name, "rack": rack, "vrf": vrf, "address": address, "port": port, "labels": labels}
    create(context, HOST, "HostCreate", values)


@app.command("events")
def events(
    context: typer.Context,
    name: Name,
    limit: Annotated[int, typer.Option(min=1, max=500, help="At most so many.")] = 50,
) -> None:
    """What befell a host, the latest first: checks of its health that changed their level."""
    from ppec_contract.api_hosts import HostEvents

    session = session_of(context)
    found = session.client.get(f"{HOST.url(name)}/events?limit={limit}", HostEvents)
    columns = (("at", "at"), ("check", "check"), ("before", "before"), ("after", "after"), ("found", "found"))
    session.output.items(found.items, made_columns(columns))


@app.command("drain")
def drain(context: typer.Context, name: Name) -> None:
    """Place no new VMs on a host; those on it stay."""
    _set_draining(context, name, draining=True)


@app.command("undrain")
def undrain(context: typer.Context, name: Name) -> None:
    """Place VMs on a host again."""
    _set_draining(context, name, draining=False)


def _set_draining(context: typer.Context, name: str, *, draining: bool) -> None:
    from ppec_contract.api_hosts import HostUpdate, HostView

    session = session_of(context)
    show_item(session, HOST, session.client.patch(HOST.url(name), HostUpdate(draining=draining), HostView))


@app.command("retune")
def retune(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    name: Name,
    vcpus: Annotated[int | None, typer.Option(help="Of a VM that is to fit.  [default: a whole cell empty]")] = None,
    memory: Annotated[str | None, typer.Option(help=f"Its memory. {SIZE}")] = None,
    cells: Annotated[str | None, typer.Option(help="Only these cells: 0,2.")] = None,
    max_moves: Annotated[int | None, typer.Option(help="Move so many VMs at most.  [default: 16]")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help=f"Copy so much memory at most.  [default: 256G] {SIZE}")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would move, before and after.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, with progress.")] = False,
) -> None:
    """Move running VMs between a host's NUMA cells, so that a large one fits. They run on meanwhile."""
    from ppec_orchestrator.cli import retune as retunes
    from ppec_orchestrator.cli.sizes import mib

    want = {"vcpus": vcpus, "memory_mib": mib(memory, "memory"), "cells": retunes.cells_of(cells)}
    bounds = {"moves": max_moves, "memory_mib": mib(max_memory, "max-memory")}
    retunes.retune(session_of(context), HOST.url(name), want, bounds, plan_only=plan, wait=wait)


@app.command("enrolment-token")
def enrolment_token(context: typer.Context, name: Name) -> None:
    """Make a token that enrols this host once. It is shown only here."""
    from ppec_contract.api_hosts import EnrolmentTokenView

    session = session_of(context)
    session.output.item(session.client.post(f"{HOST.url(name)}/enrolment-token", None, EnrolmentTokenView))
