# SPDX-License-Identifier: Apache-2.0
"""Every role says what it takes, and takes no more than it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROLES = Path(__file__).parents[2] / "collections" / "ppec" / "roles"
NAMES = ("agentd", "libvirt_host", "pki", "proxy", "release")


def test_all_roles_are_looked_at() -> None:
    assert sorted(path.name for path in ROLES.iterdir()) == list(NAMES)


@pytest.mark.parametrize("role", NAMES)
def test_documented_options_are_the_defaults(role: str) -> None:
    specs = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]
    defaults = yaml.safe_load((ROLES / role / "defaults" / "main.yml").read_text())
    assert set(specs["options"]) == set(defaults)
    literal = {
        name: (option["default"], defaults[name])
        for name, option in specs["options"].items()
        if "default" in option and "{{" not in str(defaults[name])
    }
    assert {name for name, (documented, actual) in literal.items() if documented != actual} == set()


@pytest.mark.parametrize("role", NAMES)
def test_no_option_is_both_required_and_defaulted_in_its_documentation(role: str) -> None:
    specs = yaml.safe_load((ROLES / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]
    assert [name for name, option in specs["options"].items() if option.get("required") and "default" in option] == []


@pytest.mark.parametrize("role", NAMES)
def test_what_every_role_has_is_there(role: str) -> None:
    for part in ("README.md", "meta/main.yml", "tasks/main.yml", "handlers/main.yml"):
        assert (ROLES / role / part).is_file(), part
