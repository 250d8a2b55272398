# SPDX-License-Identifier: Apache-2.0
"""Thousands of odd module arguments: each is refused in words or carried out, and check mode never changes anything."""

from __future__ import annotations

import json

import pytest
from agent_double import FakeAgent
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import ACTIONS
from ansible_collections.ppec.cloud.plugins.module_utils.agent_arguments import CHANGE, VM
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppec_contract.errors import PpecError

ODD_TEXT = st.sampled_from(
    [
        "",
        " ",
        "a",
        "web-1",
        "-1",
        "0",
        "2",
        "3",
        "1e9",
        "nan",
        "true",
        "../..",
        "{{ 1 }}",
        "$(id)",
        "\x00",
        "é\u2028",
        "x" * 300,
    ]
)
ODD_NUMBER = st.sampled_from([-1, 0, 1, 2, 3, 256, 2**31, 2**53 + 1, 2**63, 2**80, 0.5, 1e308, float("inf")])
ODD = st.recursive(
    st.none() | st.booleans() | ODD_NUMBER | ODD_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3),
    max_leaves=6,
)


def odd_options(spec):
    """Some of the options, each left as it is in a good task or made odd."""
    return st.dictionaries(st.sampled_from([*spec, "no_such_option"]), ODD, max_size=4)


@pytest.mark.parametrize("state", ["present", "absent", "started", "stopped"])
def test_odd_arguments(spec, state):
    def attempt(agent, name, arguments, check_mode):
        """What ansible would do: validate, then perform."""
        rules = dict(ACTIONS[name][0])
        # The validator converts in place.
        arguments = json.loads(json.dumps(arguments))
        try:
            validation = ArgumentSpecValidator(rules.pop("argument_spec"), **rules).validate(arguments)
        except (TypeError, OverflowError):
            # Ansible's validator trips over a list with a null where an option has suboptions, and over an endless
            # number where it wants an int; the task fails.
            return "refused by Ansible"
        if validation.error_messages:
            return "refused by Ansible"
        try:
            outcome = ACTIONS[name][1](validation.validated_parameters, agent, check_mode)
        except ProblemError as problem:
            return problem.code
        except PpecError as error:
            return error.code
        json.dumps(outcome, allow_nan=False)
        return "failed" if outcome.get("failed") else "done"

    seen = []

    @settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(odd_options(VM), odd_options(CHANGE), st.booleans(), st.booleans())
    def run(vm, change, there, as_list):
        agent = FakeAgent("h1")
        if there:
            one = {**dict.fromkeys(VM), **dict.fromkeys(CHANGE), **spec("web-1"), "state": "present", "fence": 0}
            ACTIONS["agent_vm"][1](one, agent, False)
            agent.requests.clear()
        base = spec("web-1") if state == "present" else {"vm_id": spec("web-1")["vm_id"]}
        options = {"state": state, **change}
        name = "agent_vms" if as_list else "agent_vm"
        arguments = {"vms": [{**base, **vm}], **options} if as_list else {**base, **vm, **options}
        vms = dict(agent.vms)
        attempt(agent, name, arguments, True)
        assert agent.changes == []
        assert agent.vms == vms
        ended = attempt(agent, name, arguments, False)
        if ended not in ("done", "failed"):
            assert agent.vms == vms, ended
        seen.append(ended)

    run()
    # It would be worth little if all of them ended the same way.
    assert {"done", "refused by Ansible", "request.invalid"} <= set(seen)
    assert len(seen) >= 500
