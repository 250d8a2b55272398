# SPDX-License-Identifier: Apache-2.0
"""What every model of the contract has in common, and what the words mean at their edges."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import StringConstraints, TypeAdapter, ValidationError

import ppec_contract
from ppec_contract.agent import METHODS, ChangingAction, CreateVms, StopVms
from ppec_contract.api_catalogue import FlavorCreate
from ppec_contract.api_operations import OperationState
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import BatchMode, VmsCreate
from ppec_contract.errors import PpecError
from ppec_contract.model import PATTERNS_IN_WORDS, Model, canonical_json, digest
from ppec_contract.validation import in_words, parse
from ppec_contract.vm import MAX_VCPUS, VmSpec

GOLDEN = Path(__file__).parent / "golden" / "agent_methods.json"
SPEC: dict[str, Any] = {
    "vm_id": "6f2f9d0c-3b0b-4f55-9f2e-0d6c0b1a2c3d",
    "name": "web-1",
    "vcpus": 2,
    "memory_mib": 1024,
    "cells": [0],
    "root_disk": {
        "size_mib": 1024,
        "image": {
            "name": "tiny",
            "sha256": "ab" * 32,
            "size_bytes": 1,
            "format": "qcow2",
            "url": "https://orchestrator/images/tiny",
        },
    },
}
NIC = {"mac": "52:54:00:00:00:01", "bridge": "br0"}


def _all_models() -> list[type[Model]]:
    for module in pkgutil.iter_modules(ppec_contract.__path__):
        if module.name != "peer_protocol":  # no models, and it needs uvicorn
            importlib.import_module(f"ppec_contract.{module.name}")
    found, waiting = set(), [Model]
    while waiting:
        for model in waiting.pop().__subclasses__():
            if model not in found and model.__module__.startswith("ppec_contract"):
                found.add(model)
                waiting.append(model)
    return sorted(found, key=lambda model: model.__name__)


MODELS = _all_models()


def test_the_models_are_found() -> None:
    assert len(MODELS) >= 40
    assert {VmSpec, VmsCreate, CreateVms} <= set(MODELS)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_model_is_frozen_and_closed(model: type[Model]) -> None:
    assert model.model_config["frozen"] is True
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["allow_inf_nan"] is False


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_schema_forbids_other_fields_at_every_level(model: type[Model]) -> None:
    schema = model.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    for part in objects:
        if "properties" in part:
            assert part["additionalProperties"] is False, part.get("title")
    assert schema == model.model_json_schema()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_fields_are_named_in_plain_lower_case(model: type[Model]) -> None:
    assert all(field.isidentifier() and field == field.lower() for field in model.model_fields)


def test_the_agents_interface_is_what_it_was(regenerate_golden: bool) -> None:
    """The schemas both sides of the socket build on. A change here needs a capability or a new API version."""
    found = {
        name: {"request": method.request.model_json_schema(), "reply": method.reply.model_json_schema()}
        for name, method in METHODS.items()
    }
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if regenerate_golden:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text, "rewrite it with --regenerate-golden if the change is meant"


def test_methods_that_change_something_carry_an_operation_and_a_fence() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.changes == ({"operation_id", "fence"} <= set(method.request.model_fields))
        assert method.varlink_name == f"cloud.ppec.agent.{name}"


def test_changing_actions_are_the_methods_that_change_something() -> None:
    assert set(get_args(ChangingAction)) == {name for name, method in METHODS.items() if method.changes}


def test_a_value_survives_json() -> None:
    nic = NIC | {"addresses": ["10.0.0.5/24", "fd00::5/64"], "gateway4": "10.0.0.1", "nameservers": ["fd00::1"]}
    spec = parse(VmSpec, SPEC | {"nics": [nic], "tags": {"a": "b"}, "user_data": "#cloud-config\n"})
    assert VmSpec.model_validate_json(spec.model_dump_json()) == spec
    assert VmSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    one = parse(VmSpec, SPEC | {"tags": {"a": "1", "b": "2"}})
    other = parse(VmSpec, dict(reversed(SPEC.items())) | {"tags": {"b": "2", "a": "1"}})
    assert digest(one) == digest(other)
    assert digest(one) != digest(parse(VmSpec, SPEC))
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


@pytest.mark.parametrize("vcpus", [0, 1, -2, 3, 511, MAX_VCPUS + 2, 2**31, 2**63, 2.0, "2", True, None, [2]])
def test_vcpus_are_even_whole_and_bounded(vcpus: Any) -> None:
    for model, value in ((VmSpec, SPEC), (FlavorCreate, {"name": "f", "memory_mib": 512, "disk_mib": 512})):
        with pytest.raises(PpecError) as caught:
            parse(model, value | {"vcpus": vcpus})
        odd = isinstance(vcpus, int) and vcpus % 2 and 2 <= vcpus <= MAX_VCPUS
        assert caught.value.code == ("vm.odd_vcpus" if odd else "request.invalid")


@pytest.mark.parametrize("field", ["memory_mib", "cells", "root_disk", "vm_id", "name"])
@pytest.mark.parametrize("value", [0, -1, 2**63, "", None, [], {}, float("nan"), float("inf")])
def test_odd_sizes_and_types_are_refused(field: str, value: Any) -> None:
    with pytest.raises(PpecError) as caught:
        parse(VmSpec, SPEC | {field: value})
    assert any(fault["field"].startswith(field) for fault in caught.value.details["faults"])


@pytest.mark.parametrize(
    "change",
    [
        {"cells": [0, 0]},
        {"nics": [NIC, NIC]},
        {"nics": [NIC | {"mac": "52-54-00-00-00-01"}]},
        {"nics": [NIC | {"bridge": "br0; id"}]},
        {"nics": [NIC | {"bridge": "a" * 16}]},
        {"nics": [NIC | {"addresses": ["10.0.0.256/24"]}]},
        {"tags": {f"k{n}": "v" for n in range(65)}},
        {"root_disk": SPEC["root_disk"] | {"image": SPEC["root_disk"]["image"] | {"url": "http://x/y"}}},
        {"root_disk": SPEC["root_disk"] | {"image": SPEC["root_disk"]["image"] | {"sha256": "AB" * 32}}},
        {"root_disk": SPEC["root_disk"] | {"image": SPEC["root_disk"]["image"] | {"format": "vmdk"}}},
    ],
)
def test_a_spec_that_can_not_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PpecError):
        parse(VmSpec, SPEC | change)


def test_faults_are_named_and_their_values_are_not_shown() -> None:
    secret = "s3cr3t-" * 20_000
    with pytest.raises(PpecError) as caught:
        parse(VmSpec, SPEC | {"vcpus": "many", "user_data": secret, "colour": "red"})
    fields = {fault["field"] for fault in caught.value.details["faults"]}
    assert fields == {"vcpus", "user_data", "colour"}
    assert "s3cr3t" not in caught.value.problem().model_dump_json()


def test_many_faults_are_counted_not_listed() -> None:
    with pytest.raises(PpecError) as caught:
        parse(VmsCreate, {"flavor": "f", "image": "i"} | {f"x{n}": n for n in range(1000)})
    assert len(caught.value.details["faults"]) == 8
    assert "992 more" in caught.value.message


def test_the_number_of_vms_in_a_call_is_bounded() -> None:
    with pytest.raises(PpecError):
        parse(CreateVms, {"operation_id": "o", "fence": 0, "vms": []})
    with pytest.raises(PpecError):
        parse(CreateVms, {"operation_id": "o", "fence": 0, "vms": [SPEC] * 257})
    for fence in (-1, 2**53 + 1, 1.0, "1"):
        with pytest.raises(PpecError):
            parse(CreateVms, {"operation_id": "o", "fence": fence, "vms": [SPEC]})


@pytest.mark.parametrize("timeout_s", [-1, 601, float("nan"), float("inf"), "soon"])
def test_a_stop_waits_a_bounded_time(timeout_s: Any) -> None:
    with pytest.raises(PpecError):
        parse(StopVms, {"operation_id": "o", "fence": 0, "vm_ids": [SPEC["vm_id"]], "timeout_s": timeout_s})


@pytest.mark.parametrize(
    "naming",
    [
        {"names": ["a", "b"], "count": 2},
        {"names": ["a"], "name": "b"},
        {"names": ["a", "a"]},
        {"name": "a" * 59, "count": 2},
        {"count": 0},
        {"count": 1001},
        {"count": 2.0},
    ],
)
def test_a_batch_is_named_one_way(naming: dict[str, Any]) -> None:
    with pytest.raises(PpecError):
        parse(VmsCreate, {"flavor": "f", "image": "i"} | naming)


def test_the_defaults_of_a_batch() -> None:
    request = parse(VmsCreate, {"flavor": "f", "image": "i"})
    assert (request.count, request.policy, request.mode) == (1, Policy.BALANCED, BatchMode.ALL_OR_NOTHING)


def test_which_states_are_ends() -> None:
    ended = {state for state in OperationState if state.ended}
    assert ended == set(OperationState) - {OperationState.QUEUED, OperationState.RUNNING}


def test_a_frozen_value_can_not_be_changed() -> None:
    spec = parse(VmSpec, SPEC)
    with pytest.raises(ValidationError, match="frozen"):
        spec.vcpus = 4  # type: ignore[misc]
    assert TypeAdapter(VmSpec).validate_python(spec) is spec


@pytest.mark.parametrize(
    "numa",
    [
        {"cpus": "shared", "multi_cell": True},
        {"cpus": "shared", "smt": "isolate"},
        {"cpus": "shared", "smt": "require"},
        {"cpus": "mine"},
        {"smt": "no"},
        {"huge_page_kib": 4},
        {"huge_page_kib": 1024},
        {"huge_page_kib": -2048},
    ],
    ids=str,
)
def test_a_numa_policy_that_contradicts_itself_is_refused(numa: dict[str, Any]) -> None:
    with pytest.raises(PpecError) as caught:
        parse(VmSpec, SPEC | {"numa": numa})
    assert caught.value.code == "request.invalid"


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"vcpus": 4, "max_vcpus": 2}, "max_vcpus 2 is below vcpus 4"),
        ({"vcpus": 2, "max_vcpus": 3}, "odd"),
        ({"memory_mib": 512, "max_memory_mib": 256}, "max_memory_mib 256 is below memory_mib 512"),
        ({"memory_mib": 513, "numa": {"huge_page_kib": 2048}}, "512 or 514"),
        ({"memory_mib": 512, "numa": {"huge_page_kib": 1048576}}, "ask for 1024 MiB"),
        ({"memory_mib": 1024, "max_memory_mib": 1500, "numa": {"huge_page_kib": 1048576}}, "1024 or 2048"),
    ],
    ids=str,
)
def test_sizes_that_contradict_each_other_are_refused(sizes: dict[str, Any], says: str) -> None:
    with pytest.raises(PpecError) as caught:
        parse(VmSpec, SPEC | sizes)
    assert says in str(caught.value.problem().model_dump())


def test_what_a_vm_may_grow_to_and_how_it_sits_survive_json() -> None:
    numa = {"smt": "isolate", "multi_cell": True, "huge_page_kib": 2048}
    spec = parse(VmSpec, SPEC | {"vcpus": 4, "max_vcpus": 8, "memory_mib": 512, "max_memory_mib": 1024, "numa": numa})
    assert VmSpec.model_validate_json(spec.model_dump_json(exclude_defaults=True)) == spec


@pytest.mark.parametrize("name", ["Fast SSD", "", "-ssd", "ssd.", "ß"])
@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("pool", lambda name: {"flavor": "small", "pool": name}),
        ("items.0.pool", lambda name: {"items": [{"name": "a", "flavor": "small", "pool": name}]}),
        ("flavor", lambda name: {"flavor": name}),
    ],
)
def test_what_a_name_is_made_of_is_said_in_words(field: str, body: Any, name: str) -> None:
    with pytest.raises(PpecError) as refused:
        parse(VmsCreate, {"image": "debian"} | body(name))
    assert refused.value.message == (
        f"request: {field}: wanted 1 to 63 lower-case letters, digits, dots, underscores and hyphens; it begins and "
        "ends with a letter or digit"
    )


@pytest.mark.parametrize("pattern", PATTERNS_IN_WORDS)
def test_words_stand_for_a_pattern_of_the_contract(pattern: str) -> None:
    """And no other fault is told by them."""
    named = TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])
    with pytest.raises(ValidationError) as refused:
        named.validate_python("\n")
    said = refused.value.errors()[0]["msg"]
    assert pattern in said
    assert in_words(said) == f"wanted {PATTERNS_IN_WORDS[pattern]}"
    assert in_words("String should have at most 63 characters") == "String should have at most 63 characters"
