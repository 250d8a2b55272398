# SPDX-License-Identifier: Apache-2.0
"""Ansible inside the fork server: what is imported before the fork, and what a fork has to do again after it.

Ansible reads its configuration while it is imported. A fork therefore sets again the settings whose environment
variables differ, the temporary folder (which must be its own) and the plugin paths made from them. Where that isn't
enough (another ansible.cfg, other collections, a log file) the fork becomes the real ansible-playbook instead.
"""

from __future__ import annotations

import ast
import atexit
import importlib
import io
import os
import ssl
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from ppec_orchestrator.dispatch.dropin import PYTHON_VARIABLE

_COLLECTION = "ppec.cloud"
# Every playbook loads all plugins of these kinds, or the documentation of all of them, to know their options.
_LOADED_WHOLE = (
    "connection_loader",
    "shell_loader",
    "become_loader",
    "callback_loader",
    "cache_loader",
    "inventory_loader",
    "strategy_loader",
    "vars_loader",
    "filter_loader",
    "test_loader",
)
_ACTIONS = ("normal", "debug", "set_fact", "assert", "include_role", "gather_facts")
_LATE_MODULES = (
    "ansible.playbook.handler_task_include",
    "multiprocessing.popen_fork",
    "multiprocessing.resource_tracker",
    "multiprocessing.shared_memory",
    "multiprocessing.spawn",
    "ansible.executor.process.worker",
    "ansible.executor.stats",
    "ansible.executor.task_executor",
    "ansible.executor.task_queue_manager",
    "ansible.executor.play_iterator",
    "ansible.plugins.cache.memory",
    "ansible.playbook.play_context",
    "ansible.playbook.role.include",
    "ansible.template",
    "ansible.inventory.manager",
    "ansible.vars.hostvars",
    "ansible.vars.manager",
    "ansible._internal._templating._engine",
    "ansible._internal._templating._jinja_plugins",
    "multiprocessing.context",
    "multiprocessing.queues",
    "multiprocessing.synchronize",
    "http.client",
    "ssl",
    "asyncio",
    "concurrent.futures.thread",
)
# Which setting a plugin loader took its extra folders from.
_LOADER_PATHS = {
    "action_loader": "DEFAULT_ACTION_PLUGIN_PATH",
    "callback_loader": "DEFAULT_CALLBACK_PLUGIN_PATH",
    "connection_loader": "DEFAULT_CONNECTION_PLUGIN_PATH",
    "strategy_loader": "DEFAULT_STRATEGY_PLUGIN_PATH",
    "inventory_loader": "DEFAULT_INVENTORY_PLUGIN_PATH",
    "vars_loader": "DEFAULT_VARS_PLUGIN_PATH",
    "lookup_loader": "DEFAULT_LOOKUP_PLUGIN_PATH",
    "filter_loader": "DEFAULT_FILTER_PLUGIN_PATH",
    "test_loader": "DEFAULT_TEST_PLUGIN_PATH",
    "module_loader": "DEFAULT_MODULE_PATH",
    "module_utils_loader": "DEFAULT_MODULE_UTILS_PATH",
    "cache_loader": "DEFAULT_CACHE_PLUGIN_PATH",
    "become_loader": "BECOME_PLUGIN_PATH",
}
# Other settings' defaults are made from these.
_FOUNDATIONS = {"HOME", "ANSIBLE_HOME", "PYTHONPATH"}
# Applied once, while Ansible is imported: a fork that wants another value must start from nothing.
_FIXED = ("COLLECTIONS_PATHS", "COLLECTIONS_SCAN_SYS_PATH", "DEFAULT_LOG_PATH", "PLUGIN_FILTERS_CFG", "DEFAULT_DEBUG")


def warm_up(callbacks: Path, playbook: Path) -> None:
    """Imports Ansible, its plugins and the collection's action plugins. Takes half a second, once.

    `callbacks` is the folder of ansible-runner's own callback plugin; `playbook` is what most forks will run.
    """
    from ansible.cli import playbook as _playbook  # noqa: F401 - must be the first of Ansible's modules
    from ansible.plugins import loader

    for name in _LATE_MODULES:
        importlib.import_module(name)
    loader.init_plugin_loader([])
    for loader_name in _LOADED_WHOLE:
        list(getattr(loader, loader_name).all(class_only=True))
    for name in _ACTIONS:
        loader.action_loader.get(name, class_only=True)
    _warm_collection(loader)
    _warm_callback(loader.callback_loader, callbacks)
    _rehearse(playbook)


def _warm_collection(loader: Any) -> None:
    loader.inventory_loader.get(f"{_COLLECTION}.run_plan")
    try:
        package = importlib.import_module(f"ansible_collections.{_COLLECTION}.plugins.action")
    except ImportError:
        return
    for folder in package.__path__:
        for entry in sorted(Path(folder).glob("[!_]*.py")):
            loader.action_loader.get(f"{_COLLECTION}.{entry.stem}", class_only=True)


def _warm_callback(callback_loader: Any, folder: Path) -> None:
    """Has the callback's options known, which is to parse its documentation.

    It is not imported: that changes Ansible's output and makes a lock, which would then be one for all forks.
    """
    callback_loader.config = [str(folder)]
    callback_loader._clear_caches()
    for path in folder.glob("[!_]*.py"):
        documented = SimpleNamespace(DOCUMENTATION=_assigned(path, "DOCUMENTATION"))
        callback_loader._load_config_defs(path.stem, documented, str(path))


def _assigned(path: Path, name: str) -> str:
    """The string that a module's source assigns to `name`; empty without one."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and name in {t.id for t in node.targets if isinstance(t, ast.Name)}:
            return str(ast.literal_eval(node.value))
    return ""


def _rehearse(playbook: Path) -> None:
    """Does once, for nothing, what every run begins with: reads an inventory and the playbook, fills in a template.

    What stays is in caches: regular expressions, types, Jinja's lexer, OpenSSL's algorithms.
    """
    from ansible.inventory.manager import InventoryManager
    from ansible.parsing.dataloader import DataLoader
    from ansible.playbook import Playbook
    from ansible.template import Templar, trust_as_template
    from ansible.vars.manager import VariableManager

    with tempfile.TemporaryDirectory() as folder:
        plan, source = Path(folder, "plan.json"), Path(folder, "rehearsal.run_plan")
        plan.write_text('{"hosts": {"rehearsal": []}}')
        source.write_text(f"{plan}\n")
        loader = DataLoader()
        hosts = InventoryManager(loader=loader, sources=[str(source)])
        variables = VariableManager(loader=loader, inventory=hosts)
        for play in Playbook.load(str(playbook), variable_manager=variables, loader=loader).get_plays():
            for host in hosts.get_hosts(play.hosts):
                variables.get_vars(play=play, host=host)
        Templar(loader=loader, variables={"said": ""}).template(trust_as_template("{{ said }}"))
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def become_playbook(argv: Sequence[str], environment: Mapping[str, str], directory: str) -> int:
    """Runs `ansible-playbook argv` in this fork; descriptors 0-2 are set already. Returns the exit code."""
    # The server's own exit handlers would remove the server's temporary folder.
    atexit._clear()
    changed = {name for name in {*os.environ, *environment} if os.environ.get(name) != environment.get(name)}
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    _renew_streams()
    from ansible import constants
    from ansible.config.manager import find_ini_config_file

    if find_ini_config_file() != constants.CONFIG_FILE or changed & _FOUNDATIONS:
        _start_cold(argv)
    before = {name: getattr(constants, name) for name in _FIXED}
    _renew_settings(changed)
    if before != {name: getattr(constants, name) for name in _FIXED}:
        _start_cold(argv)
    _load_callbacks()
    try:
        _call(["ansible-playbook", *argv])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    else:
        code = 0
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def _load_callbacks() -> None:
    """Before the plan is there rather than after. Only in this process: see `_warm_callback`."""
    from ansible import constants
    from ansible.plugins.loader import callback_loader

    callback_loader.get(constants.DEFAULT_STDOUT_CALLBACK, class_only=True)
    list(callback_loader.all(class_only=True))


def _call(argv: list[str]) -> None:
    from ansible.cli.playbook import PlaybookCLI

    sys.argv = argv
    # It is configured before the fork on purpose; PlaybookCLI does it again and is told that it was done.
    warnings.filterwarnings("ignore", message="AnsibleCollectionFinder has already been configured")
    PlaybookCLI.cli_executor(argv)


def _start_cold(argv: Sequence[str]) -> NoReturn:
    python = os.environ.get(PYTHON_VARIABLE) or sys.executable
    os.execv(python, [python, "-m", "ansible", "playbook", *argv])  # noqa: S606 - no shell is wanted


def _renew_streams() -> None:
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8")  # noqa: SIM115
    for name, fd in (("stdout", 1), ("stderr", 2)):
        raw = open(fd, "wb", closefd=False)  # noqa: SIM115
        setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", line_buffering=True))


def _renew_settings(changed: Set[str]) -> None:
    """Reads again what the changed variables decide, and makes a temporary folder of this fork's own."""
    from ansible import constants
    from ansible.plugins import loader

    for name, definition in constants.config.get_configuration_definitions().items():
        variables = {entry["name"] for entry in definition.get("env", ())}
        if variables & changed or name == "DEFAULT_LOCAL_TMP":
            constants.set_constant(name, constants.config.get_config_value(name, variables=vars(constants)))
    for loader_name, setting in _LOADER_PATHS.items():
        plugins = getattr(loader, loader_name)
        folders = getattr(constants, setting, None)
        wanted = folders if isinstance(folders, list) else [folders] if folders else []
        if plugins.config != wanted:
            modules = plugins._module_cache
            plugins.config = wanted
            plugins._clear_caches()
            # What is imported stays imported; only where plugins are looked for is found out again.
            plugins._module_cache = modules
