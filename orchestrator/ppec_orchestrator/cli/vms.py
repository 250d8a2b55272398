# SPDX-License-Identifier: Apache-2.0
"""`ppec vm …`"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ppec_orchestrator.cli import lists, wanted
from ppec_orchestrator.cli.resources import Resource, add_show
from ppec_orchestrator.cli.session import session_of

if TYPE_CHECKING:
    from ppec_contract.api_vms import VmView

Record = Literal["creating", "active", "deleting", "failed"]
Observed = Literal["running", "stopped", "paused", "crashed", "unknown"]
Name = Annotated[str, typer.Argument(help="The VM, by name or id.")]
Names = Annotated[list[str], typer.Argument(help="VMs, by name or id.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the end, with progress.")]
_TIMEOUT = ("--timeout-s", "--timeout")


def _pins(vm: VmView) -> str:
    from ppec_orchestrator.cli.result import ranges

    return ranges(pin.pcpu for pin in vm.pins)


VM = Resource(
    "VM",
    "/v1/vms",
    "VmView",
    (
        ("VM", "name"),
        ("record", "record"),
        ("observed", "observed"),
        ("flavor", "flavor"),
        ("image", "image"),
        ("host", "host"),
        ("cells", lambda vm: ",".join(map(str, vm.cells)) or "-"),
        ("pins", _pins),
        ("vrf", "vrf"),
        ("address", lambda vm: ", ".join(str(a.address) for a in vm.addresses) or "-"),
        ("labels", lists.shown_labels),
    ),
    rarely=(("pool", "pool"), ("NVMe drives>", lambda vm: vm.nvme_drives or "-")),
    silent=("pool", "nvme_drives", "drives"),
)

app = typer.Typer(help="Virtual machines.", no_args_is_help=True)
add_show(app, VM)


@app.command("list")
def list_vms(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    query: lists.Text = None,
    host: Annotated[str | None, typer.Option(help="Only those on this host.")] = None,
    name: Annotated[str | None, typer.Option(help="Only this name.")] = None,
    record: Annotated[Record | None, typer.Option(help="Only those whose record says this.")] = None,
    observed: Annotated[Observed | None, typer.Option(help="Only those of which their host says this.")] = None,
    image: Annotated[str | None, typer.Option(help="Only those made from this image.")] = None,
    flavor: Annotated[str | None, typer.Option(help="Only those of this flavor.")] = None,
    pool: Annotated[str | None, typer.Option(help="Only those with their disks in this storage pool.")] = None,
    label: lists.Labels = None,
    architecture: lists.Architecture = None,
    region: lists.Region = None,
    datacentre: lists.Datacentre = None,
    cluster: lists.Cluster = None,
    rack: lists.Rack = None,
    vrf: lists.Vrf = None,
    limit: lists.Limit = None,
    whole: lists.Whole = False,
    paged: lists.Paged = False,
    cursor: lists.Cursor = None,
) -> None:
    """List VMs. -q looks in names, images, flavors, labels and hosts' names, and for addresses that begin so."""
    wanted: dict[str, str | list[str] | None] = {
        "q": query,
        "host": host,
        "name": name,
        "record": record,
        "observed": observed,
        "image": image,
        "flavor": flavor,
        "pool": pool,
        "label": label,
        "architecture": architecture,
        "region": region,
        "datacentre": datacentre,
        "cluster": cluster,
        "rack": rack,
        "vrf": vrf,
    }
    lists.show_list(context, VM, wanted, lists.Part(limit, whole, paged, cursor))


@app.command("label")
def label(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The VM, by name or id.")],
    labels: Annotated[list[str], typer.Argument(help="KEY=VALUE sets a label, KEY- removes it.")],
) -> None:
    """Set and remove labels of a VM."""
    lists.relabel(context, VM, name, labels)


@app.command("create")
@wanted.takes_a_request
def create(
    context: typer.Context,
    body: Any,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key never creates twice.")] = None,
    wait: Wait = False,
) -> None:
    """Create one VM or a batch."""
    from ppec_contract.api_operations import OperationView
    from ppec_orchestrator.cli.operations import accepted

    session = session_of(context)
    # The key is made here when none is given: a repeat after a lost answer is still the same request.
    key = idempotency_key or str(uuid.uuid4())
    accepted(session, session.client.post(VM.path, body, OperationView, idempotency_key=key), wait=wait)


@app.command("delete")
def delete(context: typer.Context, names: Names, wait: Wait = False) -> None:
    """Delete VMs, with their disks and addresses."""
    _act(context, {"action": "delete", "vms": names}, wait=wait)


@app.command("start")
def start(context: typer.Context, names: Names, wait: Wait = False) -> None:
    """Start VMs."""
    _act(context, {"action": "start", "vms": names}, wait=wait)


@app.command("stop")
def stop(
    context: typer.Context,
    names: Names,
    timeout_s: Annotated[float, typer.Option(*_TIMEOUT, help="How long the guests may take to shut down.")] = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Then pull the plug.")] = False,
    wait: Wait = False,
) -> None:
    """Stop VMs: ask the guests to shut down."""
    _act(context, {"action": "stop", "vms": names, "timeout_s": timeout_s, "force": force}, wait=wait)


@app.command("reboot")
def reboot(
    context: typer.Context,
    names: Names,
    timeout_s: Annotated[float, typer.Option(*_TIMEOUT, help="How long the guests may take to reboot.")] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Then press the reset button.")] = False,
    wait: Wait = False,
) -> None:
    """Reboot VMs: ask the guests to."""
    _act(context, {"action": "reboot", "vms": names, "timeout_s": timeout_s, "force": force}, wait=wait)


@app.command("reset")
def reset(context: typer.Context, names: Names, wait: Wait = False) -> None:
    """Press the reset button of VMs: at once, without asking the guests."""
    _act(context, {"action": "reset", "vms": names}, wait=wait)


@app.command("pause")
def pause(context: typer.Context, names: Names, wait: Wait = False) -> None:
    """Stop the vCPUs of VMs; their memory stays as it is."""
    _act(context, {"action": "pause", "vms": names}, wait=wait)


@app.command("resume")
def resume(context: typer.Context, names: Names, wait: Wait = False) -> None:
    """Have paused VMs run on."""
    _act(context, {"action": "resume", "vms": names}, wait=wait)


@app.command("freeze")
def freeze(
    context: typer.Context,
    names: Names,
    thaw_after_s: Annotated[
        float, typer.Option("--thaw-after-s", min=1, max=600, help="When their hosts thaw them, whatever happens.")
    ] = 60.0,
    wait: Wait = False,
) -> None:
    """Have guests flush and freeze their file systems, for a copy of the disks that is whole."""
    _act(context, {"action": "freeze", "vms": names, "thaw_after_s": thaw_after_s}, wait=wait)


@app.command("thaw")
def thaw(context: typer.Context, names: Names, wait: Wait = False) -> None:
    """End a freeze."""
    _act(context, {"action": "thaw", "vms": names}, wait=wait)


@app.command("guest")
def guest(
    context: typer.Context,
    name: Name,
    timeout_s: Annotated[float, typer.Option(*_TIMEOUT, min=1, max=30, help="How long its agent may take.")] = 5.0,
) -> None:
    """Ask a VM's guest agent for its addresses and system. It is the guest's word, not PPEC's."""
    from ppec_contract.guest import GuestInfo

    session = session_of(context)
    session.output.item(session.client.get(f"{VM.url(name)}/guest", GuestInfo, {"timeout_s": str(timeout_s)}))


@app.command("console")
def console(
    context: typer.Context,
    name: Name,
    read_only: Annotated[bool, typer.Option("--read-only", help="Only print; Ctrl-C ends it.")] = False,
    follow: Annotated[bool, typer.Option(help="Or end with what is there; then it is read-only.")] = True,
    tail_bytes: Annotated[int, typer.Option(min=0, max=262144, help="How much to begin with.")] = 16384,
) -> None:
    """Open a VM's serial console. Ctrl-] leaves it; it ends by itself when the VM goes off."""
    from ppec_contract.api_consoles import ConsoleOpen
    from ppec_orchestrator.cli.console import open_console

    asked = ConsoleOpen(read_only=read_only or not follow, follow=follow, tail_bytes=tail_bytes)
    open_console(session_of(context), f"{VM.url(name)}/console", asked)


@app.command("resize")
def resize(
    context: typer.Context,
    name: Name,
    vcpus: Annotated[int | None, typer.Option(help="How many vCPUs it is to have.")] = None,
    memory: Annotated[str | None, typer.Option(help="Its memory, in MiB or with a unit: 512M, 8G.")] = None,
    timeout_s: Annotated[float, typer.Option(*_TIMEOUT, help="How long its guest may take to let go of vCPUs.")] = 10.0,
    wait: Wait = False,
) -> None:
    """Give a VM another size: at once as far as it can be done while it runs, the rest at its next start."""
    from ppec_contract.api_operations import OperationView
    from ppec_contract.api_vms import VmResize
    from ppec_contract.validation import parse
    from ppec_orchestrator.cli.operations import accepted
    from ppec_orchestrator.cli.sizes import mib

    given = {"vcpus": vcpus, "memory_mib": mib(memory, "memory")}
    given = {key: value for key, value in given.items() if value is not None}
    body = parse(VmResize, {**given, "timeout_s": timeout_s}, subject="vm resize")
    session = session_of(context)
    view = session.client.patch(VM.url(name), body, OperationView, idempotency_key=str(uuid.uuid4()))
    accepted(session, view, wait=wait)


def _act(context: typer.Context, given: dict[str, Any], *, wait: bool) -> None:
    from ppec_contract.api_operations import OperationView
    from ppec_contract.api_vms import VmsAction
    from ppec_contract.validation import parse
    from ppec_orchestrator.cli.operations import accepted

    body = parse(VmsAction, given, subject=f"vm {given['action']}")
    session = session_of(context)
    key = str(uuid.uuid4())
    view = session.client.post(f"{VM.path}/actions", body, OperationView, idempotency_key=key)
    accepted(session, view, wait=wait)
