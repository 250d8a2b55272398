# SPDX-License-Identifier: Apache-2.0
"""`ppec ipdb export|import|audit`"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ppec_orchestrator.cli.resources import Limit, Resource, show_items
from ppec_orchestrator.cli.session import session_of

Action = Literal["granted", "kept", "released", "reserved", "excluded", "opened"]
Form = Literal["csv", "json"]
FormOption = Annotated[Form | None, typer.Option("--format", help="csv or json; by default as the file is called.")]
EVENT = Resource(
    "event",
    "/v1/addresses/events",
    "AddressEventView",
    (
        ("at", lambda event: f"{event.at:%Y-%m-%d %H:%M:%SZ}"),
        ("action", "action"),
        ("address", lambda event: f"{event.address} - {event.last}" if event.last else str(event.address)),
        ("vrf", "vrf"),
        ("vm", "vm"),
        ("by", "caller"),
        ("operation", "operation_id"),
    ),
    rarely=(("note", "note"),),
)


def add_exchange(app: typer.Typer) -> None:
    """Puts the commands into `ppec ipdb`."""
    app.command("export")(export)
    app.command("import")(import_)
    app.command("audit")(audit)


def export(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="Where to; - is stdout.")] = "-",
    form: FormOption = None,
    vrf: Annotated[str | None, typer.Option(help="Only this VRF.")] = None,
) -> None:
    """Export VRFs, prefixes and what is held back of them."""
    from ppec_contract.api_ipdb import IpdbDocument
    from ppec_orchestrator.ipdb.exchange import as_csv

    document = session_of(context).client.get("/v1/ipdb/export", IpdbDocument, {"vrf": vrf} if vrf else None)
    as_table = _form(file, form) == "csv"
    text = as_csv(document) if as_table else document.model_dump_json(indent=2) + "\n"
    if file == "-":
        # Bytes: no newline is translated.
        sys.stdout.buffer.write(text.encode())
        return
    try:
        Path(file).write_bytes(text.encode())
    except OSError as error:
        raise _unusable(f"{file!r} can't be written: {error.strerror}") from error


def import_(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="Where from; - is stdin.")],
    form: FormOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    skip_refused: Annotated[
        bool,
        typer.Option(
            "--skip-refused",
            help="Leave out prefixes of loopback, multicast or other such addresses, unless some of them are reserved.",
        ),
    ] = False,
) -> None:
    """Import VRFs, prefixes and holds: all of them, or nothing and what is wrong with which."""
    from ppec_contract.api_ipdb import IpdbDocument, IpdbImport, IpdbImported
    from ppec_contract.errors import PpecError
    from ppec_contract.validation import parse

    content = _read(file)
    # An orchestrator that doesn't know it is only told of it when it is wanted.
    wanted: dict[str, Any] = {"dry_run": dry_run} | ({"skip_refused": True} if skip_refused else {})
    if _form(file, form) == "csv":
        body = parse(IpdbImport, {"csv": _text(content, file), **wanted}, subject="import")
    else:
        document = parse(IpdbDocument, _object(content, file), subject="import")
        body = IpdbImport(document=document, **wanted)
    session = session_of(context)
    try:
        done = session.client.post("/v1/ipdb/import", body, IpdbImported)
    except PpecError as error:
        for fault in error.details.get("faults", ()):
            session.output.say(f"{fault.get('place')}: {fault.get('reason')}")
        raise
    for row in done.skipped:
        session.output.say(f"{row.place}: skipped: {row.reason}")
    session.output.item(done, hidden=("skipped",))


def audit(  # noqa: PLR0913, PLR0917 - one parameter per option
    context: typer.Context,
    address: Annotated[str | None, typer.Option(help="Only this address's.")] = None,
    vm: Annotated[str | None, typer.Option(help="Only this VM's, by name.")] = None,
    vrf: Annotated[str | None, typer.Option(help="Only this VRF's.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Only this prefix's, by id.")] = None,
    action: Annotated[Action | None, typer.Option(help="Only this.")] = None,
    limit: Limit = 100,
) -> None:
    """Show what befell addresses, the latest first."""
    query = {"address": address, "vm": vm, "vrf": vrf, "prefix_id": prefix, "action": action}
    show_items(context, EVENT, query, limit)


def _form(file: str, form: Form | None) -> Form:
    return form or ("csv" if file.lower().endswith(".csv") else "json")


def _read(file: str) -> bytes:
    """No more than an import may have, and one byte that says so of a longer one, be it endless."""
    from ppec_contract.api_ipdb import MAX_IMPORT_BYTES

    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as source:
            content = source.read(MAX_IMPORT_BYTES + 1)
    except OSError as error:
        raise _unusable(f"{file!r} can't be read: {error.strerror}") from error
    if len(content) > MAX_IMPORT_BYTES:
        raise _not_importable(file, f"it is longer than {MAX_IMPORT_BYTES} bytes", "request.invalid")
    return content


def _object(content: bytes, file: str) -> dict[str, Any]:
    from ppec_contract.frames import FrameError, decode_json_object

    try:
        return decode_json_object(content)
    except FrameError as error:
        raise _not_importable(file, error.why, error.code) from error


def _text(content: bytes, file: str) -> str:
    from ppec_contract.frames import place_in

    try:
        # Spreadsheets begin a table with a byte order mark.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # It counts from behind the mark, as an editor does.
        why = f"it is not UTF-8 ({place_in(error.object, error.start)})"
        raise _not_importable(file, why, "request.invalid") from error


def _not_importable(file: str, why: str, code: str) -> Exception:
    from ppec_contract.errors import PpecError

    hint = "Nothing was sent. Correct it there, or have it written anew."
    return PpecError(code, f"the import file {file!r} can't be used: {why}", hint=hint, subject="import")


def _unusable(why: str) -> Exception:
    from ppec_contract.errors import PpecError

    return PpecError("request.invalid", why, subject="import")
