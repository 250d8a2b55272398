# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A client of one host's agent, over the proxy or over the socket, that tries again where trying again is safe.

Reads may always be repeated. Changes carry an operation id: the agent's journal answers a repeated one with its first
answer, so a call whose reply was lost is simply made again.
"""

from __future__ import annotations

import time

from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import SOCKET_PATH
from ansible_collections.ppec.cloud.plugins.module_utils.deadline import Deadline
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from ansible_collections.ppec.cloud.plugins.module_utils.proxy_session import ProxyAddress, ProxySession
from ansible_collections.ppec.cloud.plugins.module_utils.socket_session import SocketSession

# Pauses before the second and the third attempt.
PAUSES_S = (0.3, 1.0)


class AgentClient:
    """Calls one agent. `sessions_opened` counts connections: one, unless one broke."""

    def __init__(self, open_session, deadline, sleep=time.sleep):
        """`open_session()` makes a session with `call` and `close`, or raises ProblemError."""
        self._open_session = open_session
        self._deadline = deadline
        self._sleep = sleep
        self._session = None
        self.sessions_opened = 0

    def call(self, method, parameters, on_reply=None):
        """The last reply's parameters. Raises the last ProblemError when every attempt failed."""
        for pause_s in PAUSES_S:
            try:
                return self._attempt(method, parameters, on_reply)
            except ProblemError as problem:
                if not problem.retryable or not self._deadline.allows(pause_s):
                    raise
            self._sleep(pause_s)
        return self._attempt(method, parameters, on_reply)

    def _attempt(self, method, parameters, on_reply):
        try:
            if self._session is None:
                self._session = self._open_session()
                self.sessions_opened += 1
            return self._session.call(method, parameters, on_reply)
        except BaseException:
            # After an error it is not known what is still on the wire.
            self.close()
            raise

    def close(self):
        session, self._session = self._session, None
        if session is not None:
            session.close()


def client_from_params(params):
    """The client that a module's connection options describe: the proxy when its address is given, else the socket."""
    deadline = Deadline(params["deadline_s"])
    if not params.get("proxy_address"):
        path = params.get("socket_path") or SOCKET_PATH
        return AgentClient(lambda: SocketSession(path, deadline), deadline)
    missing = [name for name in ("host_name", "ca_path", "certificate_path", "key_path") if not params.get(name)]
    if missing:
        raise ProblemError(
            "request.invalid",
            f"to reach the proxy at {params['proxy_address']}, {', '.join(missing)} must be given too",
            hint="Set the options, or the variables of the same names with the prefix ppec_.",
        )
    where = ProxyAddress(
        params["host_name"],
        params["proxy_address"],
        params["proxy_port"],
        params["ca_path"],
        params["certificate_path"],
        params["key_path"],
    )
    return AgentClient(lambda: ProxySession(where, deadline), deadline)
