# SPDX-License-Identifier: Apache-2.0
"""What crosses a process boundary in PPEC, and nothing else.

`agent` is the host's interface, `api` the orchestrator's, `vm`, `host` and `operation` the words both speak,
`errors` the one error table, `frames` the codec of the UNIX socket, `identity` who a TLS peer is.
"""
