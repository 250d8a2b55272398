# SPDX-License-Identifier: Apache-2.0
"""The daemon: start, reload on SIGHUP, stop on SIGTERM, and tell systemd about each."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import uvicorn

from ppec_contract.errors import PpecError, exit_code
from ppec_contract.peer_protocol import PeerCertificateProtocol
from ppec_proxy import logs, settings
from ppec_proxy.agent_pool import AgentPool
from ppec_proxy.edge import Edge
from ppec_proxy.gateway import Gateway
from ppec_proxy.ring_fence import RingFence, RingFencedSocket
from ppec_proxy.sd_notify import notify
from ppec_proxy.settings import Settings
from ppec_proxy.tls import LiveTls, TlsFiles

log = structlog.get_logger("ppec.proxy")
_KEEP_ALIVE_S = 75
# How long last answers may take to leave the socket buffers when the daemon stops: 20 x 50 ms.
_FLUSH_TICKS, _FLUSH_TICK_S = 20, 0.05


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens, and leaves the signals to us: it would end a clean stop by
    killing itself with the signal."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes nothing new, finishes the requests under way, then goes.

        uvicorn would wait for every *connection* to end, and a TLS client that keeps its side open takes 30 s to.
        """
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if under_way := set(self.server_state.tasks):
            _, unfinished = await asyncio.wait(under_way, timeout=self.config.timeout_graceful_shutdown)
            for task in unfinished:
                task.cancel()
        for _ in range(_FLUSH_TICKS):
            if not self.server_state.connections:
                return
            await asyncio.sleep(_FLUSH_TICK_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Proxy:
    """One running proxy."""

    def __init__(self, config_path: Path) -> None:
        self._config_path = config_path
        self._settings = settings.load(config_path)
        self._tls = LiveTls(_tls_files(self._settings))
        self._fence = RingFence(self._settings.allow_from)

    async def run(self) -> None:
        """Serves until told to stop. Raises OSError when the address can't be bound."""
        chosen = self._settings
        refused = logs.OncePerSecond(_log_refused)
        listener = RingFencedSocket.listen_on(chosen.listen_address, chosen.listen_port, self._fence, refused)
        agent = AgentPool(chosen.agent_socket_path, chosen.max_agent_connections, chosen.agent_queue_timeout_s)
        server = _Server(self._uvicorn_config(agent), lambda: self._announce(listener))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        for stop in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(stop, self._stop, server)
        try:
            await server.serve([listener])
        finally:
            agent.close()
            log.info("stopped")

    def reload(self) -> None:
        """New certificate files and a new allow-list. A fault in either keeps both as they were.

        The address, the socket and the limits need a restart.
        """
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            fresh = settings.load(self._config_path)
            identity = self._tls.reload()
            self._fence.networks = fresh.allow_from
        except PpecError as error:
            log.error(
                "reload refused, the previous certificate and allow-list stay", code=error.code, why=error.message
            )
        else:
            log.info("reloaded", identity=identity.uri, allow_from=[str(net) for net in fresh.allow_from])
        notify("READY=1")

    def _uvicorn_config(self, agent: AgentPool) -> uvicorn.Config:
        return uvicorn.Config(
            Edge(Gateway(self._settings, agent)),
            http=PeerCertificateProtocol,
            ws="none",
            # The ring-fenced listener needs a loop that calls the socket's own accept; uvloop does not.
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            ssl_context_factory=lambda _config, _default: self._tls.context,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(self._settings.shutdown_timeout_s),
        )

    def _announce(self, listener: RingFencedSocket) -> None:
        address, port = listener.getsockname()[:2]
        log.info(
            "serving",
            identity=self._tls.identity.uri,
            address=address,
            port=port,
            agent_socket=str(self._settings.agent_socket_path),
            allow_from=[str(net) for net in self._settings.allow_from],
        )
        notify("READY=1", f"STATUS=listening on {address} port {port}")

    def _stop(self, server: _Server) -> None:
        notify("STOPPING=1")
        server.should_exit = True


def _tls_files(chosen: Settings) -> TlsFiles:
    return TlsFiles(chosen.certificate_path, chosen.key_path, chosen.ca_path)


def _log_refused(address: str, suppressed: int) -> None:
    log.warning("refused", code="auth.outside_ring_fence", client=address, suppressed=suppressed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="ppec-proxy", description="Guards a host's agent: HTTPS to UNIX socket.")
    parser.add_argument("--config", type=Path, default=settings.DEFAULT_PATH, help="TOML settings (%(default)s)")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    arguments = parser.parse_args()
    logs.configure(arguments.log_level)
    try:
        asyncio.run(Proxy(arguments.config).run())
    except PpecError as error:
        log.error("can't start", code=error.code, why=error.message, hint=error.hint)
        sys.exit(exit_code(error.code))
    except OSError as error:
        log.error("can't listen", why=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
