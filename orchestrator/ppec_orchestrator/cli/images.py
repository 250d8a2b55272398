# SPDX-License-Identifier: Apache-2.0
"""`ppec image …`"""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal

import typer

from ppec_orchestrator.cli.catalogue import Architecture
from ppec_orchestrator.cli.resources import Resource, add_delete, add_list, add_show
from ppec_orchestrator.cli.session import session_of

_QCOW2_MAGIC = b"QFI\xfb"
IMAGE = Resource(
    "image",
    "/v1/images",
    "ImageView",
    (
        ("image", "name"),
        ("format", "format"),
        ("architecture", "architecture"),
        ("size MiB>", lambda image: image.size_bytes >> 20),
        ("virtual MiB>", "virtual_size_mib"),
        ("sha256", lambda image: image.sha256[:16]),
    ),
)

app = typer.Typer(help="Disk images.", no_args_is_help=True)
add_list(app, IMAGE)
add_show(app, IMAGE)
add_delete(app, IMAGE)


@app.command("import")
def import_image(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The name it gets.")],
    file: Annotated[Path, typer.Argument(help="A qcow2 or raw disk image.")],
    image_format: Annotated[
        Literal["qcow2", "raw"] | None, typer.Option("--format", help="What it is; found out when left out.")
    ] = None,
    architecture: Annotated[Architecture, typer.Option(help="CPU architecture of the guest.")] = "x86_64",
) -> None:
    """Import a disk image. Its checksum is computed here and checked there."""
    from ppec_contract.api_catalogue import ImageView
    from ppec_orchestrator.cli.client import chunks

    session = session_of(context)
    query = {
        "format": image_format or _format_of(file),
        "architecture": architecture,
        "sha256": _sha256(file),
    }
    size = file.stat().st_size
    with file.open("rb") as opened:
        session.output.item(session.client.upload(IMAGE.url(name), query, chunks(opened), size, ImageView))


def _format_of(file: Path) -> str:
    with _opened(file) as opened:
        return "qcow2" if opened.read(4) == _QCOW2_MAGIC else "raw"


def _sha256(file: Path) -> str:
    import hashlib

    with _opened(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _opened(file: Path) -> BufferedReader:
    from ppec_contract.errors import PpecError

    try:
        return file.open("rb")
    except OSError as error:
        raise PpecError("request.invalid", f"{file} can't be read: {error.strerror}", subject=str(file)) from error
