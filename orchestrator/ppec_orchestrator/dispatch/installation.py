# SPDX-License-Identifier: Apache-2.0
"""Where the collection is, and the files a run needs around it: ansible.cfg, the drop-in, the environment.

A run sees an environment made here, never the orchestrator's own: that one may hold the database's password.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch import dropin
from ppec_orchestrator.dispatch.rundir import write_private

COLLECTION = Path("ansible_collections/ppec/cloud")
PLAYBOOK = Path("playbooks/apply_plan.yml")
INVENTORY_PLUGIN = Path("plugins/inventory/run_plan.py")
# What an operator may set for all runs, and what every program needs. Nothing else crosses over.
_PASSED_ON = ("HOME", "PATH", "LANG", "PYTHONPATH", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")
_WATCHED_SUFFIXES = (".py", ".yml", ".yaml", ".json", ".cfg")


def find_collections() -> Path:
    """The folder that holds `ansible_collections`: of a source checkout, or site-packages of an installation."""
    checkout = Path(__file__).resolve().parents[3] / "collections"
    candidates = [checkout, *(Path(entry) for entry in sys.path if entry)]
    for candidate in candidates:
        if (candidate / COLLECTION).is_dir():
            return candidate
    raise PpecError(
        "internal.error",
        "the collection ppec.cloud is neither beside the sources nor on Python's path",
        hint="Install the ppec distribution whole; it carries the collection.",
        subject="collection ppec.cloud",
    )


def _require(plugin: Path) -> None:
    if not plugin.is_file():
        raise PpecError(
            "internal.error",
            f"the collection ppec.cloud is another version's: it has no {plugin}",
            hint="Install orchestrator and collection from the same ppec distribution.",
            subject="collection ppec.cloud",
        )


@dataclass(frozen=True, slots=True)
class Installation:
    """Files and environment of all runs. `folder` is the orchestrator's own, mode 0700."""

    folder: Path
    collections: Path
    playbook: Path

    @classmethod
    def prepare(cls, folder: Path, *, collections: Path | None = None, playbook: Path | None = None) -> Installation:
        """Writes the drop-in and ansible.cfg. Safe to repeat."""
        root = collections or find_collections()
        _require(root / COLLECTION / INVENTORY_PLUGIN)
        made = cls(folder, root, playbook or root / COLLECTION / PLAYBOOK)
        # Each by itself: the mode given with `parents` is not the parents'.
        folder.parent.mkdir(parents=True, exist_ok=True)
        for private in (folder, made.binaries, folder / "tmp"):
            private.mkdir(exist_ok=True, mode=0o700)
        write_private(made.configuration, _CONFIGURATION.format(collections=root).encode())
        script = f"#!{sys.executable} -ISE\n".encode() + Path(dropin.__file__).read_bytes()
        write_private(made.binaries / "ansible-playbook", script)
        (made.binaries / "ansible-playbook").chmod(0o700)
        return made

    @property
    def socket(self) -> Path:
        return self.folder / "fork.sock"

    @property
    def binaries(self) -> Path:
        return self.folder / "bin"

    @property
    def configuration(self) -> Path:
        return self.folder / "ansible.cfg"

    def environment(self, source: Mapping[str, str] | None = None) -> dict[str, str]:
        """For the fork server, jobs and playbooks alike; `ANSIBLE_…` of the orchestrator's own is passed on."""
        outer = os.environ if source is None else source
        made = {name: value for name, value in outer.items() if name in _PASSED_ON or name.startswith("ANSIBLE_")}
        made["PATH"] = f"{self.binaries}{os.pathsep}{outer.get('PATH', os.defpath)}"
        # Ansible insists on UTF-8, and a service's locale may be C.
        made["LC_ALL"] = "C.UTF-8"
        made["ANSIBLE_CONFIG"] = str(self.configuration)
        made["ANSIBLE_HOME"] = str(self.folder / "home")
        made["ANSIBLE_LOCAL_TEMP"] = str(self.folder / "tmp")
        made[dropin.SOCKET_VARIABLE] = str(self.socket)
        made[dropin.PYTHON_VARIABLE] = sys.executable
        return made

    def imported(self) -> Imported:
        """What a fork server that is started now will have imported."""
        folders = []
        for root in (self.collections / COLLECTION, Path(__file__).parent):
            folders.append(str(root))
            for part in (root / "plugins", root / "meta"):
                folders += [str(p) for p in (part, *part.rglob("*")) if p.is_dir() and p.name != "__pycache__"]
        watched = {folder: _watched(folder) for folder in folders}
        paths = [str(self.configuration), *(f"{folder}/{name}" for folder in folders for name in watched[folder])]
        return Imported(self.environment(), watched, {path: _seen(path) for path in paths})


@dataclass(frozen=True, slots=True)
class Imported:
    """What is behind a fork server, as it was when it started: environment, names per folder, sizes and times."""

    environment: Mapping[str, str]
    folders: Mapping[str, frozenset[str]]
    files: Mapping[str, tuple[int, int] | None]

    def is_current(self, environment: Mapping[str, str]) -> bool:
        """Whether nothing has changed since. It is asked before every run, so it opens no file."""
        return (
            environment == self.environment
            and all(_seen(path) == seen for path, seen in self.files.items())
            and all(_watched(folder) == names for folder, names in self.folders.items())
        )


def _seen(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - twice as fast as a Path's, over a hundred files
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _watched(folder: str) -> frozenset[str]:
    try:
        return frozenset(name for name in os.listdir(folder) if name.endswith(_WATCHED_SUFFIXES))  # noqa: PTH208
    except FileNotFoundError:
        return frozenset()


def ansible_is_installed() -> bool:
    return find_spec("ansible") is not None


_CONFIGURATION = """\
# Written by the orchestrator at every start: all runs, and nothing else, use it.
[defaults]
collections_path = {collections}
collections_scan_sys_path = False
gathering = explicit
host_key_checking = False
retry_files_enabled = False
inventory_unparsed_warning = False
localhost_warning = False
interpreter_python = auto_silent
nocows = True
display_skipped_hosts = False
show_task_path_on_failure = False
deprecation_warnings = False
# Nothing but the plan says anything of a host.
vars_plugins_enabled =

[inventory]
enable_plugins = ppec.cloud.run_plan
unparsed_is_failed = True
"""
