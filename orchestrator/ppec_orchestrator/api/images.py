# SPDX-License-Identifier: Apache-2.0
"""/v1/images: the file goes in by name and comes out by content."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from ppec_contract.api import Page
from ppec_contract.api_catalogue import ImageView
from ppec_contract.errors import PpecError
from ppec_contract.host import Architecture
from ppec_contract.model import ResourceName, Sha256
from ppec_orchestrator.api.auth import Admin, HostOrViewer, Viewer
from ppec_orchestrator.api.bulkheads import BulkheadRoute
from ppec_orchestrator.api.pages import ByName, Name
from ppec_orchestrator.api.services import Here, Services
from ppec_orchestrator.image_formats import ImageFormat
from ppec_orchestrator.image_store import Upload
from ppec_orchestrator.store.images import IMAGES, find_image, image_exists, record_image, uses_of_content

router = APIRouter(prefix="/v1/images", tags=["images"], route_class=BulkheadRoute)
_CHUNK_BYTES = 1024 * 1024
ONE_YEAR_S = 31_536_000


@dataclass(frozen=True, slots=True)
class _Claim:
    """What the caller says the body is."""

    name: str
    format: ImageFormat
    architecture: Architecture
    sha256: str | None


async def _claim(
    name: Annotated[ResourceName, Path()],
    format: Annotated[ImageFormat, Query()],  # noqa: A002 - its name in the API
    architecture: Annotated[Architecture, Query()] = "x86_64",
    sha256: Annotated[Sha256 | None, Query()] = None,
) -> _Claim:
    return _Claim(name, format, architecture, sha256)


@router.get("")
def list_images(services: Here, caller: Viewer, wanted: ByName) -> Page[ImageView]:
    """List images."""
    with services.database.read() as conn:
        return IMAGES.page(conn, wanted)


@router.get("/{name}")
def get_image(services: Here, caller: Viewer, name: Name) -> ImageView:
    """Show an image."""
    with services.database.read() as conn:
        return IMAGES.get(conn, name)


_FILE = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "required": True}


@router.put("/{name}", status_code=201, openapi_extra={"requestBody": _FILE})
async def import_image(
    services: Here, caller: Admin, request: Request, response: Response, claim: Annotated[_Claim, Depends(_claim)]
) -> ImageView:
    """Import an image: the body is the file. Importing the same file again changes nothing (200)."""
    await run_in_threadpool(_refuse_early, services, claim)
    upload = await run_in_threadpool(services.images.begin)
    try:
        async for chunk in _in_large_chunks(request.stream()):
            await run_in_threadpool(upload.write, chunk)
        view, created = await run_in_threadpool(_settle, services, upload, claim)
    finally:
        await run_in_threadpool(upload.abort)
    if not created:
        response.status_code = 200
    return view


@router.delete("/{name}", status_code=204)
def delete_image(services: Here, caller: Admin, name: Name) -> Response:
    """Delete an image that no VM was made of."""
    with services.images.settling:
        with services.database.write() as conn:
            sha256 = IMAGES.get(conn, name).sha256
            IMAGES.delete(conn, name)
            left = uses_of_content(conn, sha256)
        if not left:
            services.images.remove(sha256)
    return Response(status_code=204)


@router.get("/{sha256}/content", response_class=FileResponse)
def get_image_content(services: Here, caller: HostOrViewer, sha256: Annotated[Sha256, Path()]) -> FileResponse:
    """The file itself, for hosts; takes Range requests."""
    path = services.images.path(sha256)
    if not path.is_file():
        raise PpecError("image.not_found", f"there is no image with sha256 {sha256}", subject=f"image {sha256}")
    headers = {"ETag": f'"{sha256}"', "Cache-Control": f"private, max-age={ONE_YEAR_S}, immutable"}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


async def _in_large_chunks(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The server hands over a few KiB at a time; a switch to a thread should be worth it."""
    held = bytearray()
    async for chunk in stream:
        held += chunk
        if len(held) >= _CHUNK_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _refuse_early(services: Services, claim: _Claim) -> None:
    """Before gigabytes are sent for nothing."""
    with services.database.read() as conn:
        found = find_image(conn, claim.name)
    if found is not None and claim.sha256 is not None and found.sha256 != claim.sha256:
        raise image_exists(claim.name, found.sha256)


def _settle(services: Services, upload: Upload, claim: _Claim) -> tuple[ImageView, bool]:
    with services.images.settling:
        stored = upload.finish(claim.format, claim.sha256)
        view = ImageView(
            name=claim.name,
            format=claim.format,
            architecture=claim.architecture,
            sha256=stored.sha256,
            size_bytes=stored.size_bytes,
            virtual_size_mib=stored.virtual_size_mib,
        )
        try:
            with services.database.write() as conn:
                return view, record_image(conn, view)
        except PpecError:
            _drop_if_unused(services, stored.sha256)
            raise


def _drop_if_unused(services: Services, sha256: str) -> None:
    with services.database.read() as conn:
        left = uses_of_content(conn, sha256)
    if not left:
        services.images.remove(sha256)
