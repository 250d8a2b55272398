# SPDX-License-Identifier: Apache-2.0
"""An image's source that is away for a while costs tries; one that refuses costs the fetch, at once."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from ppec_agentd.images import CachedImage, FetchLimits, ImageCache
from ppec_agentd.settings import TlsSettings
from ppec_contract.errors import PpecError
from ppec_contract.vm import ImageSource
from ppec_lab.conditions import wait_until

CONTENT = random.Random(2).randbytes(2 * 1024 * 1024 + 17)
CHANGED = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
QUICK = FetchLimits(timeout_s=60, away_s=60, first_pause_s=0.01, longest_pause_s=0.05)
# Whoever waits for the next try waits for as long as the test runs.
PATIENT = replace(QUICK, first_pause_s=3600, longest_pause_s=3600, timeout_s=7200, away_s=7200)


def image_at(url: str) -> ImageSource:
    fields = {"name": "debian", "sha256": hashlib.sha256(CONTENT).hexdigest(), "size_bytes": len(CONTENT)}
    return ImageSource.model_validate({**fields, "format": "raw", "url": url})


class Fetching:
    """One image cache whose image comes from `server`, at /image."""

    def __init__(self, folder: Path, server: Any) -> None:
        self.server = server
        self.folder = folder / "images"
        self.image = image_at(f"{server.url}/image")
        server.files["/image"] = CONTENT

    def cache(self, limits: FetchLimits = QUICK) -> ImageCache:
        return ImageCache(self.folder, TlsSettings.model_validate(self.server.tls), limits)

    def fetch(self, limits: FetchLimits = QUICK) -> CachedImage:
        async def scenario() -> CachedImage:
            return await self.cache(limits).ensure(self.image)

        return asyncio.run(scenario())

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def fetching(tmp_path: Path, orchestrator: Callable[..., Any]) -> Fetching:
    return Fetching(tmp_path, orchestrator())


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    before = structlog.get_config()
    structlog.reset_defaults()
    with capture_logs() as entries:
        yield entries
    structlog.configure(**before)


def times_away(logs: list[Any]) -> int:
    return sum(entry["event"] == "image_source_away" for entry in logs)


async def away(logs: list[Any], times: int = 1) -> None:
    found = f"the source is found away {times} times"
    await asyncio.to_thread(wait_until, lambda: times_away(logs) >= times, found, timeout_s=60)


@pytest.mark.parametrize("trouble", ["cut", 502, 503, 504])
def test_what_passes_is_tried_again(fetching: Fetching, logs: list[Any], trouble: Any) -> None:
    fetching.server.troubles = [trouble, trouble]
    assert fetching.fetch().path.read_bytes() == CONTENT
    assert len(fetching.server.requests) == 3
    assert times_away(logs) == 2
    assert fetching.left() == [f"{fetching.image.sha256}.raw", f"{fetching.image.sha256}.raw.verified"]


def test_a_server_that_is_down_is_waited_for(fetching: Fetching, logs: list[Any]) -> None:
    fetching.server.close()

    async def scenario() -> CachedImage:
        flight = asyncio.create_task(fetching.cache().ensure(fetching.image))
        await away(logs, times=3)
        assert not flight.done()
        # Another try may be under way.
        nothing = "nothing of a failed try is kept"
        await asyncio.to_thread(wait_until, lambda: fetching.left() == [], nothing, timeout_s=60, every_s=0.001)
        fetching.server.open()
        return await flight

    assert asyncio.run(scenario()).path.read_bytes() == CONTENT
    assert len(fetching.server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 500])
def test_a_refusal_is_not_repeated(fetching: Fetching, logs: list[Any], status: int) -> None:
    fetching.server.troubles = [status]
    with pytest.raises(PpecError, match=f"the server answered {status}") as failed:
        fetching.fetch()
    assert failed.value.code == "image.fetch_failed"
    assert len(fetching.server.requests) == 1
    assert times_away(logs) == 0


@pytest.mark.parametrize("served", [CONTENT[:-1], CHANGED], ids=["shorter", "changed"])
def test_a_whole_body_that_is_not_the_image_is_not_asked_for_again(fetching: Fetching, served: bytes) -> None:
    fetching.server.files["/image"] = served
    with pytest.raises(PpecError) as failed:
        fetching.fetch()
    assert failed.value.code == "image.checksum_mismatch"
    assert len(fetching.server.requests) == 1


def test_who_is_not_the_orchestrator_is_not_asked_again(
    fetching: Fetching, orchestrator: Callable[..., Any], logs: list[Any]
) -> None:
    stranger = orchestrator()
    fetching.image = image_at(f"{stranger.url}/image")
    with pytest.raises(PpecError, match="certificate verify failed"):
        fetching.fetch()
    fetching.server = orchestrator("ppec://host/h2")
    fetching.image = image_at(f"{fetching.server.url}/image")
    with pytest.raises(PpecError, match="wanted ppec://orchestrator/main"):
        fetching.fetch()
    assert times_away(logs) == 0


def test_a_local_file_is_not_waited_for(fetching: Fetching, logs: list[Any], tmp_path: Path) -> None:
    fetching.image = image_at((tmp_path / "absent").as_uri())
    with pytest.raises(PpecError, match="No such file"):
        fetching.fetch()
    assert times_away(logs) == 0


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        # The try at the very end has no time to be refused in.
        (replace(QUICK, timeout_s=0.3), "not done in 0.3 s: .*(refused|timed out); tries: "),
        (replace(PATIENT, timeout_s=0.3), "not done in 0.3 s: .*(refused|timed out); tries: "),
        (replace(QUICK, away_s=0.3), "refused; tries: "),
    ],
    ids=["timeout", "timeout in mid-pause", "away too long"],
)
def test_a_server_that_stays_away_ends_the_fetch(fetching: Fetching, limits: FetchLimits, said: str) -> None:
    fetching.server.close()
    with pytest.raises(PpecError, match=said) as failed:
        fetching.fetch(limits)
    assert failed.value.code == "image.fetch_failed"
    assert fetching.left() == []


def test_a_server_that_falls_silent_ends_the_fetch_in_its_time(fetching: Fetching) -> None:
    # The test's own limit is far below the silence a connection is allowed.
    fetching.server.troubles = ["silent"]
    with pytest.raises(PpecError, match=r"not done in 0.5 s"):
        fetching.fetch(replace(QUICK, timeout_s=0.5))
    assert not fetching.server.closed.is_set()
    assert fetching.left() == []


@pytest.mark.timeout(60)
def test_closing_ends_a_fetch_that_waits_for_its_next_try(fetching: Fetching, logs: list[Any]) -> None:
    fetching.server.close()

    async def scenario() -> None:
        cache = fetching.cache(PATIENT)
        flight = asyncio.create_task(cache.ensure(fetching.image))
        await away(logs)
        cache.close()
        with pytest.raises(PpecError, match="the agent stops"):
            await flight

    asyncio.run(scenario())
    assert fetching.left() == []


def test_images_that_are_here_do_not_wait_behind_those_whose_source_is_away(
    fetching: Fetching, logs: list[Any]
) -> None:
    here = fetching.fetch()
    fetching.server.close()

    async def scenario() -> None:
        cache = fetching.cache(PATIENT)
        absent = [fetching.image.model_copy(update={"sha256": f"{number:064x}"}) for number in range(20)]
        flights = [asyncio.create_task(cache.ensure(image)) for image in absent]
        await away(logs)
        assert await cache.ensure(fetching.image) == here
        cache.close()
        ended = await asyncio.gather(*flights, return_exceptions=True)
        assert not any(isinstance(one, CachedImage) for one in ended)

    asyncio.run(scenario())
