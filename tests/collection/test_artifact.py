# SPDX-License-Identifier: Apache-2.0
"""The collection as others get it: documented, built, installed from the tarball, and found there."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml
from conftest import BIN, ROOT

MODULES = sorted(path.stem for path in (ROOT / "collections/ppec/plugins/modules").glob("[a-z]*.py"))


def ansible(tmp_path, *command, collections=ROOT / "collections"):
    done = subprocess.run(
        [str(BIN / command[0]), *map(str, command[1:])],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(collections),
            # site-packages may hold a copy that came with an installed ppec.
            "ANSIBLE_COLLECTIONS_SCAN_SYS_PATH": "False",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_module_is_documented(tmp_path):
    documents = json.loads(ansible(tmp_path, "ansible-doc", "--json", *(f"ppec.cloud.{name}" for name in MODULES)))
    for name in MODULES:
        document = documents[f"ppec.cloud.{name}"]
        assert document["return"], name
        assert yaml.safe_load(document["examples"]), name
        attributes = document["doc"]["attributes"]
        assert {attributes[key]["support"] for key in ("check_mode", "diff_mode", "action_group")} == {"full"}, name
        assert document["doc"]["version_added"] == "0.1.0", name


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Built from a copy of what git would ship, and installed from the tarball."""
    folder = tmp_path_factory.mktemp("artifact")
    ansible(folder, "ansible-galaxy", "collection", "build", ROOT / "collections/ppec", "--output-path", folder)
    (tarball,) = folder.glob("ppec-cloud-*.tar.gz")
    target = folder / "installed"
    # Where the collection is found in place, installing it would be nothing to do.
    command = ("ansible-galaxy", "collection", "install", tarball, "-p", target, "--offline")
    ansible(folder, *command, collections=target)
    return target


def test_what_is_built_is_found_where_it_is_installed(installed, tmp_path):
    root = installed / "ansible_collections/ppec/cloud"
    assert json.loads((root / "MANIFEST.json").read_text())["collection_info"]["version"] == "0.1.0"
    found = ansible(tmp_path, "ansible-doc", "-l", "-t", "module", "ppec.cloud", collections=installed)
    assert [line.split()[0] for line in found.splitlines()] == [f"ppec.cloud.{name}" for name in MODULES]
    for needed in ("plugins/action/agent.py", "playbooks/apply_plan.yml", "meta/runtime.yml", "CHANGELOG.rst"):
        assert (root / needed).is_file(), needed
    litter = [p for p in root.rglob("*") if p.suffix in (".pyc", ".gz") or p.name in ("__pycache__", ".ansible")]
    assert litter == []


def test_the_installed_collection_applies_a_plan(installed, make_fleet, spec, ansible_playbook):
    fleet = make_fleet("h1")
    path = fleet.write_plan(fleet.plan({"h1": {"vms": [spec("a")]}}))
    run = ansible_playbook(
        "ppec.cloud.apply_plan",
        {"h1": {}},
        "-e",
        f"ppec_plan_file={path}",
        env={"ANSIBLE_COLLECTIONS_PATH": str(installed)},
    )
    assert run.result()["succeeded"] == 1, run.output
    assert [vm.name for vm in fleet.hosts["h1"].agent.vms.values()] == ["a"]
