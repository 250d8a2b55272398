# SPDX-License-Identifier: Apache-2.0
"""`ppec-orchestrator`: the server's own command. People use `ppec`, which talks to it over the API.

Each command imports what it needs itself: the whole server takes a second or two to import, and only `serve` needs it.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ppec_contract.errors import PpecError, exit_code
from ppec_contract.model import ResourceName
from ppec_orchestrator.logs import configure_logs
from ppec_orchestrator.roles import Role
from ppec_orchestrator.settings import Settings

# How many new objects the garbage collector looks at once: a request makes more than the 700 that are usual, and nearly
# all of them are gone with it.
_YOUNG = 10_000
# Of a file with a host's certificate; far more than any has.
_LONGEST_PEM = 1024 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is the error table's."""
    arguments = _parser().parse_args(argv)
    try:
        settings = Settings.load(arguments.config)
        configure_logs(settings.log_level)
        arguments.run(settings, arguments)
    except PpecError as error:
        print(f"ppec-orchestrator: {error}", file=sys.stderr)  # noqa: T201
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)  # noqa: T201
        return exit_code(error.code)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ppec-orchestrator", description="The PPEC orchestrator.")
    parser.add_argument("--config", type=Path, help="settings file (TOML); PPEC_… variables go over it")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(group: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str):  # type: ignore[no-untyped-def]
        return group.add_parser(name, help=text, description=text)

    command(commands, "serve", "Run the orchestrator.").set_defaults(run=_serve)
    command(commands, "migrate", "Bring the database's schema up to date, and end.").set_defaults(run=_migrate)

    token = command(commands, "token", "API tokens.").add_subparsers(required=True, metavar="ACTION")
    create = command(token, "create", "Make a token, or replace it, and print it: it is shown only here.")
    create.add_argument("name", type=_name)
    create.add_argument("--role", type=Role, choices=list(Role), required=True)
    create.add_argument("--days", type=int, help="days until it expires; without, it does not")
    create.set_defaults(run=_create_token)
    revoke = command(token, "revoke", "Remove a token; a running orchestrator forgets it within seconds.")
    revoke.add_argument("name", type=_name)
    revoke.set_defaults(run=_revoke_token)

    certificate = command(commands, "certificate", "Certificates of the fleet CA.")
    actions = certificate.add_subparsers(required=True, metavar="ACTION")
    issue = command(actions, "issue", "Make a client certificate for direct use of the hosts' proxies.")
    issue.add_argument("--operator", type=_name, required=True, help="who it is for")
    issue.add_argument("--directory", type=Path, default=Path(), help="where NAME.crt, NAME.key and ca.crt go")
    issue.set_defaults(run=_issue_certificate)
    record = command(actions, "record", "Let a host's certificate count that the fleet CA issued elsewhere.")
    record.add_argument("file", type=Path, metavar="FILE", help="the certificate (PEM) of a registered host")
    record.set_defaults(run=_record_certificate)
    return parser


def _name(text: str) -> str:
    try:
        return TypeAdapter(ResourceName).validate_python(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError("lower-case letters, digits, dots and dashes, 63 at most") from error


def _serve(settings: Settings, arguments: argparse.Namespace) -> None:
    # What is imported stays: without looks at it for garbage that is a sixth faster, and later ones can leave it out.
    gc.disable()
    from ppec_orchestrator.process import serve

    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])
    gc.enable()
    serve(settings)


def _migrate(settings: Settings, arguments: argparse.Namespace) -> None:
    from ppec_orchestrator.state import opened_database

    with opened_database(settings):
        pass


def _audit(action: str, subject: str) -> None:
    """Of what is done by command: the caller is whoever may read the state directory."""
    from ppec_orchestrator.audit import audit

    audit(f"local user {os.getuid()}", action, subject, "done")


def _create_token(settings: Settings, arguments: argparse.Namespace) -> None:
    from ppec_orchestrator.state import opened_database
    from ppec_orchestrator.store.tokens import create_token

    now = datetime.now(UTC)
    expires_at = now + timedelta(days=arguments.days) if arguments.days is not None else None
    with opened_database(settings) as database, database.write() as conn:
        token = create_token(conn, arguments.name, arguments.role, now=now, expires_at=expires_at)
    _audit("create_token", f"{arguments.name} {arguments.role}")
    print(token)  # noqa: T201


def _revoke_token(settings: Settings, arguments: argparse.Namespace) -> None:
    from ppec_orchestrator.state import opened_database
    from ppec_orchestrator.store.tokens import remove_token

    with opened_database(settings) as database, database.write() as conn:
        remove_token(conn, arguments.name)
    _audit("revoke_token", arguments.name)


def _issue_certificate(settings: Settings, arguments: argparse.Namespace) -> None:
    from ppec_orchestrator.pki.ca import FleetCa
    from ppec_orchestrator.pki.keys import write_private
    from ppec_orchestrator.state import opened_database
    from ppec_orchestrator.store.certificates import record_certificate

    now = datetime.now(UTC)
    with opened_database(settings) as database:
        ca = FleetCa.open(settings.pki_dir, now=now)
        issued, key = ca.issue_operator(arguments.operator, now=now)
        with database.write() as conn:
            record_certificate(conn, issued, now=now)
    _audit("issue_certificate", issued.uri)
    folder: Path = arguments.directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_private(folder / f"{arguments.operator}.key", key)
        write_private(folder / f"{arguments.operator}.crt", issued.pem.encode("ascii"))
        write_private(folder / "ca.crt", ca.ca_pem.encode("ascii"))
    except OSError as error:
        raise PpecError(
            "request.invalid", f"can't write to {folder}: {error.strerror}", subject="certificate"
        ) from error
    print(folder / f"{arguments.operator}.crt")  # noqa: T201


def _record_certificate(settings: Settings, arguments: argparse.Namespace) -> None:
    from ppec_orchestrator.pki.ca import FleetCa
    from ppec_orchestrator.pki.issued_elsewhere import read_host_certificate
    from ppec_orchestrator.state import opened_database
    from ppec_orchestrator.store.issued_elsewhere import record_host_certificate

    now = datetime.now(UTC)
    pem = _content(arguments.file)
    with opened_database(settings) as database:
        issued, identity = read_host_certificate(pem, FleetCa.open(settings.pki_dir, now=now).ca_pem, now=now)
        with database.write() as conn:
            new = record_host_certificate(conn, issued, identity, now=now)
    if new:
        _audit("record_certificate", issued.uri)
    print(f"{issued.uri} {issued.serial}" + ("" if new else " (was recorded already)"))  # noqa: T201


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LONGEST_PEM)
    except OSError as error:
        raise PpecError("request.invalid", f"can't read {path}: {error.strerror}", subject="certificate") from error


if __name__ == "__main__":
    sys.exit(main())
