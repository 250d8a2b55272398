# SPDX-License-Identifier: Apache-2.0
"""The agent killed in mid-resize: at every call of the hypervisor, and as a process while one of them is slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.agent import ResizeVms, StopVms
from ppec_contract.vm import VmState
from ppec_lab.conditions import wait_until

from .resizing import CHANGING, GROWS, assert_all_agree, code, restart, seen, size_of

TARGETS = {"grow": (4, 768), "shrink": (2, 256), "mixed": (2, 768), "wait": (8, 640), "grow-far": (4, 4096)}
CALLED = {
    "grow": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "shrink": {"annotate", "redefine", "set_vcpus"},
    "mixed": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "wait": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "grow-far": {"annotate", "redefine", "set_vcpus", "grow_memory"},
    "off": {"redefine"},
}


@pytest.mark.parametrize("target", CALLED)
def test_a_crash_at_every_point(memory_dir: Path, words: Any, tiny_vm: Any, target: str) -> None:
    """Recovery finds enough held and no more, and a repeated request ends where the first would have."""
    off = target == "off"
    vcpus, memory_mib = TARGETS["mixed" if off else target]
    first = 4 if target in ("shrink", "mixed", "off") else 2
    one = tiny_vm(name="one", vcpus=first, max_vcpus=6, max_memory_mib=2048)

    async def prepare(agent: Any) -> Callable[[int], ResizeVms]:
        results = await agent.create(tiny_vm(name="neighbour"), one, operation="before")
        assert [code(result) for result in results] == ["", ""]
        if off:
            await agent.run(StopVms(operation_id="off", fence=1, vm_ids=(one.vm_id,), timeout_s=0, force=True))
        return lambda fence: size_of(one.vm_id, vcpus, memory_mib, fence).model_copy(update={"operation_id": "op-1"})

    async def recovered(agent: Any) -> None:
        await assert_all_agree(agent)
        domain = await seen(agent, one.vm_id)
        assert domain.state is (VmState.STOPPED if off else VmState.RUNNING)
        for found, allowed in ((domain.vcpus, {first, vcpus}), (domain.memory_mib, {512, memory_mib})):
            assert found in allowed

    async def done(agent: Any) -> None:
        await assert_all_agree(agent)
        await restart(agent, one.vm_id)
        await agent.actions.settle()
        await assert_all_agree(agent)
        domain = await seen(agent, one.vm_id)
        assert (domain.vcpus, domain.memory_mib) == (vcpus, memory_mib)

    settings = words.settings_of(memory_dir, lab={"topology": "cores=8,threads=2,memory_mib=8192"})
    found = words.crash_everywhere(words.crash_scenario(settings, prepare, recovered, done))
    assert found.kinds == {"domain", "journal: ResizeVms intent", "journal: ResizeVms answer"} | CALLED[target]
    for kind in found.kinds:
        assert found.counted[kind, "before"] == found.counted[kind, "after"] > 0
        assert (found.counted[kind, "torn"] > 0) == kind.startswith("journal")
    assert found.recoveries > len(CALLED[target])


@pytest.mark.parametrize("slow", CHANGING)
def test_killed_in_mid_resize_it_comes_back_clean_and_a_repeat_succeeds(
    agent_process: Callable[..., Any], vm: Any, slow: str
) -> None:
    agent = agent_process(lab={"delays_s": {slow: 600}}).start()
    one = vm(**GROWS)
    create = {"operation_id": "op-1", "fence": 1, "vms": [one.model_dump(mode="json")]}
    assert agent.client().call("CreateVms", create)["parameters"]["results"][0]["problem"] is None
    request = size_of(one.vm_id, 4, 768).model_dump(mode="json")
    agent.client().send("cloud.ppec.agent.ResizeVms", request, more=True)
    journal = agent.settings.storage.journal
    wait_until(lambda: b"ResizeVms" in journal.read_bytes(), "the intent is on disk", timeout_s=60)
    time.sleep(0.3)
    agent.kill()
    settings = agent.settings
    agent.write_settings(settings.model_copy(update={"lab": settings.lab.model_copy(update={"delays_s": {}})}))
    agent.start()
    (result,) = agent.client().call("ResizeVms", request)["parameters"]["results"]
    # The answer tells what the repeated call did: by the time of its last step the first had plugged the vCPUs.
    vcpus = "unchanged" if slow == "grow_memory" else "now"
    assert (result["problem"], result["resized"]) == (None, {"vcpus": vcpus, "memory_mib": "now"})
    report = agent.client().call("GetReport")["parameters"]["report"]
    (info,) = report["vms"]
    assert (info["vcpus"], info["memory_mib"], info["pending"]) == (4, 768, None)
    cell = report["cells"][0]
    assert cell["memory_mib"] - cell["memory_free_mib"] == 768
    assert cell["cores"] - cell["cores_reserved"] - cell["cores_free"] == 2
