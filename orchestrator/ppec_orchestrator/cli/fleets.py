# SPDX-License-Identifier: Apache-2.0
"""`ppec plan` and `ppec fleet …`: planning on a fleet that is live, in a file, or made up.

All that plans is behind `fleets.offline`, imported when such a command runs: no other command waits for numpy.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ppec_orchestrator.cli.explain import none_made
from ppec_orchestrator.cli.session import Session, session_of

if TYPE_CHECKING:
    from ppec_orchestrator.cli.output import Output
    from ppec_orchestrator.fleets.offline import ExposedDomain, Outcome, Verdict

PATH = "/v1/fleet"
FORMATS = "ppec-fleet/1 (of ppec fleet export), ppec-bench-cluster/1, or Ganeti's htools text."
# Of what may be thousands, as many are shown one by one.
_SHOWN_VMS, _SHOWN_WHYS, _SHOWN_MOVES, _SHOWN_FAULTS = 40, 8, 40, 40
_STDOUT = Path("-")
PolicyName = Literal["balanced", "pack", "spread"]
Mode = Literal["all-or-nothing", "best-effort", "most-vcpus"]
Written = Annotated[Path, typer.Argument(help="The file to write; - for standard output.")]

app = typer.Typer(help="Snapshots of whole fleets, to plan on.", no_args_is_help=True)


def plan(  # noqa: PLR0913, PLR0917 - an option each
    context: typer.Context,
    fleet: Annotated[Path | None, typer.Option(help=f"A file, {FORMATS} Left out: the live fleet.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="The VMs to place, a file. Left out: those in the fleet's file.")
    ] = None,
    policy: Annotated[PolicyName, typer.Option(help="How hosts that fit are ranked.")] = "balanced",
    mode: Annotated[
        Mode,
        typer.Option(
            help="In the order given; the largest first, as if all were needed; or for the most vCPUs in all."
        ),
    ] = "best-effort",
    n_plus_one: Annotated[
        str, typer.Option(help="off, warn or required: may a host be lost; with :rack after it, a rack.")
    ] = "off",
    max_moves: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many running VMs may change cells to open one, for VMs with dedicated CPUs in one; 16 at most.",
        ),
    ] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Have the plan verified by rules that share no code with the planner.")
    ] = False,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Let JSON say of each VM what it takes to verify its place.")
    ] = False,
    advise: Annotated[
        int, typer.Option(min=0, help="For how many kinds of refused VMs to look for what would help.")
    ] = 10,
    verify: Annotated[
        Path | None,
        typer.Option(
            help="Plan nothing: verify this answer, in JSON with its evidence, to the same fleet and options."
        ),
    ] = None,
) -> None:
    """Plan VMs on a fleet and say where each would go, or why not. Nothing is changed, and no orchestrator needed."""
    from ppec_contract.api_placement import Policy
    from ppec_contract.api_vms import BatchMode
    from ppec_orchestrator.fleets.offline import Options, plan_on, verified

    session = session_of(context)
    options = Options(Policy(policy), BatchMode(mode), n_plus_one, max_moves, check, evidence, advise)
    if verify is not None:
        _show_verdict(session.output, verified(fleet or _live(session), requests, verify, options))
        return
    outcome = plan_on(fleet or _live(session), requests, options)
    if session.output.as_json:
        session.output.json(outcome.answer, without_none=True)
    else:
        _show(session.output, outcome)
    refuse_faults(outcome.answer.faults or ())


@app.command("export")
def export(context: typer.Context, file: Written = _STDOUT) -> None:
    """Write the live fleet as a snapshot."""
    _write(file, session_of(context).client.download(PATH))


@app.command("generate")
def generate(  # noqa: PLR0913, PLR0917 - an option each
    hosts: Annotated[int, typer.Option(min=1, max=100_000, help="How many hosts.")],
    file: Written = _STDOUT,
    clusters: Annotated[int, typer.Option(min=1, help="Over how many clusters they are spread.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same fleet.")] = 1,
    fill: Annotated[
        float, typer.Option(min=0, max=1, help="The share of the cores that VMs have, in the mean.")
    ] = 0.65,
    requests: Annotated[int, typer.Option(min=0, max=100_000, help="How many VMs are asked for.")] = 10_000,
    apart: Annotated[bool, typer.Option(help="An app's VMs stand on hosts of their own.")] = True,
    varied: Annotated[bool, typer.Option(help="With SMT, huge pages, shared CPUs, NVMe, labels, pools.")] = False,
) -> None:
    """Write a snapshot of a fleet made up by a seed."""
    from ppec_orchestrator.fleets.offline import Recipe, generated

    recipe = Recipe(hosts, clusters, seed, fill, requests=requests, apart=apart, varied=varied)
    _write(file, (piece.encode() for piece in generated(recipe)))


@app.command("show")
def show(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help=f"A file, {FORMATS} Left out: the live fleet.")] = None,
) -> None:
    """Show a fleet in a few figures."""
    from ppec_orchestrator.fleets.offline import summary

    session = session_of(context)
    session.output.item(summary(file or _live(session)))


@app.command("exposed")
def exposed(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(help=f"A file, {FORMATS} Left out: the live fleet.")] = None,
    level: Annotated[Literal["host", "rack"], typer.Option(help="What may be lost.")] = "host",
) -> None:
    """Say which hosts, or racks, could not be lost: their VMs would not all find a place in their cluster (N+1)."""
    from ppec_orchestrator.fleets.offline import exposed_in

    session = session_of(context)
    found = exposed_in(file or _live(session), level)
    if session.output.as_json:
        session.output.json(found)
        return
    _show_exposed(session.output, found.exposed)
    session.output.say(f"{found.domains - len(found.exposed)} of {found.domains} {level}s can be lost, each alone.")


def refuse_faults(
    faults: Sequence[str], hint: str = "Don't carry it out, and report it with the files it was made from."
) -> None:
    """Raises PpecError if a plan has any: the planner is wrong, or what verifies it; or the answer was changed."""
    if faults:
        from ppec_contract.errors import PpecError

        raise PpecError(
            "internal.error",
            f"the plan does not hold: {len(faults)} faults, the first of them: {faults[0]}",
            hint=hint,
            subject="plan",
        )


def _live(session: Session) -> bytes:
    return b"".join(session.client.download(PATH))


def _write(file: Path, content: Iterable[bytes]) -> None:
    """Whole or not at all: what breaks off on its way leaves no half of a fleet."""
    if file == _STDOUT:
        for piece in content:
            sys.stdout.buffer.write(piece)
        return
    from ppec_contract.errors import PpecError

    made: Path | None = None
    try:
        # Opened as any new file, with the mode that the umask leaves: `tempfile` makes secrets of all its files.
        beside = file.parent / f".{file.name}.{secrets.token_hex(4)}"
        with beside.open("xb") as opened:
            made = beside
            for piece in content:
                opened.write(piece)
        made.replace(file)
        made = None
    except OSError as error:
        raise PpecError(
            "request.invalid", f"{file} can't be written: {error.strerror}", subject=f"file {file}"
        ) from error
    finally:
        if made is not None:
            with suppress(OSError):
                made.unlink()


def _show(output: Output, outcome: Outcome) -> None:
    from ppec_orchestrator.cli.output import fields, rows

    answer = outcome.answer
    if 0 < len(answer.placed) <= _SHOWN_VMS:
        placed = [(each.vm, each.host, ", ".join(map(str, each.cells))) for each in answer.placed]
        output.results.print(rows(("VM", "host", "cells"), placed))
    if answer.moves:
        moved = [(m.vm, m.host, _cells(m.cells_before), _cells(m.cells_after)) for m in answer.moves[:_SHOWN_MOVES]]
        output.results.print(rows(("moved VM", "host", "from cells", "to cells"), moved))
    used = [(u.name, u.whole, _share(u.before, u.whole), _share(u.after, u.whole)) for u in outcome.uses]
    output.results.print(rows(("use", "whole>", "before>", "after>"), used))
    if outcome.whys:
        most = len(outcome.advice) + _SHOWN_WHYS
        whys = [(why.vms, why.first, why.sentence) for why in outcome.whys[:most]]
        if left := outcome.whys[most:]:
            whys.append((sum(why.vms for why in left), left[0].first, "counted otherwise: see --output json"))
        output.results.print(rows(("refused VMs>", "first of them", "of"), whys))
    _show_advice(output, outcome)
    _show_exposed(output, answer.exposed or ())
    said = {
        "placed": len(answer.placed),
        "refused": len(answer.refused),
        "score before": f"{outcome.score_before:.6f}",
        "score after": f"{outcome.score_after:.6f}  (lower is more even)",
        "CPU seconds": f"{answer.load_cpu_s:.3f} to load, {answer.plan_cpu_s:.3f} to plan"
        + (f", {answer.advice_cpu_s:.3f} to advise" if answer.advice_cpu_s is not None else ""),
    }
    output.results.print(fields(said))
    if answer.placed and not answer.executable:
        output.say(none_made(len(answer.placed), len(answer.refused)))
    if answer.faults is not None:
        _show_checked(output, answer.faults, len(answer.placed), len(answer.refused), answer.domains_checked)


def _show_exposed(output: Output, exposed: Sequence[ExposedDomain]) -> None:
    from ppec_orchestrator.cli.output import rows

    if exposed:
        shown = [(each.domain, each.without_place, each.vm) for each in exposed]
        output.results.print(rows(("if lost", "VMs without a place>", "first of them"), shown))


def _show_checked(output: Output, faults: Sequence[str], placed: int, refused: int, domains: int | None) -> None:
    from ppec_orchestrator.cli.output import rows

    if faults:
        output.results.print(rows(("faults",), [(fault,) for fault in faults[:_SHOWN_FAULTS]]))
        return
    lost = "" if domains is None else f", and {domains} domains can be lost (N+1)"
    output.say(f"Checked: {placed} placements and {refused} refusals hold{lost}.")


def _show_verdict(output: Output, verdict: Verdict) -> None:
    if output.as_json:
        output.json(verdict, without_none=True)
    else:
        _show_checked(output, verdict.faults, verdict.placed, verdict.refused, verdict.domains_checked)
    refuse_faults(
        verdict.faults,
        hint="Don't carry it out. If the fleet, the requests and the options are those that it was made of, report it.",
    )


def _show_advice(output: Output, outcome: Outcome) -> None:
    """VMs that the same would help are told it once; why they were refused stands in the table."""
    for kind in outcome.advice:
        one, *others = kind.refusals
        more = f" and {len(others)} more like it" if others else ""
        output.say(f"{one.name}{more}:" + ("" if kind.changes else " no change was found that would help"))
        for change in kind.changes:
            output.say(f"  would fit: {change.sentence}")
    left = len(outcome.answer.refused) - sum(len(kind.refusals) for kind in outcome.advice)
    if outcome.advice and left:
        output.say(
            f"{left} more VMs were refused; for these {len(outcome.advice)} kinds alone was looked for what would "
            "help: --advise looks for more"
        )


def _cells(cells: tuple[int, ...]) -> str:
    return ", ".join(map(str, cells))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
