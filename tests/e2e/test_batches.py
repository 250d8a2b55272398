# SPDX-License-Identifier: Apache-2.0
"""Batches through the whole chain: work counts, batches that don't fit, hostile text, idempotency."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.local_cloud import LocalCloud

pytestmark = pytest.mark.slow


@pytest.fixture
def cloud(shared_local_cloud: LocalCloud) -> Iterator[LocalCloud]:
    """Empty before the test, and emptied after it."""
    assert_nothing_left(shared_local_cloud)
    yield shared_local_cloud
    delete_all(shared_local_cloud)
    assert_nothing_left(shared_local_cloud)


def delete_all(cloud: LocalCloud) -> None:
    names = [vm["vm_id"] for vm in cloud.vms()]
    if not names:
        return
    operation = cloud.orchestrator.request("POST", "/v1/vms/actions", {"action": "delete", "vms": names})
    assert cloud.ended(operation["operation_id"])["state"] == "succeeded"


def assert_nothing_left(cloud: LocalCloud) -> None:
    assert cloud.vms() == []
    assert cloud.addresses_in_use() == set()
    assert all(ids == [] for ids in cloud.domains().values())
    for host in cloud.hosts:
        assert list(host.vm_folders()) == []


def test_a_batch_costs_one_run_one_plan_and_few_commits(cloud: LocalCloud) -> None:
    ended = cloud.ended(cloud.create(count=6, policy="spread")["operation_id"])
    assert ended["state"] == "succeeded", ended
    hosts = {item["host"] for item in ended["items"]}
    assert hosts == {"h1", "h2"}
    counters = ended["counters"]
    assert counters["runs"] == 1
    assert counters["planning_passes"] == 1
    assert counters["host_tasks"] <= len(hosts) + 1
    assert counters["commits"] <= 3 + len(hosts)
    assert counters["proxy_sessions"] <= len(hosts)


def test_a_batch_that_does_not_fit_whole_is_refused_whole_or_made_in_part(cloud: LocalCloud) -> None:
    refused = cloud.create(count=9, mode="all-or-nothing")
    assert refused["code"] == "placement.no_capacity"
    assert refused["status"] == 409
    assert "cores" in str(refused["details"])
    assert cloud.vms() == []
    assert cloud.addresses_in_use() == set()

    ended = cloud.ended(cloud.create(count=9, mode="best-effort")["operation_id"])
    assert ended["state"] == "partial"
    states = [item["state"] for item in ended["items"]]
    assert (states.count("succeeded"), states.count("refused")) == (8, 1)
    problem = next(item["problem"] for item in ended["items"] if item["state"] == "refused")
    assert problem["code"] == "placement.no_capacity"
    assert "2 hosts" in problem["detail"]
    assert sum(map(len, cloud.domains().values())) == 8
    assert len(cloud.addresses_in_use()) == 8


def test_hostile_text_is_refused_or_carried_through_and_never_evaluated(cloud: LocalCloud, tmp_path: Path) -> None:
    canary = tmp_path / "evaluated"
    lookup = f"{{{{ lookup('pipe', 'touch {canary}') }}}}"
    assert cloud.create(name=lookup)["code"] == "request.invalid"
    user_data = f'#cloud-config\n# {lookup}\nruncmd:\n  - echo "{{{{ ds.meta_data }}}}" $(touch {canary}) </domain>\n'
    labels = {"note": lookup, "{{ 7*7 }}": "<x>&amp;$(id)`id`"}
    ended = cloud.ended(cloud.create(name="tricky", user_data=user_data, labels=labels)["operation_id"])
    assert ended["state"] == "succeeded", ended
    (vm,) = cloud.vms()
    assert vm["labels"] == labels
    (seed,) = [path for host in cloud.hosts for path in host.seeds()]
    assert user_data.encode() in seed.read_bytes()
    assert not canary.exists()


BAD_REQUESTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"flavor": "nope"}, "flavor.not_found"),
    ({"image": "nope"}, "image.not_found"),
    ({"count": 0}, "request.invalid"),
    ({"count": 10**6}, "request.invalid"),
    ({"surprise": 1}, "request.invalid"),
    ({"name": "../../etc/passwd"}, "request.invalid"),
    ({"host": "nope"}, "host.not_found"),
)


def test_bad_requests_get_their_code_and_change_nothing(cloud: LocalCloud) -> None:
    for body, code in BAD_REQUESTS:
        answer = cloud.create(**body)
        assert answer["code"] == code, body
        assert "Traceback" not in str(answer)
    assert cloud.vms() == []
    assert cloud.addresses_in_use() == set()


def test_a_repeated_request_with_its_key_makes_no_second_vm(cloud: LocalCloud) -> None:
    key = {"Idempotency-Key": "order-4711"}
    body = {"flavor": "small", "image": "empty", "name": "once"}
    first = cloud.orchestrator.request("POST", "/v1/vms", body, headers=key)
    again = cloud.orchestrator.request("POST", "/v1/vms", body, headers=key)
    other = cloud.orchestrator.request("POST", "/v1/vms", {**body, "name": "twice"}, headers=key)
    assert first["operation_id"] == again["operation_id"]
    assert other["code"] == "request.idempotency_mismatch"
    cloud.ended(first["operation_id"])
    assert [vm["name"] for vm in cloud.vms()] == ["once"]


def observed(cloud: LocalCloud, name: str) -> str:
    return str(cloud.orchestrator.ppec("vm", "show", name)["observed"])


def test_stop_and_start_change_what_is_observed(cloud: LocalCloud) -> None:
    cloud.ended(cloud.create(name="pet")["operation_id"])
    for action, state in (("stop", "stopped"), ("start", "running")):
        operation = cloud.orchestrator.request("POST", "/v1/vms/actions", {"action": action, "vms": ["pet"]})
        assert cloud.ended(operation["operation_id"])["state"] == "succeeded"
        assert observed(cloud, "pet") == state
