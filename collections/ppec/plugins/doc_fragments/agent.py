# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fragments: how to reach a host's agent, and what every change of it takes."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  proxy_address:
    description:
      - Address of the host's proxy. The call is made from the controller.
      - Without it the call goes to the agent's UNIX socket on the host itself.
      - Taken from the variable C(ppec_proxy_address) when neither this nor O(socket_path) is given.
    type: str
  proxy_port:
    description:
      - Port of the host's proxy.
      - The variable C(ppec_proxy_port) takes precedence over the default.
    type: int
    default: 7443
  host_name:
    description:
      - The host's name in PPEC. The proxy's certificate must be issued to C(ppec://host/) and this name.
      - Taken from the variable C(ppec_host_name), or else from C(inventory_hostname).
    type: str
  ca_path:
    description:
      - File with the fleet CA's certificate (PEM), on the machine that makes the call.
      - Taken from the variable C(ppec_ca_path) when not given.
    type: path
  certificate_path:
    description:
      - File with the client certificate (PEM), issued by the fleet CA to an operator or an orchestrator.
      - Taken from the variable C(ppec_certificate_path) when not given.
    type: path
  key_path:
    description:
      - File with the client certificate's private key (PEM).
      - Taken from the variable C(ppec_key_path) when not given.
    type: path
  socket_path:
    description:
      - The agent's UNIX socket on the host. V(/run/ppec/agentd.sock) when no proxy is named either.
      - Taken from the variable C(ppec_socket_path) when no proxy is named.
    type: path
  deadline_s:
    description:
      - Seconds after which the whole call is given up, repeated attempts included.
    type: float
    default: 300.0
notes:
  - A lost connection, and an agent that asks to try again, are tried again up to twice within O(deadline_s).
"""

    CHANGE = r"""
options:
  state:
    description:
      - V(present) creates and starts a VM. V(absent) deletes it with its disks.
      - V(started) and V(stopped) need a VM that exists, as do all that follow.
      - V(resized) gives a VM the vCPUs and memory named here, at once as far as can be, the rest at its next start.
      - V(restarted) asks the guest to reboot, V(reset) presses the reset button. Both change something whenever they
        are asked for, and need a running VM.
      - V(paused) stops the vCPUs and V(resumed) has them run on. Neither starts a VM that is off.
      - V(frozen) has the guest's agent flush and freeze its file systems, V(thawed) ends that. What is frozen can't be
        seen from the host, so check mode says that both would change something.
    type: str
    choices: [present, absent, started, stopped, resized, restarted, reset, paused, resumed, frozen, thawed]
    default: present
  operation_id:
    description:
      - Names the change. The agent answers a repeated one from its journal and does nothing twice.
      - One is made up for the task when it is not given.
    type: str
  fence:
    description:
      - The agent refuses a fence lower than the highest it has seen for the same O(operation_id).
    type: int
    default: 0
  timeout_s:
    description:
      - Seconds a guest has to obey, for O(state=stopped) and O(state=restarted), and to let go of vCPUs, for
        O(state=resized).
    type: float
    default: 30.0
  force:
    description:
      - Whether a guest that did not obey in time has its power cut, for O(state=stopped), or is reset, for
        O(state=restarted).
    type: bool
    default: false
  thaw_after_s:
    description:
      - Seconds after which the host thaws a guest by itself, for O(state=frozen), at most 600.
    type: float
    default: 60.0
"""
