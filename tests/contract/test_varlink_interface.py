# SPDX-License-Identifier: Apache-2.0
"""The generated interface description is well-formed Varlink and says what the contract says."""

from __future__ import annotations

import re

from ppec_contract.agent import METHODS
from ppec_contract.varlink_interface import interface_description

# The grammar of varlink.org/Interface-Definition, as far as we use it: a type is a scalar, a name, an enum or a struct.
NAME = r"[A-Z][A-Za-z0-9]*"
FIELD = r"[A-Za-z](?:_?[A-Za-z0-9])*"
PREFIX = r"(?:\?|\[\]|\[string\])*"
ENUM = rf"\({FIELD}(?:, {FIELD})*\)"
TYPE = rf"{PREFIX}(?:bool|int|float|string|object|{NAME}|{ENUM})"
STRUCT = rf"\((?:{FIELD}: {TYPE}(?:, {FIELD}: {TYPE})*)?\)"
MEMBER = re.compile(
    rf"(?:type (?P<type>{NAME}) (?:{STRUCT}|{ENUM})|method (?P<method>{NAME}){STRUCT} -> {STRUCT}|error {NAME}{STRUCT})"
)


def members() -> list[str]:
    lines = [line for line in interface_description().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "interface cloud.ppec.agent"
    return lines[1:]


def test_every_member_follows_the_grammar() -> None:
    for line in members():
        assert MEMBER.fullmatch(line), line


def test_every_method_is_there_and_every_named_type_is_defined() -> None:
    matches = [match for line in members() if (match := MEMBER.fullmatch(line))]
    assert [match["method"] for match in matches if match["method"]] == list(METHODS)
    defined = {match["type"] for match in matches if match["type"]}
    used = {name for line in members() for name in re.findall(rf"(?<=[\]: ?]){NAME}(?=[,)])", line)}
    assert used <= defined
    assert {"VmSpec", "VmResult", "HostReport", "Problem"} <= defined


def test_what_has_a_default_is_optional() -> None:
    (stop,) = [line for line in members() if line.startswith("method StopVms")]
    assert "vm_ids: []string, timeout_s: ?float, force: ?bool" in stop
    assert not re.search(r"\?\?", interface_description())
