# SPDX-License-Identifier: Apache-2.0
"""What crosses a process boundary in PPEC, and nothing else.

`agent` is the host's interface, `api` and each `api_…` the orchestrator's, `vm` and `host` the words both speak,
`errors` the one error table, `frames` the codec of the UNIX socket, `identity` who a TLS peer is.
"""
