# SPDX-License-Identifier: Apache-2.0
"""What may wait has threads of its own: hosts and readers are answered meanwhile, and too many are told so."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest
from fastapi.testclient import TestClient
from test_hosts_and_reports import HOST, STARTED, report

from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.errors import PpecError
from ppec_contract.host import HostReport
from ppec_lab.conditions import wait_until
from ppec_orchestrator.api.app import ROUTERS
from ppec_orchestrator.api.bulkheads import CHANGES, PLANNING, Bulkhead, BulkheadRoute
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.dispatch.simulated import SimulatedDispatcher, SimulatedFleet
from ppec_orchestrator.ipdb.provider import BuiltIn
from ppec_orchestrator.operations.context import Ports
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.operations.service import Operations

# More than the common pool has threads.
MANY = 45
COMMON_POOL = 40


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """The same on every database: one is enough."""
    return sqlite_url


class SilentKeeper(BuiltIn):
    """Keeps addresses, and whoever asks for some waits until it answers."""

    def __init__(self) -> None:
        self.answers = threading.Event()

    def prepare(self, networks: Sequence[NetworkWanted], vrf: str | None = None) -> None:
        self.answers.wait(60)


@pytest.fixture
def keeper() -> Iterator[SilentKeeper]:
    made = SilentKeeper()
    yield made
    made.answers.set()


@pytest.fixture
def services(services: Services, keeper: SilentKeeper) -> Services:
    ports = Ports(
        database=services.database,
        dispatcher=SimulatedDispatcher(SimulatedFleet()),
        planning=Planning(services.database, silent_after_s=3600, now=services.now),
        image_url=str,
        now=services.now,
        addresses=keeper,
    )
    return dataclasses.replace(services, operations=Operations(ports))


@pytest.fixture
def everybody(ipv4_site: TestClient, host_client: Callable[[str], TestClient]) -> Iterator[TestClient]:
    """The host h1 and an admin in one, on one event loop."""
    assert ipv4_site.post("/v1/hosts", json=HOST).status_code == 201
    with host_client("h1") as client:
        client.headers["Authorization"] = ipv4_site.headers["Authorization"]
        yield client


@contextmanager
def silent_keeper(services: Services, keeper: SilentKeeper) -> Iterator[None]:
    try:
        yield
    finally:
        keeper.answers.set()


@contextmanager
def images_being_settled(services: Services, keeper: SilentKeeper) -> Iterator[None]:
    with services.images.settling:
        yield


# By number, so that they are asked for first.
ADDRESS = {"address": "10.0.0.5"}
CREATE = ("POST", "/v1/vms", {"flavor": "none", "image": "none", "name": "web", "networks": [ADDRESS]})
DELETE = ("DELETE", "/v1/images/none", None)


def waiting_threads() -> int:
    return sum(thread.name == "AnyIO worker thread" for thread in threading.enumerate())


@pytest.mark.parametrize(("held_up", "change"), [(silent_keeper, CREATE), (images_being_settled, DELETE)])
def test_hosts_and_readers_do_not_wait_behind_changes(
    everybody: TestClient,
    services: Services,
    keeper: SilentKeeper,
    held_up: Callable[[Services, SilentKeeper], AbstractContextManager[None]],
    change: tuple[str, str, object],
) -> None:
    method, path, body = change
    told = {"agent_started_at_unix_ms": STARTED, "sequence": 1, "report": report()}
    beat = {**told, "sequence": 2, "digest": HostReport.model_validate(report()).digest()}
    del beat["report"]
    with ThreadPoolExecutor(MANY + 1) as pool:
        with held_up(services, keeper):
            changes = [pool.submit(everybody.request, method, path, json=body) for _ in range(MANY)]
            wait_until(lambda: waiting_threads() >= COMMON_POOL, "as many wait as the pool has threads", timeout_s=30)
            for ask, status in (
                (lambda: everybody.put("/v1/hosts/h1/report", json=told), 200),
                (lambda: everybody.post("/v1/hosts/h1/heartbeat", json=beat), 200),
                (lambda: everybody.get("/v1/vms"), 200),
                (lambda: everybody.get("/v1/vms", headers={"Authorization": "Bearer unknown"}), 401),
            ):
                assert pool.submit(ask).result(20).status_code == status
            assert [change for change in changes if change.done()] == []
        assert {change.result(60).status_code for change in changes} == {404}


def test_only_what_changes_something_may_be_let_wait() -> None:
    routes = [route for router in ROUTERS for route in router.routes]
    of = {bulkhead: set[str]() for bulkhead in (PLANNING, CHANGES)}
    for route in routes:
        if isinstance(route, BulkheadRoute) and route.bulkhead is not None:
            of[route.bulkhead].add(route.name)
    assert of[PLANNING] == {"create_vms", "create_plan", "execute_plan"}
    assert {"act_on_vms", "resize_vm", "retune_host", "delete_image", "create_prefix"} < of[CHANGES]
    by_hosts = {"put_report", "patch_report", "post_heartbeat"}
    changing = {route.name for route in routes if {"POST", "PUT", "PATCH", "DELETE"} & getattr(route, "methods", set())}
    assert of[PLANNING] | of[CHANGES] == changing - by_hosts


def test_more_than_may_wait_are_told_so_and_all_others_had_their_turn() -> None:
    bulkhead, go = Bulkhead("tests", threads=2, most_waiting=3), threading.Event()
    begun, threads = threading.Semaphore(0), set[int]()

    def work() -> bool:
        threads.add(threading.get_ident())
        begun.release()
        return go.wait(60)

    async def crowd() -> list[object]:
        inside = [asyncio.create_task(bulkhead.run(work)) for _ in range(5)]
        for _ in range(2):
            await asyncio.to_thread(begun.acquire)
        with pytest.raises(PpecError) as refused:
            await bulkhead.run(work)
        assert (refused.value.code, refused.value.problem().status) == ("orchestrator.busy", 503)
        assert refused.value.message == "2 tests are under way and 3 wait, and no more than that may"
        assert not begun.acquire(blocking=False), "the others have no threads"
        go.set()
        return [*await asyncio.gather(*inside), await bulkhead.run(work)]

    assert asyncio.run(crowd()) == [True] * 6
    assert len(threads) == 2
