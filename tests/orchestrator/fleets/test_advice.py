# SPDX-License-Identifier: Apache-2.0
"""On fleets in files, what refused VMs are told makes them fit; rules are called what the file calls them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ppec_contract.api_placement import Policy
from ppec_orchestrator.fleets.advice import advice_on
from ppec_orchestrator.fleets.file import FleetFile
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.fleets.reading import read_fleet, read_requests
from ppec_orchestrator.placement.advice import Adviser, helps, refused_by_kind
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.change_views import views
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import Level, PlanRequest, Spare, SpareRule

from .test_bench_cluster import CLUSTER

GOLDEN = Path(__file__).parent / "golden" / "fleet.json"
NO_RULE = SpareRule()
# As many kinds of each plan are tried.
KINDS = 8


def a_crowded_fleet(seed: int) -> FleetFile:
    """Of all that generated fleets have, some hosts that drain, and a prefix that runs out in one cluster."""
    file = generate(Recipe(30, 2, seed, fill=0.97, spread=0.01, requests=40, apart=seed % 2 > 0, varied=True))
    hosts = [
        replace(host, draining=row % 7 == 3, prefixes=((1,), (2,)) if host.cluster == "g000" else ((3,),))
        for row, host in enumerate(file.fleet.hosts)
    ]
    return replace(file, fleet=Fleet.build(hosts, {2: 5, 3: 40}))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("spare", [NO_RULE, SpareRule(Spare.REQUIRED), SpareRule(Spare.REQUIRED, Level.RACK)])
def test_each_change_makes_the_vm_fit(seed: int, policy: Policy, spare: SpareRule) -> None:
    file = a_crowded_fleet(seed)
    moves = 2 if seed % 3 == 0 and spare.mode is Spare.OFF else 0
    request = PlanRequest(file.requests, policy, all_or_nothing=seed % 4 == 1, spare=spare, most_moves=moves)
    made = plan(file.fleet, request)
    after = applied(file.fleet, file.requests, made)
    adviser, tried = Adviser(after), 0
    for vm, _ in refused_by_kind(file.requests, made)[:KINDS]:
        offered = adviser.advise(vm, spare)
        assert [change for change in offered if not helps(change, after, vm, spare)] == []
        tried += len(offered)
    assert tried > 0


def test_all_kinds_of_changes_are_found_on_made_up_fleets() -> None:
    """Or the test above would not have tried them."""
    found: Counter[str] = Counter()
    for seed in range(6):
        file = a_crowded_fleet(seed)
        request = PlanRequest(file.requests, Policy.PACK)
        kinds = advice_on(file.fleet, request, plan(file.fleet, request), file.called, most=20)
        found.update(change.kind for kind in kinds for change in kind.changes)
    assert set(found) == {"give-up", "end-drain", "retune", "add-addresses", "other-size", "free-room", "several"}


def test_vms_alike_are_told_alike_and_only_the_first_kinds_are() -> None:
    file = generate(Recipe(4, 1, seed=2, fill=0.9, requests=60, apart=False))
    request = PlanRequest(file.requests, Policy.PACK)
    made = plan(file.fleet, request)
    profiles = {vm.vm_id: vm.profile for vm in file.requests}
    refused = list(dict.fromkeys(profiles[each.vm_id] for each in made.refused))
    advice = advice_on(file.fleet, request, made, file.called, most=2)
    assert [{profiles[each.vm_id] for each in kind.refusals} for kind in advice] == [{refused[0]}, {refused[1]}]
    for kind, profile in zip(advice, refused, strict=False):
        assert kind.refusals == tuple(each for each in made.refused if profiles[each.vm_id] == profile)
        assert kind.changes
    assert len(refused) > 2
    assert advice_on(file.fleet, request, made, file.called, most=0) == ()


# --- words -----------------------------------------------------------------------------------------------------------


def rules_told(file: FleetFile, spare: SpareRule = NO_RULE) -> set[str]:
    request = PlanRequest(file.requests, Policy.PACK, spare=spare)
    kinds = advice_on(file.fleet, request, plan(file.fleet, request), file.called, most=10)
    told = [change.details["rules"] for kind in kinds for change in kind.changes if change.kind == "give-up"]
    return {rule for rules in told for rule in rules}


def test_with_n_plus_one_no_more_kinds_are_advised_than_there_is_work_for(monkeypatch: pytest.MonkeyPatch) -> None:
    file = a_crowded_fleet(1)
    request = PlanRequest(file.requests, Policy.PACK, spare=SpareRule(Spare.REQUIRED))
    made = plan(file.fleet, request)
    assert len(refused_by_kind(file.requests, made)) > 2
    monkeypatch.setattr("ppec_orchestrator.fleets.advice.MOST_TRIED_IN_ALL", 1)
    first, *others = advice_on(file.fleet, request, made, file.called, most=10)
    assert first.changes
    assert others == []


def test_rules_are_called_what_the_snapshot_calls_them() -> None:
    document = json.loads(GOLDEN.read_text())
    document["hosts"] = document["hosts"][1:]
    document["hosts"][0] |= {"live": True, "draining": False, "capabilities": ["vm-policies"], "rack": "r1"}
    file = read_fleet(json.dumps(document).encode(), "it")
    assert rules_told(file) == {"labels"}
    labels = document["profiles"][1]["where"].pop("labels")
    document["hosts"][0]["labels"] = dict(labels)
    document["requests"]["batch"][0]["excluded_hosts"] = ["h2"]
    assert rules_told(read_fleet(json.dumps(document).encode(), "it")) == {"excluded_hosts"}
    document["requests"]["batch"][0]["excluded_hosts"] = []
    document["profiles"][1]["shape"]["vcpus"] = 32
    document["hosts"][0]["cells"].append(document["hosts"][0]["cells"][0] | {"cell": 1})
    assert rules_told(read_fleet(json.dumps(document).encode(), "it")) == {"numa.multi_cell"}


def test_rules_are_called_what_a_bench_cluster_calls_them() -> None:
    wide = {"name": "wide", "weight": 1, "vcpus": 20, "mem_mib": 1024, "disk_mib": 10}
    document = CLUSTER | {
        "flavours": [*CLUSTER["flavours"], wide],
        "hosts": [{key: value for key, value in host.items() if key != "free"} for host in CLUSTER["hosts"]],
        "vms": [],
        "requests": {"batch": [{"name": "x", "flavour": "wide"}]},
    }
    file = read_fleet(json.dumps(document).encode(), "it")
    assert rules_told(file) == {"rules.vm_fits_one_socket"}
    batch = [{"name": "x", "profile": "wide"}]
    own = json.dumps({"schema": "ppec-requests/1", "batch": batch}).encode()
    assert rules_told(read_requests(own, "own", file)) == {"numa.multi_cell"}
    spared = read_requests(b'{"batch": [{"name": "x", "flavour": "c8"}]}', "more", file)
    alone = replace(spared, fleet=Fleet.build(spared.fleet.hosts[:1]))
    assert rules_told(alone, SpareRule(Spare.REQUIRED)) == {"n_plus_one"}


def test_what_is_told_are_the_cheapest_changes_as_the_api_tells_them() -> None:
    file = a_crowded_fleet(1)
    request = PlanRequest(file.requests, Policy.PACK)
    made = plan(file.fleet, request)
    after = applied(file.fleet, file.requests, made)
    for kind, (vm, refusals) in zip(
        advice_on(file.fleet, request, made, {}, most=3), refused_by_kind(file.requests, made), strict=False
    ):
        assert kind.refusals == tuple(refusals)
        assert kind.changes == views(Adviser(after).advise(vm), {})
