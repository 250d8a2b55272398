# SPDX-License-Identifier: Apache-2.0
"""Images: a name for a content. A name's content never changes; import another name in its place."""

from __future__ import annotations

from sqlalchemy import Connection, func, insert, select
from sqlalchemy.exc import IntegrityError

from ppec_contract.api_catalogue import ImageView
from ppec_contract.errors import PpecError
from ppec_orchestrator.store.catalogue import Catalogue
from ppec_orchestrator.store.faults import is_unique_violation
from ppec_orchestrator.store.tables import image

IMAGES = Catalogue(code="image", word="image", table=image, view=ImageView)


def find_image(conn: Connection, name: str) -> ImageView | None:
    row = conn.execute(select(image).where(image.c.name == name)).one_or_none()
    if row is None:
        return None
    return ImageView(**{field: row._mapping[field] for field in ImageView.model_fields})


def record_image(conn: Connection, wanted: ImageView) -> bool:
    """True when the image is new, False when this very one is there already; else raises `image.exists`."""
    found = find_image(conn, wanted.name)
    if found == wanted:
        return False
    if found is not None:
        raise image_exists(wanted.name, found.sha256)
    try:
        conn.execute(insert(image).values(wanted.model_dump()))
    except IntegrityError as error:
        if not is_unique_violation(error):
            raise
        raise image_exists(wanted.name, "another's") from error
    return True


def image_exists(name: str, sha256: str) -> PpecError:
    return PpecError(
        "image.exists",
        f"image {name!r} exists as another file or kind (sha256 {sha256})",
        hint="Import it under another name, or delete the old one.",
        subject=f"image {name}",
    )


def uses_of_content(conn: Connection, sha256: str) -> int:
    """How many images have this content."""
    return conn.execute(select(func.count()).select_from(image).where(image.c.sha256 == sha256)).scalar_one()
