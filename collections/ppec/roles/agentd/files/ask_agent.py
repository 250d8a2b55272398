# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks the agent behind the socket sys.argv[1] for its version, once; ends with 1 unless it answers as it should."""

import json
import socket
import sys

with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
    channel.settimeout(5)
    try:
        channel.connect(sys.argv[1])
        channel.sendall(b'{"method": "cloud.ppec.agent.GetVersion", "parameters": {}}\0')
        answer = b""
        while not answer.endswith(b"\0"):
            part = channel.recv(65536)
            if not part:
                sys.exit("the agent closed the connection without an answer")
            answer += part
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error}")

reply = json.loads(answer[:-1])
if "error" in reply:
    sys.exit(f"the agent answered {reply}")
sys.stdout.write(json.dumps(reply["parameters"], sort_keys=True))
