# SPDX-License-Identifier: Apache-2.0
"""The pure half of the IPDB: address arithmetic (which addresses of a prefix may be given out, in which order), what is
typed as the beginning of an address, the tables of import and export, and the ports for whoever keeps addresses. No
I/O: rows and grants are `store/`'s."""
