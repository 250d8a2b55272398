# SPDX-License-Identifier: Apache-2.0
"""Where an image's bytes come from: a local file, or the orchestrator. One try, told apart by how it failed.

`SourceAwayError` is the orchestrator being restarted: the same try a moment later may well work. Everything else
(`image.fetch_failed`) would only fail again.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ppec_agentd.orchestrator_link import OrchestratorLink, is_away
from ppec_agentd.settings import TlsSettings
from ppec_contract.errors import PpecError
from ppec_contract.vm import ImageSource

CHUNK_BYTES = 1024 * 1024
# A connection that brings nothing for so long is lost.
SILENCE_S = 60.0
# What stands before an orchestrator that is not there, or it itself while it comes and goes, answers so.
AWAY_STATUSES = frozenset({502, 503, 504})


class SourceAwayError(Exception):
    """The source was not there, or left in mid-body; the text says how."""


def image_chunks(image: ImageSource, tls: TlsSettings, end_s: float) -> Generator[bytes, None, None]:
    """One try at the image's bytes, whatever they are: the caller counts and hashes them.

    No wait for the network goes beyond `end_s` (of `time.monotonic`). Raises SourceAwayError, `image.fetch_failed`.
    """
    parts = urlsplit(image.url)
    if parts.scheme == "file":
        yield from _file_chunks(Path(unquote(parts.path)), image)
        return
    link = OrchestratorLink(image.url, tls, _patience_s(end_s))
    try:
        yield from _body(link, parts.path + (f"?{parts.query}" if parts.query else ""), image, end_s)
    except (OSError, http.client.HTTPException) as error:
        if is_away(error):
            raise SourceAwayError(str(error) or type(error).__name__) from error
        raise unfetched(image, str(error)) from error
    except PpecError as error:
        raise error if error.code.startswith("image.") else unfetched(image, error.message) from error
    finally:
        link.close()


def _body(link: OrchestratorLink, target: str, image: ImageSource, end_s: float) -> Iterator[bytes]:
    answer = link.request("GET", target or "/")
    if answer.status in AWAY_STATUSES:
        raise SourceAwayError(f"the server answered {answer.status}")
    if answer.status != 200:
        raise unfetched(image, f"the server answered {answer.status}")
    while True:
        link.limit_waits(_patience_s(end_s))
        # One read of the socket: `read` would wait until a chunk is full, each wait with the whole limit.
        chunk = answer.read1(CHUNK_BYTES)
        if not chunk:
            break
        yield chunk
    # What the announced length still lacks; http.client keeps silent about a body cut short.
    if answer.length:
        raise SourceAwayError(f"the connection was lost {answer.length} bytes before the end")


def _patience_s(end_s: float) -> float:
    # Zero would mean: don't wait at all, and fail in yet another way.
    return min(max(end_s - time.monotonic(), 0.001), SILENCE_S)


def _file_chunks(path: Path, image: ImageSource) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise unfetched(image, f"{path}: {error.strerror}") from error


def unfetched(image: ImageSource, why: str) -> PpecError:
    return PpecError(
        "image.fetch_failed", f"image {image.name} could not be fetched: {why}", subject=f"image {image.name}"
    )
