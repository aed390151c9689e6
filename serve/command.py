"""`regraft serve BUNDLE`: load, say where it listens once it answers, stop gracefully."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from regraft.engine.errors import RegraftError
from regraft.serve.settings import ServeSettings

if TYPE_CHECKING:
    from regraft.serve.scheduler import Scheduler

DEFAULTS = ServeSettings()


class ServeError(RegraftError):
    """A server that cannot start."""


def register(subparsers: Any) -> None:
    """Add `serve` to a command line's subparsers."""
    parser = subparsers.add_parser(
        "serve", help="answer HTTP requests with an exported bundle", description="Answer HTTP requests with a bundle."
    )
    add_arguments(parser)
    parser.set_defaults(handler=serve)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that `regraft export` made")
    parser.add_argument("--host", default=DEFAULTS.host, help="address to listen on; 0.0.0.0 for every interface")
    parser.add_argument("--port", type=int, default=DEFAULTS.port, help="port; 0 takes a free one and prints it")
    parser.add_argument("--threads", type=int, help="threads of the model (default: this container's share of CPUs)")
    parser.add_argument(
        "--max-batch-tokens", type=int, default=DEFAULTS.max_batch_tokens, help="most tokens in a batch"
    )
    parser.add_argument(
        "--queue-tokens", type=int, default=DEFAULTS.queue_tokens, help="most tokens that wait; beyond that: 429"
    )
    parser.add_argument("--max-body-bytes", type=int, default=DEFAULTS.max_body_bytes, help="largest request body")
    parser.add_argument(
        "--stall", type=float, default=DEFAULTS.stall, help="seconds after which a batch counts as hung: not ready"
    )
    parser.add_argument("--max-items", type=int, default=DEFAULTS.max_items, help="longest list in one request")
    parser.add_argument("--grace", type=float, default=DEFAULTS.grace, help="seconds to answer what waits when stopped")


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Exit code: 0 stopped in good order, 1 not all was answered, 2 could not start."""
    given = {f.name: getattr(arguments, f.name) for f in fields(ServeSettings) if hasattr(arguments, f.name)}
    try:
        settings = ServeSettings(**given)
    except ValueError as error:
        return _complain(error)
    try:
        return _serve(arguments.bundle, settings)
    except RegraftError as error:
        return _complain(error)


def _complain(error: Exception) -> int:
    print(f"regraft: {error}", file=sys.stderr)
    return 2


def _serve(bundle: str, settings: ServeSettings) -> int:
    # Bound before the model is loaded, so that a port in use is told at once, but not listening before it can answer.
    listener = _bind(settings.host, settings.port)
    with listener:
        from regraft.engine.threads import available_threads

        threads = settings.threads or available_threads()
        # Texts are tokenised by the endpoint's own threads; a second pool under them costs more than it brings.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from regraft.serve.http import create_app
        from regraft.serve.scheduler import Scheduler
        from regraft.serve.session import Session

        session = Session(bundle, threads, warm_tokens=settings.max_batch_tokens)
        scheduler = Scheduler(
            session.run,
            probe=session.probe(),
            max_batch_tokens=settings.max_batch_tokens,
            queue_tokens=settings.queue_tokens,
            stall=settings.stall,
            probe_every=settings.probe_every,
        ).start()
        return _run_until_stopped(create_app(session, scheduler, settings), scheduler, listener, settings)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServeError(f"--host {host}: not an address of this machine: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServeError(f"cannot listen on {host}, port {port}: {error.strerror}; --port 0 takes a free one") from None
    return listener


def _run_until_stopped(app: Any, scheduler: Scheduler, listener: socket.socket, settings: ServeSettings) -> int:
    import asyncio

    import uvicorn

    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    answered = True

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # A second Ctrl-C means now. Not kept by uvicorn's list of signals, which it raises again at the end: an
            # orderly end is no failure.
            self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
            self.should_exit = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"ready on {url}", flush=True)

        async def shutdown(self, sockets: Any = None) -> None:
            nonlocal answered
            # The queue is worked off while uvicorn closes the door and waits for the answers to leave.
            queue = asyncio.get_running_loop().run_in_executor(None, scheduler.stop, settings.grace)
            await super().shutdown(sockets)
            answered = await queue

    # uvicorn waits a little longer than the queue, so that those who were not answered in time are told so.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=int(settings.grace) + 2,
    )
    Server(config).run(sockets=[listener])
    if not answered:
        # The model is still in its last batch, in code that cannot be interrupted and must not outlive the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    return 0
