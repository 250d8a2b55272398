# SPDX-License-Identifier: Apache-2.0
"""The REST API: one module per resource, under the names of `store/`. A new resource is a module here, a module in
`store/`, models in the contract, and a line in `app.ROUTERS`."""
