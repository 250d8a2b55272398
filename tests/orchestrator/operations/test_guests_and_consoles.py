# SPDX-License-Identifier: Apache-2.0
"""Guests and consoles through the whole API, on simulated hosts: what comes through, who is let in, and every end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse
from structlog.testing import capture_logs

from ppec_contract.api_consoles import ConsoleEnd, ConsoleNotice
from ppec_contract.guest import GuestInfo
from ppec_contract.vm import VmState
from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.places import Places
from ppec_orchestrator.api.services import Services, make_services
from ppec_orchestrator.host_views.simulated import SimulatedViews
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.tables import allocation
from ppec_orchestrator.store.tokens import Role, create_token, remove_token


@dataclass
class Site:
    """One VM, `web`, in a world of simulated hosts, and the API in front of it."""

    world: Any
    services: Services
    views: SimulatedViews
    vm_id: UUID
    host: str
    clients: dict[str, TestClient]

    @property
    def operator(self) -> TestClient:
        return self.clients["operator"]

    def switch(self, state: VmState) -> None:
        """As the guest itself would, or somebody on its host."""
        mine = self.world.fleet.vms[self.host]
        mine[self.vm_id] = mine[self.vm_id].model_copy(update={"state": state})

    def write(self, data: bytes) -> None:
        self.views.consoles[self.vm_id] += data


@pytest.fixture
def make_site(world: Any, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """With settings, by name."""
    made: list[TestClient] = []

    def make(**settings: Any) -> Site:
        replica = world.replica()
        views = SimulatedViews(world.fleet)
        services = make_services(Settings(state_dir=tmp_path / "state", **settings), world.database)
        services = dataclasses.replace(services, operations=replica, host_views=views)
        app = create_app(services)
        with world.database.write() as conn:
            tokens = {role: create_token(conn, role.value, role, now=utc_now()) for role in Role}
        clients = {
            role.value: TestClient(app, headers={"Authorization": f"Bearer {token}"}) for role, token in tokens.items()
        }
        clients["nobody"] = TestClient(app)
        made.extend(clients.values())
        item = world.ended(replica.create(world.batch(1, name="web"), world.ask).operation_id).items[0]
        return Site(world, services, views, item.vm_id, item.host, clients)

    yield make
    for client in made:
        client.close()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


@dataclass
class Got:
    data: bytes = b""
    notices: list[ConsoleNotice] = field(default_factory=list)
    close_code: int = 0

    @property
    def end(self) -> ConsoleNotice:
        return self.notices[-1]

    @property
    def states(self) -> list[VmState]:
        return [notice.state for notice in self.notices if notice.state is not None]


def gather(socket: Any, got: Got, last: bytes = b"") -> Got:
    """Until `last` has come, or the server closes."""
    while not last or last not in got.data:
        message = socket.receive()
        if message["type"] == "websocket.close":
            got.close_code = message["code"]
            break
        if message.get("bytes") is not None:
            got.data += message["bytes"]
        else:
            got.notices.append(ConsoleNotice.model_validate_json(message["text"]))
    return got


@contextmanager
def console(site: Site, vm: str = "web", query: str = "") -> Iterator[Any]:
    """Left as a client leaves; the test's client would cancel the server's task at once."""
    with site.operator.websocket_connect(f"/v1/vms/{vm}/console{query}") as socket:
        yield socket
        socket.close()
        site.world.wait_until(lambda: site.views.lines == 0, "its lines are closed")


def denied(client: TestClient, vm: str = "web", query: str = "") -> dict[str, Any]:
    path = f"/v1/vms/{vm}/console{query}"
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(path):
        pass
    problem: dict[str, Any] = json.loads(refused.value.content)
    assert problem["status"] == refused.value.status_code
    return problem


def audited(logs: Any) -> list[dict[str, Any]]:
    return [line for line in logs if line["event"] == "audit" and line["action"].endswith("_console")]


# --- guests ----------------------------------------------------------------------------------------------------------


def test_a_guest_is_asked_of_its_host(site: Site) -> None:
    for vm in ("web", str(site.vm_id)):
        answer = site.clients["viewer"].get(f"/v1/vms/{vm}/guest", params={"timeout_s": 2})
        assert answer.status_code == 200, answer.text
        told = GuestInfo.model_validate(answer.json())
        assert (told.vm_id, told.hostname, told.agent_connected, told.frozen) == (site.vm_id, "web", True, False)
    frozen = site.operator.post("/v1/vms/actions", json={"action": "freeze", "vms": ["web"], "thaw_after_s": 5})
    assert (frozen.status_code, frozen.json()["kind"]) == (202, "vm.freeze")
    site.world.ended(frozen.json()["operation_id"])
    assert site.operator.get("/v1/vms/web/guest").json()["frozen"] is True
    assert site.views.lines == 0


def test_why_a_guest_can_t_be_asked(site: Site) -> None:
    def code(client: str = "viewer", path: str = "web/guest") -> tuple[int, str]:
        answer = site.clients[client].get(f"/v1/vms/{path}")
        return answer.status_code, answer.json()["code"]

    assert code("nobody") == (401, "auth.required")
    assert code(path="nope/guest") == (404, "vm.not_found")
    assert code(path="web/guest?timeout_s=31") == (422, "request.invalid")
    site.views.silent = {site.host}
    assert code() == (503, "host.unreachable")
    site.views.silent = set()
    gone = site.world.fleet.vms[site.host].pop(site.vm_id)
    assert code() == (404, "vm.not_found")
    site.world.fleet.vms[site.host][site.vm_id] = gone
    with site.services.database.write() as conn:
        conn.execute(allocation.delete())
    assert code() == (409, "vm.wrong_state")
    assert site.views.lines == 0


def test_questions_to_guests_have_a_bound(site: Site) -> None:
    services = dataclasses.replace(site.services, guest_queries=Places("questions", 0))
    client = TestClient(create_app(services), headers=site.operator.headers)
    assert client.get("/v1/vms/web/guest").json()["code"] == "orchestrator.busy"


# --- consoles --------------------------------------------------------------------------------------------------------


def test_what_is_typed_echoes_and_a_power_off_ends_it(site: Site) -> None:
    site.write(b"\x1b[1mlogin\xff: ")
    with console(site) as socket:
        got = gather(socket, Got(), b": ")
        assert (got.data, got.states) == (b"\x1b[1mlogin\xff: ", [VmState.RUNNING])
        typed = bytes(range(256)) * 40  # more than the agent takes in one call
        socket.send_bytes(typed)
        assert gather(socket, Got(), typed).data == typed
        site.write(b"Power down.")
        site.switch(VmState.STOPPED)
        rest = gather(socket, Got())
    assert rest.data == b"Power down."
    assert (rest.states, rest.end.ended, rest.close_code) == ([VmState.STOPPED], ConsoleEnd.VM_OFF, 1000)
    assert site.views.lines == 0


def test_a_console_may_be_open_before_its_vm_starts_and_a_reset_does_not_end_it(site: Site) -> None:
    site.switch(VmState.STOPPED)
    with console(site, query="?read_only=true") as socket:
        site.write(b"BIOS")
        assert gather(socket, Got(), b"BIOS").states == [VmState.STOPPED]
        site.switch(VmState.RUNNING)
        site.write(b"up")
        assert gather(socket, Got(), b"up").states == [VmState.RUNNING]
        reset = site.operator.post("/v1/vms/actions", json={"action": "reset", "vms": ["web"]}).json()
        site.world.ended(reset["operation_id"])
        site.write(b"again")
        assert gather(socket, Got(), b"again").notices == []


def test_without_follow_it_ends_with_what_is_there(site: Site) -> None:
    site.write(b"0123456789")
    with console(site, query="?follow=false&tail_bytes=4") as socket:
        got = gather(socket, Got())
    assert (got.data, got.end.ended, got.close_code) == (b"6789", ConsoleEnd.COMPLETE, 1000)


def test_every_other_end(site: Site) -> None:
    def ending(query: str, act: Callable[[Any], object]) -> tuple[ConsoleEnd | None, str, int]:
        with console(site, query=query) as socket:
            gather_first(socket)
            act(socket)
            got = gather(socket, Got())
        return got.end.ended, got.end.problem.code if got.end.problem else "", got.close_code

    def gather_first(socket: Any) -> None:
        assert ConsoleNotice.model_validate_json(socket.receive_text()).state is not None

    problem, typing = ConsoleEnd.PROBLEM, "?tail_bytes=0"
    assert ending("?read_only=1", lambda s: s.send_bytes(b"x")) == (problem, "request.invalid", 1011)
    assert ending(typing, lambda s: s.send_text("x")) == (problem, "request.invalid", 1011)
    assert ending(typing, lambda s: site.views.silent.add(site.host)) == (problem, "host.unreachable", 1011)
    site.views.silent.clear()
    site.switch(VmState.STOPPED)
    assert ending(typing, lambda s: s.send_bytes(b"x")) == (problem, "vm.wrong_state", 1011)
    gone = ending(typing, lambda s: site.world.fleet.vms[site.host].pop(site.vm_id))
    assert gone == (ConsoleEnd.VM_GONE, "", 1000)
    with console(site, str(site.vm_id)) as socket:
        assert gather(socket, Got()).end.problem.code == "vm.not_found"
    assert site.views.lines == 0


def test_one_that_is_quiet_for_long_ends(make_site: Callable[..., Site]) -> None:
    site = make_site(console_idle_s=1)
    with console(site) as socket:
        got = gather(socket, Got())
    assert (got.end.ended, got.close_code) == (ConsoleEnd.IDLE, 1000)


def test_who_may_open_one_and_which(site: Site) -> None:
    with capture_logs() as logs:
        assert denied(site.clients["nobody"])["code"] == "auth.required"
        assert denied(site.clients["viewer"])["code"] == "auth.forbidden"
        assert denied(site.clients["viewer"], query="?read_only=true")["code"] == "auth.forbidden"
    refusals = [(line["caller"], line["action"], line["outcome"], line["code"]) for line in audited(logs)]
    assert refusals == [("viewer", "open_console", "refused", "auth.forbidden")] * 2
    for vm, query, code in (
        ("nope", "", "vm.not_found"),
        ("x" * 64, "", "vm.not_found"),
        ("a%00b", "", "vm.not_found"),
        ("web", "?tail_bytes=262145", "request.invalid"),
        ("web", "?command=rm", "request.invalid"),
        ("web", "?tail_bytes=1&tail_bytes=2", "request.invalid"),
        ("web", "?tail_bytes=1&x=%ff", "request.invalid"),
    ):
        assert denied(site.operator, vm, query)["code"] == code, (vm, query)
    assert denied(site.operator, query="?command=rm")["hint"].endswith(": read_only, follow, tail_bytes.")
    assert site.views.lines == 0
    plain = site.operator.get("/v1/vms/web/console")
    assert (plain.status_code, plain.json()["code"]) == (422, "request.invalid")
    assert site.clients["viewer"].get("/v1/vms/web/console").json()["code"] == "auth.forbidden"


def test_no_more_are_open_than_may_be(make_site: Callable[..., Site]) -> None:
    site = make_site(max_consoles=1)
    with console(site) as socket:
        socket.receive_text()
        assert denied(site.operator)["code"] == "orchestrator.busy"
    with console(site) as socket:
        socket.receive_text()


def test_it_is_told_who_opened_whose_console_and_when_it_closed_but_not_a_byte_of_it(site: Site) -> None:
    with capture_logs() as logs:
        with console(site, str(site.vm_id)) as socket:
            socket.send_bytes(b"hunter2")
            gather(socket, Got(), b"hunter2")
        with console(site, query="?follow=false&read_only=true") as socket:
            gather(socket, Got())
    told = [
        {name: line.get(name) for name in ("caller", "action", "asked", "subject", "why")} for line in audited(logs)
    ]
    who = {"caller": "operator", "subject": "web"}
    assert told == [
        {**who, "action": "open_console", "asked": "read_and_type", "why": None},
        {**who, "action": "close_console", "asked": None, "why": "client_left"},
        {**who, "action": "open_console", "asked": "read_only", "why": None},
        {**who, "action": "close_console", "asked": None, "why": "complete"},
    ]
    assert [(line["typed_bytes"], line["shown_bytes"]) for line in audited(logs)[1::2]] == [("7", "7"), ("0", "7")]
    assert "hunter2" not in str(logs)


def test_a_revoked_token_ends_what_it_opened(site: Site) -> None:
    with console(site) as socket:
        socket.receive_text()
        with site.services.database.write() as conn:
            remove_token(conn, "operator")
        got = gather(socket, Got())
    assert (got.end.ended, got.close_code) == (ConsoleEnd.UNAUTHORISED, 1008)


def test_a_client_that_leaves_frees_its_lines(site: Site) -> None:
    for _ in range(3):
        with console(site) as socket:
            socket.receive_text()
            assert site.views.lines == 2
