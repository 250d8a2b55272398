# SPDX-License-Identifier: Apache-2.0
"""`ppec`, the command line: a client of the REST API and nothing more.

It imports neither FastAPI nor SQLAlchemy, and what a command needs only when it needs it: `ppec --help` must be quick.
"""
