# SPDX-License-Identifier: Apache-2.0
"""The guard in front of a host's agent: HTTPS from the fleet on one side, the agent's UNIX socket on the other.

It decides who may speak (ring-fence, client certificate, role) and whether what is said is well-formed (the contract's
models); what is done about it is the agent's business. It runs as an unprivileged user.
"""
