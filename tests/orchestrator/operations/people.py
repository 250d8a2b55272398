# SPDX-License-Identifier: Apache-2.0
"""Who makes, looks at and approves plans: a client of the API for each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from plan_requests import BODY
from sqlalchemy import func, select
from starlette.testclient import TestClient

from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.services import make_services
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.tokens import Role, create_token

SECRET = "#cloud-config\npassword: hunter2\n"


class People:
    """An orchestrator, and a client of it for each of these."""

    def __init__(self, world: Any, state: Path, replica: str = "one", **of_replica: Any) -> None:
        services = dataclasses.replace(
            make_services(Settings(state_dir=state), world.database), operations=world.replica(replica, **of_replica)
        )
        self.app = create_app(services)
        roles = {"checker": Role.OPERATOR, "third": Role.OPERATOR, "admin": Role.ADMIN, "viewer": Role.VIEWER}
        with world.database.write() as conn:
            tokens = {
                name: create_token(conn, name, role, now=utc_now())
                for name, role in {"maker": Role.OPERATOR, **roles}.items()
            }
        self.clients = {name: self._client(token) for name, token in tokens.items()}
        self.maker, self.checker, self.third = (self.clients[name] for name in ("maker", "checker", "third"))

    def _client(self, token: str) -> TestClient:
        headers = {"Authorization": f"Bearer {token}"}
        return TestClient(self.app, headers=headers, raise_server_exceptions=False)

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    def plan(self, client: TestClient | None = None, **body: Any) -> dict[str, Any]:
        answer = (client or self.maker).post("/v1/plans", json=BODY | body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        assert found["executable"]
        return found

    def approve(self, plan: dict[str, Any], client: TestClient | None = None) -> dict[str, Any]:
        answer = (client or self.checker).post(f"/v1/plans/{plan['plan_id']}/approve")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def execute(self, plan: dict[str, Any], client: TestClient | None = None, key: str | None = None) -> Any:
        headers = {"Idempotency-Key": key} if key else {}
        return (client or self.maker).post(f"/v1/plans/{plan['plan_id']}/execute", headers=headers)

    def listed(self, **query: str) -> list[str]:
        answer = self.checker.get("/v1/plans", params=query)
        assert answer.status_code == 200, answer.text
        return [one["plan_id"] for one in answer.json()["items"]]

    def state(self, plan: dict[str, Any]) -> tuple[str, str | None]:
        found = self.checker.get(f"/v1/plans/{plan['plan_id']}").json()
        return found["state"], found["approved_by"]


def vms(people: People) -> dict[str, tuple[str, list[int]]]:
    return {vm["name"]: (vm["host"], vm["cells"]) for vm in people.maker.get("/v1/vms").json()["items"]}


def operations(world: Any) -> int:
    with world.database.read() as conn:
        return int(conn.execute(select(func.count()).select_from(tables.operation)).scalar_one())


def disturb(people: People, world: Any, plan: dict[str, Any]) -> None:
    """A VM comes to the first host of the plan."""
    answer = people.third.post("/v1/vms", json=BODY | {"name": "between", "host": plan["placed"][0]["host"]})
    assert answer.status_code == 202, answer.text
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
