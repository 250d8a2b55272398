# SPDX-License-Identifier: Apache-2.0
"""Durable operations: what changes VMs, and goes on after whoever began it is dead.

`accept` turns a request into an operation in one transaction. `engine` claims it and runs it through the steps its
kind declares in `kinds/`. `journal` writes every check-point under the fence. `hosts` carries a step's work to hosts
and records what came back. `service` is what the API calls.
"""
