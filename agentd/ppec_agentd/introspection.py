# SPDX-License-Identifier: Apache-2.0
"""`org.varlink.service`: what every Varlink service answers about itself (varlink.org/Service)."""

from __future__ import annotations

from functools import cache

from ppec_agentd import AGENT_VERSION
from ppec_agentd.connection import Call, Reply
from ppec_contract.agent import INTERFACE
from ppec_contract.varlink_interface import interface_description

SERVICE = "org.varlink.service"
_SERVICE_DESCRIPTION = f"""\
# The Varlink service interface.
interface {SERVICE}

method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)

method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)

error MethodNotFound (method: string)

error MethodNotImplemented (method: string)

error InvalidParameter (parameter: string)

error PermissionDenied ()

error ExpectedMore ()
"""


@cache
def _descriptions() -> dict[str, str]:
    return {SERVICE: _SERVICE_DESCRIPTION, INTERFACE: interface_description()}


def answer_introspection(call: Call) -> Reply | None:
    """The reply to a call of `org.varlink.service`; None for calls of another interface."""
    interface, _, method = call.method.rpartition(".")
    if interface != SERVICE:
        return None
    if method == "GetInfo":
        return _get_info(call)
    if method == "GetInterfaceDescription":
        return _get_interface_description(call)
    return method_not_found(call)


def method_not_found(call: Call) -> Reply:
    """An interface nobody here knows, or a method its interface lacks."""
    interface, _, _ = call.method.rpartition(".")
    if interface not in _descriptions():
        return _interface_not_found(interface)
    return Reply({"method": call.method}, error=f"{SERVICE}.MethodNotFound")


def _get_info(call: Call) -> Reply:
    if call.parameters:
        return _invalid_parameter(next(iter(call.parameters)))
    return Reply(
        {
            "vendor": "PPEC",
            "product": "ppec-agentd",
            "version": AGENT_VERSION,
            "url": "https://ppec.cloud/",
            "interfaces": list(_descriptions()),
        }
    )


def _get_interface_description(call: Call) -> Reply:
    wanted = call.parameters.get("interface")
    if not isinstance(wanted, str) or len(call.parameters) != 1:
        return _invalid_parameter("interface")
    found = _descriptions().get(wanted)
    return _interface_not_found(wanted) if found is None else Reply({"description": found})


def _interface_not_found(interface: str) -> Reply:
    return Reply({"interface": interface}, error=f"{SERVICE}.InterfaceNotFound")


def _invalid_parameter(name: str) -> Reply:
    return Reply({"parameter": name}, error=f"{SERVICE}.InvalidParameter")
