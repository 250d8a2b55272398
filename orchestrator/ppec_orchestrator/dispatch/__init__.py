# SPDX-License-Identifier: Apache-2.0
"""Carries a plan to hosts: one ansible-runner run per batch, in a process that outlives the orchestrator.

`port` is what the operations engine sees. `dispatcher` is the real one: a directory per run (`rundir`), a job process
that runs it (`job`), forked from a process that has everything imported (`fork_server`), and found again after a
restart (`adoption`).
"""
