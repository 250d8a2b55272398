# SPDX-License-Identifier: Apache-2.0
"""The `ppec` program: the command tree, the common options, and errors to exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from ppec_orchestrator.cli import catalogue, explain, fleets, hosts, images, ipdb, operations, plans, vms
from ppec_orchestrator.cli.session import Session, hoisted

app = typer.Typer(
    name="ppec",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="The options above may stand anywhere on the line. Exit codes: 2 fix the request, 3 not allowed, "
    "4 not found, 5 conflict, 6 no capacity, 7 try again, 8 an error of PPEC's.",
)
app.add_typer(vms.app, name="vm")
app.add_typer(hosts.app, name="host")
app.add_typer(operations.app, name="operation")
app.add_typer(ipdb.app, name="ipdb")
app.add_typer(images.app, name="image")
app.add_typer(catalogue.flavors, name="flavor")
app.add_typer(catalogue.datacentres, name="datacentre")
app.add_typer(catalogue.clusters, name="cluster")
app.add_typer(catalogue.racks, name="rack")
app.add_typer(fleets.app, name="fleet")
app.command("plan")(fleets.plan)
app.command("explain")(explain.explain)
app.command("execute")(explain.execute)
app.add_typer(plans.app, name="plans")
app.command("approve")(plans.approve)


@app.callback()
def root(
    context: typer.Context,
    server: Annotated[str | None, typer.Option(help="The orchestrator's URL (PPEC_SERVER).")] = None,
    token: Annotated[str | None, typer.Option(help="Bearer token; better given as PPEC_TOKEN.")] = None,
    ca: Annotated[str | None, typer.Option(help="The fleet CA's certificate, a file (PPEC_CA).")] = None,
    output: Annotated[Literal["table", "json"], typer.Option("--output", "-o", help="What stdout gets.")] = "table",
) -> None:
    """Virtual machines on bare metal. Settings left out are read from ~/.config/ppec/config.toml."""
    from ppec_orchestrator.cli.output import Output

    context.obj = Session({"server": server, "token": token, "ca": ca}, Output(output == "json"))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    from ppec_contract.errors import PpecError, exit_code

    try:
        app(hoisted(arguments), prog_name="ppec")
    except PpecError as error:
        from ppec_orchestrator.cli.output import Output

        Output(as_json=False).error(error)
        return exit_code(error.code)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
