# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The action plugin of all agent_* modules: does their work in the worker process instead of sending a module out.

A module costs a host some 150 ms of packing, copying and starting Python; this costs a TLS session. With a proxy's
address the call is made from here. Without one it is the host's own socket that counts: directly when the connection is
local, by the real module when it is not (or when it needs another user).
"""

from __future__ import annotations

from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import ACTIONS, perform
from ansible_collections.ppec.cloud.plugins.plugin_utils.run_plan import PlanError, carry_out, predict, read_part

_TLS_FILES = ("ca_path", "certificate_path", "key_path")


class ActionModule(ActionBase):
    """See the module of the task's name for its documentation."""

    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        name = self._task.action.rpartition(".")[2]
        args = self._with_variables(dict(self._task.args), task_vars)
        if not args.get("plan_file") and not args.get("proxy_address") and not self._at_home():
            module = f"ppec.cloud.{name}"
            return {**result, **self._execute_module(module_name=module, module_args=args, task_vars=task_vars)}
        params = self._validated(args, ACTIONS[name][0])
        if params.get("plan_file"):
            return {**result, **self._plan(params["plan_file"], task_vars)}
        return {**result, **perform(name, params, self._task.check_mode)}

    def _at_home(self):
        """Whether the socket of this machine is the host's, and this process the one to open it."""
        return self._connection.transport == "local" and self._connection.become is None

    def _with_variables(self, args, task_vars):
        """Connection options that are not given come from the host's variables of the same name with `ppec_`."""
        if args.get("plan_file"):
            return args

        def take(*options):
            for option in options:
                value = task_vars.get(f"ppec_{option}")
                if args.get(option) is None and value is not None:
                    args[option] = self._templar.template(value)

        if not args.get("socket_path"):
            take("proxy_address")
        if args.get("proxy_address"):
            take("proxy_port", "host_name", *_TLS_FILES)
            args.setdefault("host_name", task_vars.get("inventory_hostname"))
        else:
            take("socket_path")
        return args

    def _validated(self, args, contract):
        rules = dict(contract)
        validation = ArgumentSpecValidator(rules.pop("argument_spec"), **rules).validate(args)
        if validation.error_messages:
            raise AnsibleActionFail(validation.errors.msg)
        return validation.validated_parameters

    def _plan(self, path, task_vars):
        try:
            part = read_part(path, task_vars["inventory_hostname"])
            return predict(part) if self._task.check_mode else carry_out(part)
        except (PlanError, OSError) as error:
            raise AnsibleActionFail(str(error)) from error
