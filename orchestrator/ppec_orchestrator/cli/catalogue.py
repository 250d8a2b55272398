# SPDX-License-Identifier: Apache-2.0
"""`ppec flavor|datacentre|cluster|rack …`"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ppec_orchestrator.cli.resources import Resource, add_delete, add_list, add_show, create

Architecture = Literal["x86_64", "aarch64", "ppc64le", "s390x", "riscv64"]
Name = Annotated[str, typer.Argument(help="Its name.")]

FLAVOR = Resource(
    "flavor",
    "/v1/flavors",
    "FlavorView",
    (("flavor", "name"), ("vcpus>", "vcpus"), ("memory MiB>", "memory_mib"), ("disk MiB>", "disk_mib")),
)
DATACENTRE = Resource(
    "data centre", "/v1/datacentres", "DatacentreView", (("datacentre", "name"), ("region", "region"))
)
CLUSTER = Resource(
    "cluster",
    "/v1/clusters",
    "ClusterView",
    (("cluster", "name"), ("datacentre", "datacentre"), ("architecture", "architecture")),
)
RACK = Resource("rack", "/v1/racks", "RackView", (("rack", "name"), ("cluster", "cluster")))

flavors = typer.Typer(help="Sizes of VMs.", no_args_is_help=True)
datacentres = typer.Typer(help="Data centres, each in a region.", no_args_is_help=True)
clusters = typer.Typer(help="Clusters of hosts of one architecture.", no_args_is_help=True)
racks = typer.Typer(help="Racks of a cluster.", no_args_is_help=True)

for _app, _resource in ((flavors, FLAVOR), (datacentres, DATACENTRE), (clusters, CLUSTER), (racks, RACK)):
    add_list(_app, _resource)
    add_show(_app, _resource)
    add_delete(_app, _resource)


@flavors.command("create")
def create_flavor(
    context: typer.Context,
    name: Name,
    vcpus: Annotated[int, typer.Option(help="Dedicated vCPUs, an even number.")],
    memory_mib: Annotated[int, typer.Option(help="Memory, MiB.")],
    disk_mib: Annotated[int, typer.Option(help="Root disk, MiB.")],
) -> None:
    """Create a flavor."""
    values = {"name": name, "vcpus": vcpus, "memory_mib": memory_mib, "disk_mib": disk_mib}
    create(context, FLAVOR, "FlavorCreate", values)


@datacentres.command("create")
def create_datacentre(
    context: typer.Context, name: Name, region: Annotated[str, typer.Option(help="The region it is in.")]
) -> None:
    """Create a data centre."""
    create(context, DATACENTRE, "DatacentreCreate", {"name": name, "region": region})


@clusters.command("create")
def create_cluster(
    context: typer.Context,
    name: Name,
    datacentre: Annotated[str, typer.Option(help="The data centre it is in.")],
    architecture: Annotated[Architecture, typer.Option(help="CPU architecture of its hosts.")] = "x86_64",
) -> None:
    """Create a cluster."""
    values = {"name": name, "datacentre": datacentre, "architecture": architecture}
    create(context, CLUSTER, "ClusterCreate", values)


@racks.command("create")
def create_rack(
    context: typer.Context, name: Name, cluster: Annotated[str, typer.Option(help="The cluster it belongs to.")]
) -> None:
    """Create a rack."""
    create(context, RACK, "RackCreate", {"name": name, "cluster": cluster})
