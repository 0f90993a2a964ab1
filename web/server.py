"""The web server: uvicorn, and what streams that stay open need of it."""

import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette

logger = logging.getLogger(__name__)

GRACE = 5  # seconds that requests get to end when the server stops
UNREAD = 60_000  # milliseconds after which a client that takes nothing in is cut off


class Server(uvicorn.Server):
    """Calls ``on_stop`` when it begins to stop, and cuts off clients that never read."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. Connections have their time-out from the socket that they come by."""
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn has logged why
            where = self.config.host, self.config.port
            logger.error(  # noqa: TRY400 - the stack says nothing more
                "Can't listen on %s port %s: give another --port or --host", *where
            )
            raise
        # Without it the kernel would ask a client that has stopped reading for ever.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            for listening in (found for server in self.servers for found in server.sockets):
                with contextlib.suppress(OSError):
                    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: streams have to end before their connections do."""
        self._on_stop()
        await super().shutdown(sockets)


def run(
    app: Starlette,
    *,
    host: str,
    port: int,
    listener: int | None = None,
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or SIGINT. Exits with status 3 where it can't start.

    ``listener``: file descriptor of a socket to serve instead of ``host`` and ``port``.
    ``trusted_proxies``: addresses whose word counts on where a request came from.
    """
    _allow_many_connections()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )
    server = Server(config, on_stop=app.state.events.end_streams)
    # Having stopped, uvicorn raises again what it was stopped by. That must not kill the process
    # there and then: spans are exported at its exit.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(None if listener is None else [socket.socket(fileno=listener)])
    if not server.started:
        sys.exit(3)


def _allow_many_connections() -> None:
    """Open as many files as this process may: each stream is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
