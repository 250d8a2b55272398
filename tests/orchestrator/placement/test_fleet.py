# SPDX-License-Identifier: Apache-2.0
"""A fleet of which some hosts changed says what one that is built anew does."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_orchestrator.placement.fleet import Fleet

from .fleets import a_fleet


def said(fleet: Fleet) -> dict[str, object]:
    """All that a fleet works out from its hosts."""
    return {
        "live": fleet.live.tolist(),
        "draining": fleet.draining.tolist(),
        "disk": (fleet.disk_mib.tolist(), fleet.disk_free_mib.tolist()),
        "cells": {name: figures.tolist() for name, figures in fleet.cells.items()},
        "places": {
            (place, name): rows.tolist() for place, found in fleet.places.items() for name, rows in found.items()
        },
        # Racks may be numbered otherwise; who is in one with whom may not.
        "racks": [sorted(np.flatnonzero(fleet.rack_numbers == number)) for number in fleet.rack_numbers],
    }


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_changed_hosts_are_told_as_if_the_fleet_were_built_anew(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng)
    said(fleet)
    others = {
        "live": lambda host: not host.live,
        "draining": lambda host: not host.draining,
        "rack": lambda host: host.rack + "x",
        "prefixes": lambda host: (*host.prefixes, (99,)),
        "disk_free_mib": lambda host: host.disk_free_mib // 2,
        "cells": lambda host: tuple(replace(cell, cores_free=0) for cell in host.cells),
    }
    changed = [
        replace(host, **{name: others[name](host) for name in rng.sample(sorted(others), rng.randint(0, 3))})
        for host in rng.sample(fleet.hosts, rng.randint(0, len(fleet.hosts)))
    ]
    by_name = {host.name: host for host in (*fleet.hosts, *changed)}
    assert said(fleet.changed(changed)) == said(Fleet.build(list(by_name.values())))
