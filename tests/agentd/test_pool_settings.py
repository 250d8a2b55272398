# SPDX-License-Identifier: Apache-2.0
"""Storage pools as they are set: which are refused, how large they are, and when one can be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_agentd.assembly import usable_pools_mib
from ppec_agentd.doctor.gather import take_snapshot
from ppec_agentd.doctor.pool_checks import pools as doctors_findings
from ppec_agentd.places import Places, Pool
from ppec_agentd.settings import Settings

MIB = 1024 * 1024


def test_a_pools_size_is_its_setting_or_what_is_free_and_held_by_vms(words: Any, tmp_path: Path, mounted: Path) -> None:
    (tmp_path / "fixed").mkdir()
    pools: dict[str, dict[str, Any]] = {
        "fast": {"path": str(mounted), "mounted": True},
        "fixed": {"path": str(tmp_path / "fixed"), "disk_mib": 77},
    }
    storage = words.settings_of(tmp_path, storage={"pools": pools}).storage
    assert usable_pools_mib(storage) == {"fast": 16, "fixed": 77}
    (mounted / str(UUID(int=1))).mkdir()
    (mounted / str(UUID(int=1)) / "root.qcow2").write_bytes(b"x" * 5 * MIB)
    assert usable_pools_mib(storage) == {"fast": 16, "fixed": 77}
    (mounted / "others").write_bytes(b"x" * 3 * MIB)
    assert usable_pools_mib(storage) == {"fast": 13, "fixed": 77}


WRONG_POOLS: list[tuple[dict[str, Any], str]] = [
    ({"fast": {}}, "storage.pools.fast.path\n  Field required"),
    ({"Fast!": {"path": "/srv/fast"}}, "should match"),
    ({"fast": {"path": "srv/fast"}}, "a pool's path is absolute"),
    ({"fast": {"path": "/srv/../etc"}}, "a pool's path is absolute"),
    ({"fast": {"path": "//srv/fast"}}, "a pool's path is absolute"),
    ({"fast": {"path": "//"}}, "a pool's path is absolute"),
    ({"fast": {"path": "/"}}, "a pool's path is absolute"),
    ({"fast": {"path": "/srv/a b"}}, "a pool's path is absolute"),
    ({"fast": {"path": "/srv/%h"}}, "a pool's path is absolute"),
    ({"fast": {"path": "/srv/fast\n"}}, "a pool's path is absolute"),
    ({"fast": {"path": "/srv/fast", "disk_mib": -1}}, "wanted 0 to"),
    ({"fast": {"path": "/srv/fast", "size": 1}}, "Extra inputs"),
    ({"a": {"path": "/srv/x"}, "b": {"path": "/srv/x"}}, "pool b at /srv/x and pool a at /srv/x"),
    ({"a": {"path": "/srv/x"}, "b": {"path": "/srv/x/y"}}, "pool b at /srv/x/y and pool a at /srv/x"),
    ({"a": {"path": "/var/lib/ppec/vms"}}, "pool a at /var/lib/ppec/vms and the VMs' own place"),
    ({"a": {"path": "/var/lib"}}, "pool a at /var/lib and the VMs' own place"),
    ({"a": {"path": "/var/lib/ppec/images/a"}}, "and the images at /var/lib/ppec/images"),
    ({"a": {"path": "/var/lib/ppec/drives"}}, "and the drives' records at /var/lib/ppec/drives"),
    ({f"p{number}": {"path": f"/srv/p{number}"} for number in range(65)}, "at most 64"),
]


@pytest.mark.parametrize(("pools", "said"), WRONG_POOLS, ids=[said for _, said in WRONG_POOLS])
def test_wrong_pools_are_refused(pools: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"\n") as refused:
        Settings.model_validate({"host": "h1", "storage": {"pools": pools}})
    assert said in str(refused.value)


def test_a_mount_is_told_from_a_folder(tmp_path: Path, mounted: Path) -> None:
    assert Pool("fast", mounted, mounted=True).problem() == ""
    (mounted / "below").mkdir()
    below = mounted / "below"
    assert Pool("fast", below, mounted=True).problem() == f"no file system is mounted at {below}"
    assert Pool("fast", tmp_path, mounted=True).problem() == f"no file system is mounted at {tmp_path}"
    assert Pool("fast", tmp_path).problem() == ""
    link = tmp_path / "link"
    link.symlink_to(mounted)
    assert Pool("fast", link, mounted=True).problem() == ""
    assert "No such file" in Pool("fast", tmp_path / "none").problem()


def test_the_doctor_and_the_agent_see_the_same_of_a_pool_that_is_a_link(
    words: Any, tmp_path: Path, mounted: Path
) -> None:
    """One link leads to what is mounted. The other lies there and leads to a plain folder."""
    plain = tmp_path / "plain"
    plain.mkdir(mode=0o711)
    links = {"good": tmp_path / "good", "bad": mounted / "bad"}
    links["good"].symlink_to(mounted)
    links["bad"].symlink_to(plain)
    mounted.chmod(0o711)
    pools = {name: {"path": str(path), "mounted": True, "disk_mib": 5} for name, path in links.items()}
    settings = words.settings_of(tmp_path, storage={"pools": pools})
    found = {finding.subject: finding.found for finding in doctors_findings(take_snapshot(settings))}
    nothing = "no file system is mounted there"
    assert {name: found[f"storage pool {name}, {path}"] == nothing for name, path in links.items()} == {
        name: Pool(name, path, mounted=True).problem() != "" for name, path in links.items()
    }
    assert found[f"storage pool bad, {links['bad']}"] == nothing


def test_places_without_pools_are_one(tmp_path: Path) -> None:
    places, vm_id = Places(tmp_path), UUID(int=1)
    assert places.folders == (tmp_path,)
    assert places.disk_folder(vm_id, "") == places.folder(vm_id)
    assert places.disk_folder(vm_id, "fast") is None
    assert not places.hold(vm_id)
    places.folder(vm_id).make()
    (tmp_path / "keep").mkdir()
    assert places.names() == {tmp_path: (str(vm_id), "keep")}
    assert replace(places, pools={"fast": Pool("fast", tmp_path / "none")}).names() == places.names()
    assert places.remove(vm_id)
    assert not places.remove(vm_id)
