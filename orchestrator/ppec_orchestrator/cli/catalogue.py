# SPDX-License-Identifier: Apache-2.0
"""`ppec flavor|datacentre|cluster|rack …`"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from ppec_orchestrator.cli.exposure import RULE_HELP, rule_given, rule_shown
from ppec_orchestrator.cli.resources import Resource, add_delete, add_list, add_show, create, show_item
from ppec_orchestrator.cli.session import session_of

Architecture = Literal["x86_64", "aarch64", "ppc64le", "s390x", "riscv64"]
Cpus = Literal["dedicated", "shared"]
Smt = Literal["prefer", "isolate", "require"]
Pages = Literal["2M", "1G"]
Name = Annotated[str, typer.Argument(help="Its name.")]

_PAGES_KIB = {None: None, "2M": 2048, "1G": 1024 * 1024}


def _up_to(size: int, most: int | None) -> str:
    """`4`, or `4..8` for what can grow."""
    return str(size) if most is None else f"{size}..{most}"


def _policy(numa: Any) -> str:
    """What differs from the ordinary: `isolate, multi-cell, huge pages 2M`."""
    pages = {kib: word for word, kib in _PAGES_KIB.items()}[numa.huge_page_kib or None]
    said = (
        "shared" if numa.cpus == "shared" else "",
        numa.smt.value if numa.smt != "prefer" else "",
        "multi-cell" if numa.multi_cell else "",
        f"huge pages {pages}" if pages else "",
    )
    return ", ".join(filter(None, said)) or "-"


def _rule(rule: Any) -> str:
    return "-" if rule.mode == "off" else rule_shown(rule)


FLAVOR = Resource(
    "flavor",
    "/v1/flavors",
    "FlavorView",
    (
        ("flavor", "name"),
        ("vcpus>", lambda flavor: _up_to(flavor.vcpus, flavor.max_vcpus)),
        ("memory MiB>", lambda flavor: _up_to(flavor.memory_mib, flavor.max_memory_mib)),
        ("disk MiB>", "disk_mib"),
    ),
    rarely=(
        ("NVMe drives>", lambda flavor: flavor.nvme_drives or "-"),
        ("policy", lambda flavor: _policy(flavor.numa)),
    ),
    silent=("nvme_drives", "max_vcpus", "max_memory_mib", "numa"),
)
DATACENTRE = Resource(
    "data centre", "/v1/datacentres", "DatacentreView", (("datacentre", "name"), ("region", "region"))
)
CLUSTER = Resource(
    "cluster",
    "/v1/clusters",
    "ClusterView",
    (("cluster", "name"), ("datacentre", "datacentre"), ("architecture", "architecture")),
    rarely=(("N+1", lambda cluster: _rule(cluster.n_plus_one)),),
    silent=("n_plus_one",),
    told={"n_plus_one": lambda cluster: [rule_shown(cluster.n_plus_one)]},
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
def create_flavor(  # noqa: PLR0913, PLR0917 - an option each
    context: typer.Context,
    name: Name,
    vcpus: Annotated[int, typer.Option(help="vCPUs, an even number.")],
    memory_mib: Annotated[int, typer.Option(help="Memory, MiB.")],
    disk_mib: Annotated[int, typer.Option(help="Root disk, MiB.")],
    nvme_drives: Annotated[int | None, typer.Option(help="NVMe drives of its host that it gets whole.")] = None,
    max_vcpus: Annotated[int | None, typer.Option(help="vCPUs it can grow to while it runs.")] = None,
    max_memory: Annotated[int | None, typer.Option(help="Memory it can grow to while it runs, MiB.")] = None,
    cpus: Annotated[Cpus | None, typer.Option(help="Cores of its own (the default), or CPUs shared.")] = None,
    smt: Annotated[Smt | None, typer.Option(help="What it makes of SMT siblings (default: prefer).")] = None,
    multi_cell: Annotated[bool, typer.Option("--multi-cell", help="It may span NUMA cells and is shown them.")] = False,
    huge_pages: Annotated[Pages | None, typer.Option(help="Its memory is made of huge pages of this size.")] = None,
) -> None:
    """Create a flavor."""
    values = {"name": name, "vcpus": vcpus, "memory_mib": memory_mib, "disk_mib": disk_mib}
    values |= {"nvme_drives": nvme_drives, "max_vcpus": max_vcpus, "max_memory_mib": max_memory}
    asked = {"cpus": cpus, "smt": smt, "multi_cell": multi_cell or None, "huge_page_kib": _PAGES_KIB.get(huge_pages)}
    numa = {word: value for word, value in asked.items() if value is not None}
    create(context, FLAVOR, "FlavorCreate", values | ({"numa": numa} if numa else {}))


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
    n_plus_one: Annotated[str | None, typer.Option(help=RULE_HELP)] = None,
) -> None:
    """Create a cluster."""
    values = {"name": name, "datacentre": datacentre, "architecture": architecture}
    rule = {"n_plus_one": rule_given(n_plus_one)} if n_plus_one else {}
    create(context, CLUSTER, "ClusterCreate", values | rule)


@clusters.command("update")
def update_cluster(
    context: typer.Context, name: Name, n_plus_one: Annotated[str, typer.Option(help=RULE_HELP)]
) -> None:
    """Change what of N+1 holds for whatever is placed there from now on, or grows."""
    from ppec_contract.api_catalogue import ClusterUpdate, ClusterView
    from ppec_contract.validation import parse

    session = session_of(context)
    body = parse(ClusterUpdate, {"n_plus_one": rule_given(n_plus_one)})
    show_item(session, CLUSTER, session.client.patch(CLUSTER.url(name), body, ClusterView))


@racks.command("create")
def create_rack(
    context: typer.Context, name: Name, cluster: Annotated[str, typer.Option(help="The cluster it belongs to.")]
) -> None:
    """Create a rack."""
    create(context, RACK, "RackCreate", {"name": name, "cluster": cluster})
