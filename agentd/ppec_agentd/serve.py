# SPDX-License-Identifier: Apache-2.0
"""The daemon: recover first, then serve, until a signal says otherwise."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from ppec_agentd import AGENT_VERSION
from ppec_agentd.actions.batch import Actions
from ppec_agentd.assembly import make_context, make_eviction, make_hypervisor, make_inventory, prepare_state
from ppec_agentd.health_watch import HealthWatch
from ppec_agentd.housekeeping import Housekeeping
from ppec_agentd.hypervisor import HypervisorEvent
from ppec_agentd.log_setup import set_up_logs
from ppec_agentd.orchestrator_link import OrchestratorLink
from ppec_agentd.recovery import recover
from ppec_agentd.report import ReportSource
from ppec_agentd.reporter import OrchestratorSink, Reporter
from ppec_agentd.server import Server, allowed_peers
from ppec_agentd.service import Service
from ppec_agentd.settings import DEFAULT_PATH, Settings, load
from ppec_agentd.smart_reader import SMART_FILE, read_smart
from ppec_agentd.systemd import notify, take_listening_socket
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
Attempt = Callable[[], Awaitable[object]]
DRAIN_S = 20.0
LONGEST_WAIT_S = 5.0


class Daemon:
    """One life of the agent. Signals only set `stopping`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """Returns when told to stop. What a hypervisor that is away leaves undone is waited for, not failed on."""
        settings = self._settings
        # Before anything is touched: these may name a group that is not there.
        allowed_peers(settings.socket)
        handed_over = take_listening_socket()
        journal = await asyncio.to_thread(prepare_state, settings.storage)
        hypervisor = make_hypervisor(settings)
        try:
            if not await self._reached("hypervisor", hypervisor.open):
                return
            context = await make_context(settings, hypervisor, journal)
            if not await self._reached("recovery", lambda: recover(context)):
                return
            source = ReportSource(settings.host, context, make_inventory(settings))
            health = HealthWatch(hypervisor, context.places, settings.storage.images, drives=context.drives.standing)
            health.every_s = settings.lab.health_every_s
            reporter = self._reporter(source, health)
            actions = Actions(context, reporter.touch if reporter else lambda: None)
            if reporter is not None:
                context.drives.on_change = reporter.touch
            chores = (context.drives.once, make_eviction(settings, context).once_due)
            housekeeping = Housekeeping(actions, source, chores)
            unsubscribe = hypervisor.on_event(lambda event: _heard(event, housekeeping, reporter))
            server = Server(settings.socket, Service(actions, source))
            await server.open(handed_over)
            await self._serve(housekeeping, health, reporter)
            unsubscribe()
            # Who waits for work under way gets its answer still.
            server.stop_listening()
            left = await actions.drain(DRAIN_S)
            await context.drives.close()
            await context.thaws.close()
            context.images.close()
            await server.close()
            log.info("stopped", unfinished=left)
        finally:
            await hypervisor.close()
            journal.close()

    async def _serve(self, housekeeping: Housekeeping, health: HealthWatch, reporter: Reporter | None) -> None:
        background = [
            asyncio.create_task(housekeeping.run(), name="housekeeping"),
            asyncio.create_task(health.run(), name="health"),
        ]
        if reporter is not None:
            background.append(asyncio.create_task(reporter.run(), name="reporter"))
        notify("READY=1", "STATUS=serving")
        log.info("serving", host=self._settings.host, version=AGENT_VERSION, pid=os.getpid())
        await self.stopping.wait()
        notify("STOPPING=1")
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)

    async def _reached(self, what: str, attempt: Attempt) -> bool:
        """Tries until it works, with growing pauses; False when told to stop meanwhile."""
        pause_s = 0.5
        while not self.stopping.is_set():
            try:
                await attempt()
            except PpecError as error:
                if not error.retryable:
                    raise
                log.warning("waiting", what=what, code=error.code, why=error.message)
                notify(f"STATUS=waiting for {what}: {error.code}")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), pause_s)
                pause_s = min(pause_s * 2, LONGEST_WAIT_S)
            else:
                return True
        return False

    def _reporter(self, source: ReportSource, health: HealthWatch) -> Reporter | None:
        reports = self._settings.reports
        if reports.orchestrator_url is None:
            return None
        link = OrchestratorLink(reports.orchestrator_url, self._settings.tls, reports.timeout_s)
        reporter = Reporter(source, OrchestratorSink(self._settings.host, link), reports, health)
        health.on_change = reporter.wake
        return reporter


def _heard(event: HypervisorEvent, housekeeping: Housekeeping, reporter: Reporter | None) -> None:
    log.debug("hypervisor_event", kind=event.kind, vm=event.name)
    housekeeping.heard(event)
    if reporter is not None:
        reporter.touch()


async def _run(settings: Settings) -> None:
    daemon = Daemon(settings)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, daemon.stopping.set)
    await daemon.run()


def main(arguments: list[str] | None = None) -> int:
    """`ppec-agentd [--config FILE]`. Exit status 2: the settings are wrong; 1: it could not start.

    `ppec-agentd doctor` only looks at the host: see `doctor.command.run_doctor`; `read-smart` only asks its drives: see
    `smart_reader.read_smart`.
    """
    parser = argparse.ArgumentParser(prog="ppec-agentd", description="The host agent of PPEC.")
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, help="settings file (TOML)")
    parser.add_argument("--check", action="store_true", help="check the settings and leave")
    parser.add_argument("--version", action="version", version=AGENT_VERSION)
    commands = parser.add_subparsers(dest="command")
    doctor = commands.add_parser("doctor", help="check whether this host can serve")
    # Suppressed, or its default would win over a --config before the word "doctor".
    doctor.add_argument("--config", type=Path, default=argparse.SUPPRESS, help="settings file (TOML)")
    doctor.add_argument("--output", choices=("text", "json"), default="text")
    smart = commands.add_parser("read-smart", help="ask the drives for their health, for the agent to read")
    smart.add_argument("--file", type=Path, default=SMART_FILE, help="where to leave the answers")
    options = parser.parse_args(arguments)
    if options.command is not None:
        return _look(options)
    try:
        settings = load(options.config)
    except PpecError as error:
        sys.stderr.write(f"ppec-agentd: {error.message}\n")
        return 2
    if options.check:
        return 0
    set_up_logs(settings.log)
    try:
        asyncio.run(_run(settings))
    except PpecError as error:
        # What the operator has to mend is said in words; the rest is ours to find.
        trace = error if error.code != "request.invalid" else None
        log.error("could_not_run", code=error.code, why=error.message, hint=error.hint, exc_info=trace)
        return 1
    except (OSError, LookupError) as error:
        log.exception("could_not_run", why=str(error))
        return 1
    return 0


def _look(options: argparse.Namespace) -> int:
    if options.command == "read-smart":
        read_smart(options.file)
        return 0
    from ppec_agentd.doctor.command import run_doctor

    return run_doctor(options.config, options.output)


if __name__ == "__main__":
    sys.exit(main())
