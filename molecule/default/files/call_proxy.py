# SPDX-License-Identifier: Apache-2.0
"""Calls one method of a host's agent through its proxy; prints {"status", "identity", "body"}, or {"refused"}.

usage: call_proxy.py ADDRESS CA_FILE METHOD [CERTIFICATE KEY]
"""

import http.client
import json
import ssl
import sys

address, ca, method, *client = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
context.check_hostname = False  # peers are known by the URI in their certificate
if client:
    context.load_cert_chain(*client)
connection = http.client.HTTPSConnection(address, 7443, timeout=20, context=context)
try:
    connection.request("POST", f"/v1/agent/{method}", body="{}", headers={"Content-Type": "application/json"})
    names = connection.sock.getpeercert()["subjectAltName"]
    reply = connection.getresponse()
    result = {
        "status": reply.status,
        "identity": [value for kind, value in names if kind == "URI"],
        "body": json.loads(reply.read()),
    }
except (ssl.SSLError, http.client.RemoteDisconnected, ConnectionError) as error:
    result = {"refused": type(error).__name__}
sys.stdout.write(json.dumps(result))
